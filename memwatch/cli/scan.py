"""``memwatch scan MODEL``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image

from memwatch.config import MemWatchConfig
from memwatch.config_file import load_config
from memwatch.measure.probes import Probe, as_probes
from memwatch.report.page import PAGE
from memwatch.report.report import Report
from memwatch.scan.checkpoints import is_pipeline, lora_file, numbered
from memwatch.scan.scan import Checkpoint, Scan

EPILOG = """\
MODEL and EARLIER: a diffusers pipeline (folder or hub id), a checkpoint with unet/ or transformer/ inside, a LoRA file
or folder, or safetensors named as the model's parameters. A folder of checkpoint-N folders gives a history; the
earliest is the first baseline. Several GPUs: accelerate launch -m memwatch scan ...  A scan that was cut off goes on
when started again. Exit code: 0 all done, 1 some probes or checkpoints failed (they are named), 2 nothing done.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Look for what finished checkpoints have stored: the same reports, pictures and history as in training."
    )
    parser.epilog = EPILOG
    add = parser.add_argument
    add("model", metavar="MODEL", help="the model, or a folder of checkpoint-N folders")
    help_ = "compared with: another model, 'unconditional', or 'base' (LoRA off); for a folder also first, previous, "
    add(
        "--baseline", metavar="EARLIER", help=help_ + "lag:N, last_clean (default: first for a folder, base for a LoRA)"
    )
    add("--prompts", metavar="FILE", help="one prompt per line: what the model generates from them")
    add("--images", metavar="DIR", help="training images with metadata.jsonl, or NAME.txt beside NAME.png")
    help_ = "prompts or images of the same kind, held out from training; without them nothing is calibrated"
    add("--controls", metavar="FILE|DIR", help=help_)
    help_ = "text encoder, VAE, scheduler and the base of a LoRA; default: MODEL, when it is a pipeline"
    add("--pretrained", metavar="PIPELINE", help=help_)
    settings = parser.add_mutually_exclusive_group()
    settings.add_argument("--config", metavar="FILE", help="settings as for training (YAML)")
    settings.add_argument("--preset", metavar="NAME", help="one of memwatch's own: " + ", ".join(sorted(presets())))
    add("--output", metavar="DIR", default="memwatch-scan", help="default: %(default)s")
    add("--report-to", metavar="NAME", help="tensorboard, wandb or another accelerate tracker, beside the files")


def run(args: argparse.Namespace) -> int:
    history = numbered(Path(args.model)) if Path(args.model).is_dir() else []
    checkpoints = [Checkpoint(step, str(path)) for step, path in history]
    checkpoints = checkpoints or [Checkpoint(step_of(args.model), args.model)]
    config = settings(args, is_history=bool(history))
    pretrained = args.pretrained or (args.model if not history and is_pipeline(args.model) else None)
    if pretrained is None:
        why = f"{args.model} is no pipeline, so text encoder, VAE and scheduler must come from one"
        raise ValueError(f"--pretrained: missing; {why}")
    problems: list[str] = []
    probes = [*usable(args.prompts, config.seed, problems), *usable(args.images, config.seed, problems)]
    if not probes:
        raise ValueError("; ".join(["nothing to look at; pass --prompts FILE or --images DIR", *problems]))
    controls = usable(args.controls, config.seed, problems)

    accelerator = Accelerator(log_with=args.report_to, project_dir=args.output)
    if args.report_to:
        accelerator.init_trackers("memwatch-scan")
    held_out = as_probes(controls) if controls else None
    scan = Scan(accelerator, checkpoints, pretrained, config=config, probes=as_probes(probes), controls=held_out)
    report = scan.run()
    problems += [f"step {step}, {name}: {why}" for step, name, why in scan.failed]
    if accelerator.is_main_process:
        if report is not None:
            print(findings_table(report))
        print("".join(f"skipped: {problem}\n" for problem in problems), end="", file=sys.stderr)
        print(f"history, maps and pictures: {args.output}")
        print(f"report: {Path(args.output) / PAGE}")
    accelerator.end_training()
    return 2 if report is None or not report.findings else 1 if problems else 0


def settings(args: argparse.Namespace, *, is_history: bool) -> MemWatchConfig:
    """The configuration with what the command line says about the baseline; one look at one model needs no patience."""
    source = presets().get(args.preset) if args.preset else args.config
    require_option(source is not None or not args.preset, "--preset", args.preset, ", ".join(sorted(presets())))
    config = load_config(source)
    baseline = args.baseline or default_baseline(config, is_history, lora_file(args.model) is not None)
    name = baseline.partition(":")[0]
    within = name in ("first", "previous", "lag", "last_clean")
    allowed = "an earlier model, unconditional or base; this one needs a folder of checkpoints"
    require_option(is_history or not within, "--baseline", baseline, allowed)
    overrides: dict[str, Any] = {"output_dir": args.output, "strict": True}
    if baseline == "unconditional":
        branch = {"unconditional": True}
        overrides["signals"] = {"terms": "variance", "against": "unconditional", **branch}
    else:
        overrides["signals"] = {"baseline": baseline if within or name in ("base", "path") else f"path:{baseline}"}
    if not is_history:
        overrides["alerts"] = {"patience": 1}
    return load_config(config, **overrides)


def default_baseline(config: MemWatchConfig, is_history: bool, is_lora: bool) -> str:
    """What the configuration says, where that makes sense without a loop; the base for a LoRA."""
    configured = config.signals.baseline
    if config.signals.against == "unconditional":
        return "unconditional"
    if is_history or config.signals.baseline_is_fixed:
        return configured
    if is_lora:
        return "base"
    raise ValueError("--baseline: missing, allowed: an earlier model, unconditional, or base (LoRA off)")


def require_option(holds: bool, option: str, value: object, allowed: str) -> None:
    """Raise a ``ValueError`` that names a command-line option, unless ``holds``."""
    if not holds:
        raise ValueError(f"{option}: got {value!r}, allowed: {allowed}")


def presets() -> dict[str, Path]:
    """Configurations that come with memwatch, by name: inside the installed package, or beside it in a clone."""
    package = Path(__file__).resolve().parents[1]
    folder = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), package)
    return {file.stem: file for file in folder.glob("*.yaml")}


def step_of(model: str) -> int:
    """N of ``checkpoint-N``, else 0."""
    name, _, number = Path(model).name.rpartition("-")
    return int(number) if name == "checkpoint" and number.isdecimal() else 0


def usable(source: str | None, seed: int, problems: list[str]) -> list[Probe]:
    """Probes of a source whose image can be read; the others are added to ``problems``."""
    good = []
    for probe in as_probes(source, seed=seed):
        try:
            if isinstance(probe.image, str | Path):
                Image.open(probe.image).convert("RGB").close()
            good.append(probe)
        except (OSError, SyntaxError, ValueError) as error:
            problems.append(f"{probe.name}: cannot read image {probe.image}: {error}")
    return good


def findings_table(report: Report) -> str:
    """One line per probe, the strongest first."""
    lines = [f"{'probe':<40}{'verdict':<14}{'severity':>9}{'p':>8}{'area':>7}"]
    for f in sorted(report.findings, key=lambda f: f.severity, reverse=True):
        p, area = "-" if f.p is None else f"{f.p:.3f}", sum(region.area for region in f.regions)
        lines.append(f"{f.name[:38]:<40}{f.verdict:<14}{f.severity:>8.1f}x{p:>8}{area:>7.0%}")
    return "\n".join(lines)
