"""The table of Kim & Lee (ICML 2026, arXiv 2605.26756), measured with memwatch beside the paper's own numbers.

    python train_examples/evidence/reproduce_paper.py --model_version sdv1 --non_memorized prompts.txt
    accelerate launch train_examples/evidence/reproduce_paper.py ...    # several GPUs
    python train_examples/evidence/reproduce_paper.py --smoke           # tiny-sd with planted templates, one CPU core

Prompts, seeds and masks are those of Webster 2023 (see ``templates_verbs.py``). ``--non_memorized`` is a text file of
prompts that are not memorized, one per line; the paper has 500. Without it there is localization, but no detection.
A run that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from memwatch.config_file import load_config
from memwatch.denoiser import Components, Conditioning, Denoiser, family_of, load_components
from memwatch.denoiser.schedule import NoiseSchedule
from memwatch.measure.measure import measure
from memwatch.measure.measurement import Measurement, Observation
from memwatch.measure.prepare import PreparedProbe
from memwatch.measure.probes import Probe
from memwatch.measure.signals import Signals
from memwatch.measure.views import prompt_view
from memwatch.scan.checkpoints import load_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds only what lies in its own folder
from evidence.evaluate import evaluate_sets, read_folders
from evidence.runs.bright_ending import bright_ending
from evidence.templates_verbs import Case, download, memorized, non_memorized

CONFIG = load_config(Path(__file__).resolve().parents[2] / "configs" / "paper.yaml")
MODELS = {  # now, earlier
    "sdv1": ("CompVis/stable-diffusion-v1-4", "CompVis/stable-diffusion-v1-1"),
    "sdv2": ("stabilityai/stable-diffusion-2-1", "stabilityai/stable-diffusion-2"),
}
# Of SD v1.4: IoU on template masks, AUC, TPR at 1 % FPR.
PAPER: dict[str, tuple[float | None, float | None, float | None]] = {
    "curvature_earlier": (0.921, 0.989, 0.900),
    "curvature_unconditional": (0.899, 0.997, 0.982),
    "score_earlier": (0.863, 0.998, 0.988),
    "score_unconditional": (0.830, 0.997, 0.982),
    "bright_ending": (0.751, 0.886, 0.390),
    "raw_curvature": (0.586, 0.861, 0.082),
    "all_ones": (0.560, None, None),
}


def paper_maps(signals: Signals, channels: int, sigma: float) -> dict[str, np.ndarray]:
    """memwatch's maps in the paper's unit, each ``(h, w)``.

    The paper differentiates epsilon, where memwatch has ``sigma * d eps / d x``. It sums over channels, where memwatch
    takes means. It clips the curvatures at 0, and divides epsilon by sigma in the score differences.

    Args:
        signals: with both comparisons.
        channels: of the latents.
        sigma: of the timestep looked at.
    """
    earlier, unconditional = signals.snapshot, signals.unconditional
    assert earlier is not None
    assert unconditional is not None
    curvatures = {"curvature_earlier": earlier.collapse, "curvature_unconditional": unconditional.collapse}
    curvatures["raw_curvature"] = signals.raw
    scores = {"score_earlier": earlier.score, "score_unconditional": unconditional.score}
    maps = {name: m.mean[0].clamp(min=0) * (channels / sigma) for name, m in curvatures.items()}
    maps |= {name: m.mean[0] * (channels / sigma**2) for name, m in scores.items()}
    return {name: m.numpy() for name, m in maps.items()}


@dataclass
class Model:
    """A denoiser, with the text encoder and the scheduler that belong to it."""

    denoiser: Denoiser
    parts: Components

    @classmethod
    def load(cls, source: str, device: torch.device) -> Model:
        """Load a pipeline's denoiser and what encodes its prompts.

        Args:
            source: folder or hub id of the pipeline.
        """
        model = load_model(source).requires_grad_(False).to(device)
        names = family_of(model).text_encoders
        parts = load_components(source, Components(None), needs_vae=False, text_encoders=names, device=device)
        return cls(family_of(model)(model, NoiseSchedule.from_scheduler(parts.scheduler)), parts)

    def encode(self, prompt: str) -> Conditioning:
        assert self.denoiser.sample_size is not None
        return self.denoiser.encode(prompt, self.parts, 8 * self.denoiser.sample_size)

    def end_token(self, prompt: str) -> int:
        """The place of the prompt's end token."""
        tokenizer = self.parts.tokenizers[0]
        return len(tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids) - 1


