"""What the command line of ``memwatch scan`` says: settings, probes and controls."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from PIL import Image

from memwatch.config import MemWatchConfig
from memwatch.config_file import load_config
from memwatch.measure.probes import Probe, as_probes
from memwatch.picking.for_run import refuse_trained_on
from memwatch.picking.pick import pick
from memwatch.picking.picked import Picked
from memwatch.scan.checkpoints import Form, form_of

logger = logging.getLogger("memwatch")


def require_option(holds: bool, option: str, value: object, allowed: str) -> None:
    """Raise a ``ValueError`` that names a command-line option, unless ``holds``."""
    if not holds:
        raise ValueError(f"{option}: got {value!r}, allowed: {allowed}")


def check(args: argparse.Namespace) -> None:
    """Refuse options that do not go together, and fill in where the output goes."""
    require_option(args.poll > 0, "--poll", args.poll, "greater than 0")
    require_option(args.idle is None or args.idle > 0, "--idle", args.idle, "greater than 0")
    for option in ("idle", "keep_going", "webhook"):
        value, name = getattr(args, option), f"--{option.replace('_', '-')}"
        require_option(args.follow or not value, name, value, "with --follow only")
    model = Path(args.model)
    require_option(not args.follow or not model.is_file(), "MODEL", args.model, "a folder, with --follow")
    args.output = args.output or (str(model / "memwatch") if args.follow else "memwatch-scan")


# --- settings ---------------------------------------------------------------------------------------------------------


def settings(args: argparse.Namespace, *, is_history: bool) -> MemWatchConfig:
    """The configuration with what the command line says; one event alone needs no patience.

    What fails in a scan ends it; beside a training it costs that part alone.
    """
    source = presets().get(args.preset) if args.preset else args.config
    require_option(source is not None or not args.preset, "--preset", args.preset, ", ".join(sorted(presets())))
    config = load_config(source)
    baseline = args.baseline or _default_baseline(config, is_history, form_of(args.model)[0] is Form.LORA)
    name = baseline.partition(":")[0]
    within = name in ("first", "previous", "lag", "last_clean")
    allowed = "an earlier model, unconditional or base; this one needs a folder of checkpoints"
    require_option(is_history or not within, "--baseline", baseline, allowed)
    signals = {"baseline": baseline if within or name in ("base", "path") else f"path:{baseline}"}
    if baseline == "unconditional":
        signals = {"terms": "variance", "against": "unconditional"}
    alerts: dict[str, Any] = {} if is_history else {"patience": 1}
    alerts |= {"webhook": args.webhook} if args.webhook else {}
    stop = {} if args.follow else {"enabled": False}  # finished models cannot be stopped
    given = {"output_dir": args.output, "strict": not args.follow}
    return load_config(config, **given, signals=signals, alerts=alerts, stop=stop)


def _default_baseline(config: MemWatchConfig, is_history: bool, is_lora: bool) -> str:
    """The configured one, where that makes sense without a loop; the base for a LoRA."""
    if config.signals.against == "unconditional":
        return "unconditional"
    if is_history or config.signals.baseline_is_fixed:
        return config.signals.baseline
    if is_lora:
        return "base"
    raise ValueError("--baseline: missing, allowed: an earlier model, unconditional, or base (LoRA off)")


def presets() -> dict[str, Path]:
    """Configurations that come with memwatch, by name: inside the installed package, or beside it in a clone."""
    package = Path(__file__).resolve().parents[1]
    folder = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), package)
    return {file.stem: file for file in folder.glob("*.yaml")}


# --- probes -----------------------------------------------------------------------------------------------------------


def probes_of(
    args: argparse.Namespace, config: MemWatchConfig, problems: list[str]
) -> tuple[list[Probe], list[Probe], Picked | None]:
    """Probes, controls, and what was picked from ``--dataset``; what cannot be read is added to ``problems``.

    A trainer trains on all images of its dataset, so none of them is a control.

    Raises:
        ValueError: there is no probe, the dataset cannot be read, or a control shows one of its images.
    """
    controls = _readable(args.controls, config.seed, problems)
    probes = [*_readable(args.prompts, config.seed, problems), *_readable(args.images, config.seed, problems)]
    picked = None
    if args.dataset:
        picked = pick(args.dataset, controls=0, seed=config.seed)
        refuse_trained_on(controls, picked)
        if not controls:
            why = "the trainer uses all of %s, so memwatch cannot take controls from it"
            how = "'memwatch pick TRAIN --out WATCH' sets some aside before a training, and --controls names them"
            logger.warning(f"{why}; %s", args.dataset, how)
        probes += picked.probes()
    if not probes:
        what = "nothing to look at; pass --prompts FILE, --images DIR or --dataset DIR"
        raise ValueError("; ".join([what, *problems]))
    return probes, controls, picked


def _readable(source: str | None, seed: int, problems: list[str]) -> list[Probe]:
    """Probes of a source whose image can be read; the others are added to ``problems``."""
    good = []
    for probe in as_probes(source, seed=seed):
        try:
            if isinstance(probe.image, str | Path):
                Image.open(probe.image).convert("RGB").close()
            good.append(probe)
        except Exception as error:  # PIL has its own for broken and huge files
            problems.append(f"{probe.name}: cannot read image {probe.image}: {error}")
    return good
