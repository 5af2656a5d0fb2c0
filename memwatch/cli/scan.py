"""``memwatch scan MODEL``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image

from memwatch.act.alerts import WebhookSink
from memwatch.act.flagged import FlaggedSink
from memwatch.act.stop import EXIT_CODE
from memwatch.cli import require_option
from memwatch.config import MemWatchConfig
from memwatch.config_file import load_config
from memwatch.measure.probes import Probe, as_probes
from memwatch.picking.for_run import refuse_trained_on
from memwatch.picking.pick import pick
from memwatch.picking.picked import Picked
from memwatch.ranks import Ranks
from memwatch.report.page import PAGE
from memwatch.report.sinks import Sink
from memwatch.report.text import SHOWN, summary
from memwatch.run_folder import RunFolder
from memwatch.scan.checkpoints import Form, form_of, is_pipeline
from memwatch.scan.follow import Follow
from memwatch.scan.scan import Scan
from memwatch.scan.trainer_folder import Checkpoint, checkpoints_in
from memwatch.scan.weight_files import reading

logger = logging.getLogger("memwatch")

EPILOG = f"""\
MODEL and EARLIER: a diffusers pipeline (folder or hub id), a checkpoint with unet/ or transformer/ inside, a LoRA of
any trainer (file or folder), a full checkpoint in one file, or safetensors named as the model's parameters. A folder of
checkpoints gives a history; the earliest is the first baseline. Several GPUs: accelerate launch -m memwatch scan ...
A scan that was cut off goes on when started again.

--follow works beside every trainer that saves: it looks at the checkpoints of a folder as they appear, renews the
report page after each, and writes STOP into the folder once an event decides to stop, by the rule of 'stop' in the
configuration. Step 0 of the history is --pretrained, with the LoRA off. It needs memory for one more model beside the
trainer's, on the same GPU unless CUDA_VISIBLE_DEVICES names another; ACCELERATE_USE_CPU=true takes none of it. Images
of a trainer's own dataset were all trained on, so that controls come from --controls alone; 'memwatch pick' sets some
aside before the training.

Exit code: 0 all done; 1 some probes or checkpoints failed (they are named); 2 nothing done; {EXIT_CODE} with --follow
a stop was decided. It is the same however the waiting ended: at the stop, by --idle or by Ctrl-C.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Look for what finished checkpoints have stored: the same reports, pictures and history as in training."
    )
    parser.epilog = EPILOG
    add = parser.add_argument
    add("model", metavar="MODEL", help="the model, or a folder of checkpoints")
    help_ = "compared with: another model, 'unconditional', or 'base' (LoRA off); for a folder also first, previous, "
    help_ += "lag:N, last_clean (default: first for a folder, base for a LoRA)"
    add("--baseline", metavar="EARLIER", help=help_)
    add("--prompts", metavar="FILE", help="one prompt per line: what the model generates from them")
    add("--images", metavar="DIR", help="training images with metadata.jsonl, or NAME.txt beside NAME.png")
    add("--dataset", metavar="DIR", help="the training images, of which memwatch picks some to look at")
    help_ = "prompts or images of the same kind, held out from training; without them nothing is calibrated"
    add("--controls", metavar="FILE|DIR", help=help_)
    help_ = "text encoder, VAE, scheduler and the base of a LoRA; default: MODEL, when it is a pipeline"
    add("--pretrained", metavar="PIPELINE", help=help_)
    settings = parser.add_mutually_exclusive_group()
    settings.add_argument("--config", metavar="FILE", help="settings as for training (YAML)")
    settings.add_argument("--preset", metavar="NAME", help="one of memwatch's own: " + ", ".join(sorted(presets())))
    add("--output", metavar="DIR", help="default: memwatch-scan; with --follow MODEL/memwatch")
    add("--report-to", metavar="NAME", help="tensorboard, wandb or another accelerate tracker, beside the files")
    follow = parser.add_argument_group("beside a training")
    follow.add_argument("--follow", action="store_true", help="look at checkpoints of the folder MODEL as they appear")
    help_ = "between two looks at the folder (default: %(default)s)"
    follow.add_argument("--poll", metavar="SECONDS", type=float, default=10.0, help=help_)
    help_ = "end when nothing new has come for so long (default: wait until Ctrl-C)"
    follow.add_argument("--idle", metavar="MINUTES", type=float, help=help_)
    follow.add_argument("--keep-going", action="store_true", help="go on after a stop was decided")
    help_ = "where alerts are posted as JSON, also for Slack and Discord: a URL, or '$NAME' of an environment variable"
    follow.add_argument("--webhook", metavar="URL", help=help_)


