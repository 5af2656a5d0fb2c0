"""memwatch in kohya's sd-scripts, whose files stay as they are: LoRA of Stable Diffusion 1.x, 2.x and XL.

Put the runner before the script on your own command line, in the folder of sd-scripts::

    accelerate launch -m memwatch.integrations.kohya train_network.py --memwatch memwatch.yaml --network_dim 16 ...
    accelerate launch -m memwatch.integrations.kohya sdxl_train_network.py --memwatch memwatch.yaml ...

``memwatch.yaml`` holds memwatch's settings, ``probes`` and ``controls`` among them; ``memwatch = "memwatch.yaml"`` in
their ``--config_file`` does as well. Read at commit 48d368fa (February 2026). Of that commit ``train_network.py`` was
run on a CPU, with a tiny random model, diffusers 0.36 and transformers 4.54; ``sdxl_train_network.py`` was tried on a
miniature only, its UNet and LoRA beside diffusers' own. sd-scripts pins diffusers 0.32, which is too old for memwatch,
and cannot be imported with transformers 5: ``pip install "diffusers>=0.36" "transformers<5"``.

How it works, and what to know:

- The runner subclasses ``NetworkTrainer``. ``sample_images`` is called once before training and after every optimizer
  step, on every rank: there it takes the baseline, and then looks. Several ranks have not been tried.
- The networks of sd-scripts patch the layers of a UNet that is no diffusers model. ``Patched`` puts both together.
- memwatch looks in the loop's mixed precision, since the networks are of another type than what they adapt.
- A stop empties the training dataloader. The epochs that are left run through empty, without samples, validation and
  saves, and their own final save follows. Its metadata say ``ss_steps`` truly, and ``ss_epoch`` as planned.
- ``--save_state`` keeps memwatch's state, and ``--resume`` goes on from it. memwatch counts steps on, although
  sd-scripts begins at 0 again.
- Their gradient checkpointing rests during a look: it needs training mode, and SDXL's is reentrant. A look that runs
  out of memory is repeated with smaller batches.
- Prompts are cut to the text encoder's length, whatever ``--max_token_length`` says, and weighted captions are read as
  plain text.
- Their dataset reads whole folders: train on ``watch/train`` of ``memwatch pick TRAIN --out watch``.

Not there: other scripts (Flux, SD 3, Lumina, full fine-tuning, textual inversion), DeepSpeed, an fp8 base,
``signals.baseline: base``, ``weights: ema``, ``rollback``. ``memwatch scan`` reads what they
save.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from memwatch.callback import MemWatch
from memwatch.config import MemWatchConfig
from memwatch.denoiser import unwrap
from memwatch.guard import GuardedLoader
from memwatch.integrations.kohya_model import PatchedSDXL, PatchedUNet, encoders_of, pipeline_of_run
from memwatch.integrations.runner import (
    has_stopped,
    import_theirs,
    read_settings,
    refuse,
    shorter_side,
    watch_or_refuse,
)
from memwatch.resume import FIRST, load, save
from memwatch.run_folder import write_json

logger = logging.getLogger("memwatch")

TRAINER = "sd-scripts"
SCRIPTS = {"train_network": "NetworkTrainer", "sdxl_train_network": "SdxlNetworkTrainer"}
NEVER = sys.maxsize  # epochs
STEP = "memwatch_step.json"  # in their checkpoints: memwatch's count of steps


class Watching:
    """What ``watching`` mixes into a ``NetworkTrainer``.

    Attributes:
        settings: memwatch's configuration.
        watch: ``None`` before training.
    """

    settings: MemWatchConfig
    is_sdxl: bool  # theirs, and so is what follows
    vae_scale_factor: float
    watch: MemWatch | None = None
    _network: Any = None
    _step = 0

    # --- what their loop calls ---------------------------------------------------------------------------------------

    def post_process_network(self, args: Any, accelerator: Any, network: Any, text_encoders: Any, unet: Any) -> None:
        super().post_process_network(args, accelerator, network, text_encoders, unet)  # type: ignore[misc]
        self._network = network
        guard_prepared(accelerator, self._should_stop)

    def sample_images(
        self,
        accelerator: Any,
        args: Any,
        epoch: int | None,
        global_step: int,
        device: Any,
        vae: Any,
        tokenizers: Any,
        text_encoder: Any,
        unet: Any,
    ) -> None:
        """Before training ``epoch`` is 0, after a step it is ``None``, and after an epoch its number."""
        if self.watch is None:
            self._begin(accelerator, args, vae, tokenizers, text_encoder, unet)
        elif epoch is None:
            self._end_step(args, global_step)
        if epoch is None or not self._should_stop():
            super().sample_images(  # type: ignore[misc]
                accelerator, args, epoch, global_step, device, vae, tokenizers, text_encoder, unet
            )

    def accelerator_logging(self, accelerator: Any, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """They log to each tracker by itself, past ``accelerator.log``."""
        if self.watch is not None:
            self.watch.note_losses(logs, self._step)
        super().accelerator_logging(accelerator, logs, *args, **kwargs)  # type: ignore[misc]

    # --- what memwatch does there ------------------------------------------------------------------------------------

    def _should_stop(self) -> bool:
        return self.watch is not None and self.watch.should_stop

    def _begin(self, accelerator: Any, args: Any, vae: Any, tokenizers: Any, text_encoder: Any, unet: Any) -> None:
        if self._network is None:
            refuse(f"this {TRAINER} has no 'post_process_network'; update it to one of 2026")
        checkpoint = Path(args.resume) if args.resume else None
        self._step = start = step_of(checkpoint)
        left = args.max_train_steps if start == 0 or not args.skip_until_initial_step else args.max_train_steps - start
        config = replace(
            self.settings,
            max_train_steps=self.settings.max_train_steps or start + left,
            resolution=self.settings.resolution or shorter_side(args.resolution),
        )
        theirs = text_encoder if isinstance(text_encoder, list | tuple) else [text_encoder]
        encoders = [unwrap(encoder) for encoder in theirs]
        self.watch = watch_or_refuse(
            accelerator,
            (PatchedSDXL if self.is_sdxl else PatchedUNet)(unwrap(unet), self._network, encoders),
            pipeline_of_run(vae, args, accelerator.device, self.vae_scale_factor),
            config=config,
            text_encoder=encoders_of(encoders, self._network, accelerator, args, is_sdxl=self.is_sdxl),
            tokenizer=list(tokenizers),
        )
        self.watch.observer.limit_batches(args.train_batch_size)
        accelerator.register_save_state_pre_hook(self._save)
        if checkpoint is not None:
            load(self.watch, checkpoint / FIRST)
            if has_stopped(self.watch):
                run_empty(args, 0)
        self.watch.begin(start)

    def _end_step(self, args: Any, global_step: int) -> None:
        assert self.watch is not None
        self._step += 1
        self.watch.on_step_end(self._step)
        if self.watch.should_stop:
            run_empty(args, global_step)

    def _save(self, models: Any, weights: Any, folder: str) -> None:
        """At their last checkpoint the watch is closed already, and hears of no more checkpoints itself."""
        assert self.watch is not None
        save(self.watch, Path(folder) / FIRST)
        with self.watch.faults.surviving("saving the count of steps", "a run that resumes from it counts from 0"):
            if self.watch.accelerator.is_main_process:
                write_json(Path(folder) / STEP, {"step": self._step})


def watching(trainer: type, settings: MemWatchConfig) -> type:
    """A subclass of one of their trainers that watches what it trains."""
    return type(f"Watching{trainer.__name__}", (Watching, trainer), {"settings": settings})


def guard_prepared(accelerator: Any, should_stop: Callable[[], bool]) -> None:
    """The first dataloader that ``accelerator.prepare`` gives, the training one, is empty once a stop is decided."""
    prepare = accelerator.prepare

    def guarding(*args: Any, **kwargs: Any) -> Any:
        prepared = prepare(*args, **kwargs)
        items = list(prepared) if isinstance(prepared, tuple) else [prepared]
        for i, item in enumerate(items):
            if isinstance(item, DataLoader):
                items[i] = GuardedLoader(item, lambda: None, should_stop)
                accelerator.prepare = prepare
                break
        return tuple(items) if isinstance(prepared, tuple) else items[0]

    accelerator.prepare = guarding


def run_empty(args: Any, global_step: int) -> None:
    """Let the epochs that are left do nothing; their dataloader is empty."""
    args.max_train_steps = global_step  # ends an epoch that was resumed, whose dataloader is a new one
    args.save_every_n_epochs, args.validate_every_n_epochs = None, NEVER


def step_of(checkpoint: Path | None) -> int:
    """memwatch's count of steps when a checkpoint was saved; 0 where it does not say."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads((checkpoint / STEP).read_text(encoding="utf-8"))["step"]) if checkpoint else 0
    return 0


# --- the command -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Train by one of their scripts, watched.

    Raises:
        SystemExit: with code 2, when it cannot be watched; the message says why.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    script = Path(argv[0]) if argv else Path()
    known = ", ".join(f"{name}.py" for name in SCRIPTS)
    if script.stem not in SCRIPTS:
        refuse(f"script: got {argv[0] if argv else 'nothing'!r}, allowed as the first argument: {known}")
    sys.argv = [str(script), *argv[1:]]  # they parse it a second time for --config_file
    module = import_theirs(script.stem, TRAINER, str(script.resolve().parent))
    parser = module.setup_parser()
    parser.add_argument("--memwatch", metavar="YAML", help="settings of memwatch")
    args = parser.parse_args()
    module.train_util.verify_command_line_training_args(args)
    args = module.train_util.read_config_from_file(args, parser)
    for option in ("deepspeed", "fp8_base", "fp8_base_unet"):
        if getattr(args, option, None):
            refuse(f"--{option} is set, and memwatch cannot look at such a model; train without it")
    settings = read_settings(args.memwatch, TRAINER)
    watching(getattr(module, SCRIPTS[script.stem]), settings)().train(args)


if __name__ == "__main__":
    main()
