"""What a checkpoint says that its model predicts, against the scheduler that it would be looked at with."""

from __future__ import annotations

from typing import Any

from memwatch.denoiser.log_filter import quietly
from memwatch.denoiser.schedule import NoiseSchedule
from memwatch.scan.checkpoints import Form, form_of, is_pipeline
from memwatch.scan.weight_files import CheckpointError, all_names, metadata_of, plain, reading

V, EPSILON, ZERO, NOT_ZERO = "v_prediction", "epsilon", "zero terminal SNR", "no zero terminal SNR"
MEANS = {  # where a checkpoint may say something, and what that means; marker tensors and metadata are text
    "modelspec.prediction_type": {"v": V, "v_prediction": V, "epsilon": EPSILON},
    "ss_v_parameterization": {"true": V, "false": EPSILON},  # kohya
    "ss_zero_terminal_snr": {"true": ZERO, "false": NOT_ZERO},
    "v_pred": {"there": V},  # marker tensors
    "ztsnr": {"there": ZERO},
    "prediction_type": {V: V, EPSILON: EPSILON},  # a scheduler's configuration
    "rescale_betas_zero_snr": {"true": ZERO, "false": NOT_ZERO},
}
SMALL = 1e-3  # alpha at the last timestep: 0.07 in Stable Diffusion's own schedule, 0 with zero terminal SNR


def check_prediction(source: str, schedule: NoiseSchedule, scheduler_of: str) -> None:
    """Raise a ``CheckpointError`` that names both, where a checkpoint says another prediction type or terminal SNR.

    Most say nothing of it.
    """
    if schedule.alphas is None:  # rectified flow
        return
    ours = {schedule.prediction_type, ZERO if float(schedule.alphas[-1]) < SMALL else NOT_ZERO}
    for key, value in _said(source).items():
        theirs = MEANS.get(key, {}).get(str(value).lower())
        if theirs is not None and theirs not in ours:
            says = next(each for each in ours if (each in (V, EPSILON, "sample")) == (theirs in (V, EPSILON)))
            why = f"says {theirs} ({key}), and the scheduler of {scheduler_of} {says}"
            raise CheckpointError(f"{source}: {why}; give the checkpoint's own pipeline as --pretrained")


def _said(source: str) -> dict[str, Any]:
    """What lies beside the weights: metadata and marker tensors of a file, the scheduler of a pipeline's folder."""
    form, file = form_of(source)
    if form is not Form.DIFFUSERS:
        return metadata_of(file) | {plain(name): "there" for name in all_names(file)}
    if not is_pipeline(source):
        return {}
    from diffusers import DDPMScheduler

    with reading(source), quietly():
        return dict(DDPMScheduler.load_config(source, subfolder="scheduler"))