def maps_of(case: Case, now: Model, earlier: Model) -> dict[str, np.ndarray]:
    """Sample one case up to the last step and look there. Returns every signal's map, ``(h, w)``."""
    denoiser, unconditional, conditioning = now.denoiser, now.encode(""), now.encode(case.prompt)
    probe = Probe(case.prompt, seed=case.seed, name=case.name)
    prepared, scheduler, side = (
        PreparedProbe(probe, conditioning, None, None),
        now.parts.scheduler,
        denoiser.sample_size,
    )
    assert side is not None
    view, _ = prompt_view(prepared, unconditional, denoiser, scheduler, CONFIG.sampling, CONFIG.levels.draws, side)

    def look(model: Model, conditioning: Conditioning) -> Measurement:
        return measure(model.denoiser, replace(view, conditioning=conditioning), CONFIG.curvature, CONFIG.seed)

    observation = Observation(
        probe,
        view.timesteps,
        now=look(now, conditioning),
        unconditional=look(now, unconditional),
        baseline=look(earlier, earlier.encode(case.prompt)),
    )
    signals = Signals.of(observation, CONFIG.signals.smooth)
    x_t: Tensor = view.noisy_latents[0, 0]
    timestep = view.timesteps[0]
    _, sigma = denoiser.schedule.alpha_sigma(torch.tensor([timestep]), torch.ones(1, dtype=torch.float64))
    maps = paper_maps(signals, x_t.shape[0], float(sigma))
    maps["bright_ending"] = bright_ending(denoiser, x_t, timestep, conditioning, now.end_token(case.prompt))
    return maps | {"all_ones": np.ones(maps["raw_curvature"].shape)}


def measure_all(cases: list[Case], now: str, earlier: str, output_dir: Path, state: PartialState) -> list[str]:
    """Write ``maps/SIGNAL/NAME.npy`` and ``masks/NAME.png`` of this rank's share of the cases.

    A case whose maps are all there is not measured again.

    Returns:
        A message for each case that failed.
    """

    def map_file(name: str, case: Case) -> Path:
        return output_dir / "maps" / name / f"{case.name}.npy"

    mine = cases[state.process_index :: state.num_processes]
    waiting = [case for case in mine if not all(map_file(name, case).is_file() for name in PAPER)]
    failed: list[str] = []
    if waiting:
        models = Model.load(now, state.device), Model.load(earlier, state.device)
    for case in tqdm(waiting, desc="reproduce_paper", unit="image", disable=not state.is_main_process):
        try:
            maps = maps_of(case, *models)
        except RuntimeError as error:  # out of memory, for one
            failed.append(f"{case.name}: {error}")
            continue
        for name, values in maps.items():
            file = map_file(name, case)
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, values)
    (output_dir / "masks").mkdir(parents=True, exist_ok=True)
    for case in mine:
        if case.mask is not None:
            Image.fromarray(case.mask.astype(np.uint8) * 255).save(output_dir / "masks" / f"{case.name}.png")
    return failed


def evaluate_all(output_dir: Path) -> tuple[dict[str, Any], list[str]]:
    """Evaluate every signal as ``evaluate.py`` does. Returns the results by name, and what was left out."""
    results, problems = {}, []
    for name in PAPER:
        samples, left_out = read_folders(output_dir / "maps" / name, output_dir / "masks")
        results[name] = evaluate_sets(samples)
        problems += [f"{name}: {problem}" for problem in left_out]
    return results, problems