def run(args: argparse.Namespace) -> int:
    check(args)
    history = checkpoints_in(Path(args.model)) if Path(args.model).is_dir() and not args.follow else []
    is_history = args.follow or bool(history)
    config = settings(args, is_history=is_history)
    pretrained = args.pretrained or (args.model if not is_history and is_pipeline(args.model) else None)
    if pretrained is None:
        why = f"{args.model} is no pipeline, so text encoder, VAE and scheduler must come from one"
        raise ValueError(f"--pretrained: missing; {why}")
    probes, controls, picked, problems = probes_of(args, config.seed)
    accelerator = Accelerator(log_with=args.report_to, project_dir=config.output_dir)
    if args.report_to:
        accelerator.init_trackers("memwatch-scan")

    def open_scan(checkpoints: Sequence[Checkpoint], *more: Sink) -> Scan:
        watched: dict[str, Any] = {"probes": probes, "controls": controls or None}
        return Scan(accelerator, checkpoints, pretrained, config=config, **watched, more=more)

    if args.follow:
        following = follow(args, config, accelerator, open_scan, picked)
        failed, scan, reason = following.failed, following.scan, following.stop_reason
        nothing = scan is None or scan.progress.last_step is None
    else:
        name, _, number = Path(args.model).name.rpartition("-")
        step = int(number) if name == "checkpoint" and number.isdecimal() else 0
        scan, reason = open_scan(history or [Checkpoint.of(step, args.model)]), None
        report, failed = scan.run(), scan.failed
        nothing = report is None or not report.findings
        if accelerator.is_main_process and report is not None and len(report.findings) > SHOWN:
            print(summary(report.event, report.about, shown=len(report.findings)))  # the console shows the worst
    problems += [f"step {step}, {name}: {why}" for step, name, why in failed]
    if accelerator.is_main_process:
        print("".join(f"skipped: {problem}\n" for problem in problems), end="", file=sys.stderr)
        if not (args.follow and nothing):
            print(f"history, maps and pictures: {config.output_dir}\nreport: {Path(config.output_dir) / PAGE}")
    accelerator.end_training()
    return EXIT_CODE if reason is not None else 2 if nothing else 1 if problems else 0


def follow(
    args: argparse.Namespace,
    config: MemWatchConfig,
    accelerator: Any,
    open_scan: Callable[..., Scan],
    picked: Picked | None,
) -> Follow:
    """Follow the folder to the end."""
    from diffusers import DiffusionPipeline

    folder, output, main = Path(args.model), Path(config.output_dir), accelerator.is_main_process
    more: list[Sink] = [FlaggedSink(output, picked)] if picked is not None else []
    if config.alerts.webhook is not None and main:
        more.append(WebhookSink(config.alerts.webhook, folder.name))
    with reading(args.pretrained):  # fails now, not at the first checkpoint
        DiffusionPipeline.load_config(args.pretrained)
    lock = RunFolder(output)

    def open_with(first: Checkpoint) -> Scan:
        lock.release()  # a first checkpoint that cannot be read is tried again
        free = Ranks.of(accelerator).broadcast(not main or lock.lock())
        require_option(free, "--output", config.output_dir, "a folder that no other live run uses")
        return open_scan([first], *more)

    idle = None if args.idle is None else 60 * args.idle
    given = {"poll": args.poll, "idle": idle, "keep_going": args.keep_going}
    following = Follow(accelerator, folder, open_with, base=Checkpoint.of(0, args.pretrained), **given)
    try:
        following.run()
    finally:
        lock.release()
    return following


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


def settings(args: argparse.Namespace, *, is_history: bool) -> MemWatchConfig:
    """The configuration with what the command line says."""
    source = presets().get(args.preset) if args.preset else args.config
    require_option(source is not None or not args.preset, "--preset", args.preset, ", ".join(sorted(presets())))
    config = load_config(source)
    signals, baseline = config.signals, args.baseline
    if baseline is None and (signals.against == "unconditional" or is_history or signals.baseline_is_fixed):
        baseline = "unconditional" if signals.against == "unconditional" else signals.baseline
    if baseline is None:
        if form_of(args.model)[0] is not Form.LORA:
            found = "" if Path(args.model).exists() else f"MODEL: no file or folder {args.model} here; for a hub id, "
            allowed = "an earlier model, unconditional, or base (LoRA off)"
            raise ValueError(f"{found}--baseline: missing, allowed: {allowed}")
        baseline = "base"
    name = baseline.partition(":")[0]
    within = name in ("first", "previous", "lag", "last_clean")
    allowed = "an earlier model, unconditional or base; this one needs a folder of checkpoints"
    require_option(is_history or not within, "--baseline", baseline, allowed)
    against = {"baseline": baseline if within or name in ("base", "path") else f"path:{baseline}"}
    if baseline == "unconditional":
        against = {"terms": "variance", "against": "unconditional"}
    alerts = {"webhook": args.webhook} if args.webhook else {}
    stop = {} if args.follow else {"enabled": False}  # finished models cannot be stopped
    given = {"output_dir": args.output, "strict": not args.follow}  # beside a training a failure costs that part alone
    return load_config(config, **given, signals=against, alerts=alerts, stop=stop)


def presets() -> dict[str, Path]:
    """Configurations that come with memwatch, by name: inside the installed package, or beside it in a clone."""
    package = Path(__file__).resolve().parents[1]
    folder = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), package)
    return {file.stem: file for file in folder.glob("*.yaml")}


def probes_of(args: argparse.Namespace, seed: int) -> tuple[list[Probe], list[Probe], Picked | None, list[str]]:
    """Probes, controls, what was picked from ``--dataset``, and what cannot be read.

    A trainer trains on all images of its dataset, so none of them is a control. Without probes it is a ``ValueError``.
    """
    problems: list[str] = []
    controls, *given = (readable(each, seed, problems) for each in (args.controls, args.prompts, args.images))
    probes, picked = [probe for each in given for probe in each], None
    if args.dataset:
        picked = pick(args.dataset, controls=0, seed=seed)
        refuse_trained_on(controls, picked)
        if not controls:
            why = "the trainer uses all of %s, so memwatch cannot take controls from it"
            how = "'memwatch pick TRAIN --out WATCH' sets some aside before a training, and --controls names them"
            logger.warning(f"{why}; %s", args.dataset, how)
        probes += picked.probes()
    if not probes:
        what = "nothing to look at; pass --prompts FILE, --images DIR or --dataset DIR"
        raise ValueError("; ".join([what, *problems]))
    return probes, controls, picked, problems


def readable(source: str | None, seed: int, problems: list[str]) -> list[Probe]:
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
