"""``memwatch scan MODEL``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from memwatch.act.alerts import WebhookSink
from memwatch.act.flagged import FlaggedSink
from memwatch.cli.scan_options import check, presets, probes_of, require_option, settings
from memwatch.config import MemWatchConfig
from memwatch.judge.stop import EXIT_CODE
from memwatch.ranks import Ranks
from memwatch.report.page import PAGE
from memwatch.report.sinks import Sink
from memwatch.report.text import SHOWN, summary
from memwatch.run_folder import RunFolder
from memwatch.scan.checkpoints import is_pipeline
from memwatch.scan.follow import Follow
from memwatch.scan.safetensors_files import reading
from memwatch.scan.scan import Scan
from memwatch.scan.trainer_folder import Checkpoint, checkpoints_in

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
    add(
        "--baseline", metavar="EARLIER", help=help_ + "lag:N, last_clean (default: first for a folder, base for a LoRA)"
    )
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
    config = settings(args, is_history=args.follow or bool(history))
    is_one_pipeline = not args.follow and not history and is_pipeline(args.model)
    pretrained = args.pretrained or (args.model if is_one_pipeline else None)
    if pretrained is None:
        why = f"{args.model} is no pipeline, so text encoder, VAE and scheduler must come from one"
        raise ValueError(f"--pretrained: missing; {why}")
    problems: list[str] = []
    probes, controls, picked = probes_of(args, config, problems)
    accelerator = Accelerator(log_with=args.report_to, project_dir=config.output_dir)
    if args.report_to:
        accelerator.init_trackers("memwatch-scan")

    def open_scan(checkpoints: Sequence[Checkpoint], **beside: Any) -> Scan:
        watched: dict[str, Any] = {"probes": probes, "controls": controls or None}
        return Scan(accelerator, checkpoints, pretrained, config=config, **watched, **beside)

    if args.follow:
        more: list[Sink] = [FlaggedSink(Path(config.output_dir), picked)] if picked is not None else []
        return follow(args, config, accelerator, open_scan, more, problems)
    scan = open_scan(history or [Checkpoint.of(step_of(args.model), args.model)])
    report = scan.run()
    problems += [f"step {step}, {name}: {why}" for step, name, why in scan.failed]
    if accelerator.is_main_process:
        if report is not None and len(report.findings) > SHOWN:  # the console has shown the worst few
            everything = len(report.findings)
            print(summary(report.to_event(), report.about, shown=everything))
        tell(problems, config.output_dir)
    accelerator.end_training()
    return 2 if report is None or not report.findings else 1 if problems else 0


def follow(
    args: argparse.Namespace,
    config: MemWatchConfig,
    accelerator: Any,
    open_scan: Callable[..., Scan],
    more: list[Sink],
    problems: list[str],
) -> int:
    """Follow the folder; the exit code."""
    from diffusers import DiffusionPipeline

    folder, main = Path(args.model), accelerator.is_main_process
    if config.alerts.webhook is not None and main:
        more = [*more, WebhookSink(config.alerts.webhook, folder.name)]
    with reading(args.pretrained):  # fails now, not at the first checkpoint
        DiffusionPipeline.load_config(args.pretrained)
    lock = RunFolder(Path(config.output_dir))

    def open_with(first: Checkpoint) -> Scan:
        lock.release()  # a first checkpoint that cannot be read is tried again
        free = Ranks.of(accelerator).broadcast(not main or lock.lock())
        require_option(free, "--output", config.output_dir, "a folder that no other live run uses")
        return open_scan([first], more=more)

    idle = None if args.idle is None else 60 * args.idle
    base = Checkpoint.of(0, args.pretrained)
    given = {"base": base, "poll": args.poll, "idle": idle, "keep_going": args.keep_going}
    following = Follow(accelerator, folder, open_with, **given)
    try:
        following.run()
    finally:
        lock.release()
    problems += [f"step {step}, {name}: {why}" for step, name, why in following.failed]
    nothing = following.scan is None or following.scan.progress.last_step is None
    if main:
        tell(problems, None if nothing else config.output_dir)
    accelerator.end_training()
    return EXIT_CODE if following.stop_reason is not None else 2 if nothing else 1 if problems else 0


def tell(problems: Sequence[str], output: str | None) -> None:
    """What was skipped, and where everything else is."""
    print("".join(f"skipped: {problem}\n" for problem in problems), end="", file=sys.stderr)
    if output is not None:
        print(f"history, maps and pictures: {output}")
        print(f"report: {Path(output) / PAGE}")


def step_of(model: str) -> int:
    """N of ``checkpoint-N``, else 0."""
    name, _, number = Path(model).name.rpartition("-")
    return int(number) if name == "checkpoint" and number.isdecimal() else 0