def table(results: dict[str, Any], *, comparable: bool) -> str:
    """Our numbers beside the paper's: localization on the template cases, detection of all memorized ones.

    Args:
        comparable: whether the models are those of the paper; where they are not, the table says so.
    """
    head = f"{'signal':<26}{'IoU':>7}{'paper':>8}{'AUC':>9}{'paper':>8}{'TPR@1%':>9}{'paper':>8}"
    lines = [head] if comparable else [f"the paper's numbers are of SD v1.4, these are not: no comparison\n{head}"]
    for name, (iou, auc, tpr) in PAPER.items():
        r = results[name]
        ours = (r.get("template", r)["oracle"]["iou"], r["auc"], r["tpr_at_1_fpr"])
        pairs = zip((7, 9, 9), ours, (iou, auc, tpr), strict=True)
        lines.append(f"{name:<26}" + "".join(f"{shown(o):>{width}}{shown(p):>8}" for width, o, p in pairs))
    return "\n".join(lines)


def shown(number: float | None) -> str:
    return "-" if number is None else f"{number:.3f}"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 when some cases failed, 2 when nothing could be done for the one reason given."""
    try:
        return reproduce(parse_args(argv), PartialState())
    except (ValueError, OSError) as error:
        print(f"reproduce_paper: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def reproduce(args: argparse.Namespace, state: PartialState) -> int:
    """Measure on every rank; evaluate, print and write on the main one. Returns the exit code."""
    started = time.perf_counter()
    now, earlier = args.model or MODELS[args.model_version][0], args.earlier or MODELS[args.model_version][1]
    with state.main_process_first():  # one process makes or downloads, the others find it there
        if args.smoke:
            from evidence.planted import plant

            now, earlier, args.data_dir, args.non_memorized = plant(args.output_dir / "planted", args.model_version)
        args.data_dir = args.data_dir or download()
    cases, problems = memorized(args.data_dir, args.model_version)
    cases += non_memorized(args.non_memorized) if args.non_memorized else []
    failed = measure_all(cases[: args.limit], str(now), str(earlier), args.output_dir, state)
    for message in failed:
        print(f"failed: {message}", file=sys.stderr)
    state.wait_for_everyone()
    if not state.is_main_process:
        return 1 if failed or problems else 0
    results, left_out = evaluate_all(args.output_dir)
    own = args.model_version == "sdv1" and not (args.smoke or args.model or args.earlier)
    text = table(results, comparable=own)
    write(args.output_dir, text, {"model": str(now), "earlier": str(earlier), "smoke": args.smoke, "signals": results})
    counts = ", ".join(f"{number} {kind}" for kind, number in results["all_ones"]["num_maps"].items())
    smoke = "; SMOKE: tiny-sd, planted templates" if args.smoke else ""
    print(f"\n{text}\n\n{counts}{smoke}; {time.perf_counter() - started:.0f} s")
    for message in [*problems, *left_out]:
        print(f"left out: {message}", file=sys.stderr)
    return 1 if failed or problems or left_out else 0


def write(output_dir: Path, text: str, result: dict[str, Any]) -> None:
    """Write ``table.txt``, and ``result.json`` with the paper's numbers beside ours."""
    paper = {name: dict(zip(("iou", "auc", "tpr_at_1_fpr"), numbers, strict=True)) for name, numbers in PAPER.items()}
    (output_dir / "result.json").write_text(json.dumps(result | {"paper": paper}, indent=2) + "\n", encoding="utf-8")
    (output_dir / "table.txt").write_text(text + "\n", encoding="utf-8")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_version", choices=list(MODELS), default="sdv1", help="which models, and the prompts they memorized")
    add("--model", help="folder or hub id of a pipeline, instead of the version's")
    add("--earlier", help="the same for the earlier model")
    add("--data_dir", type=Path, help="folder of the data set, instead of the hub's")
    add("--non_memorized", type=Path, help="text file of prompts that are not memorized, one per line")
    add("--output_dir", type=Path, default=Path("runs/reproduce_paper"))
    add("--limit", type=int, help="how many images to generate at most")
    add("--smoke", action="store_true", help="tiny-sd with planted templates instead of real models")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
