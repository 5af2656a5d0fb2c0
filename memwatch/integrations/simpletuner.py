"""memwatch in SimpleTuner: as its custom tracker, or after each of its checkpoints.

**As a tracker** memwatch looks at the model in the training process. Put this file into SimpleTuner's own
``simpletuner/custom-trackers/`` as ``memwatch_tracker.py``, and pass ``--report_to=custom-tracker
--custom_tracker=memwatch_tracker``::

    from memwatch.integrations.simpletuner import SimpleTunerTracker


    class Tracker(SimpleTunerTracker):
        settings = "memwatch.yaml"  # memwatch's settings, ``probes`` and ``controls`` among them

- It works with one process, on full models and on PEFT's LoRA (``lora_type: standard``), without ControlNet.
- The baseline is taken before the first step, and an event every so many steps. At a stop ``max_train_steps`` becomes
  the step that has just been done: SimpleTuner leaves its loop, and saves the model as at any other end.
- SimpleTuner takes one name for ``--report_to``, so there are no dashboards beside. Pictures and the report page are in
  ``memwatch`` inside its ``output_dir``, unless the settings say otherwise.
- SimpleTuner has unloaded its autoencoder and text encoders by then. memwatch loads its own from
  ``pretrained_model_name_or_path``; name another pipeline by ``pretrained = ...`` in the class, where that is a single
  file.
- Checkpoints keep memwatch's state, and ``resume_from_checkpoint`` goes on from it.
- SimpleTuner catches what a tracker raises, logs it and goes on. What is wrong with the settings ends the program.
- Not there: LyCORIS, ``weights: ema``, ``rollback``.

**After each checkpoint** ``memwatch scan`` looks at all checkpoints that are there; what it has measured it keeps. That
works with any number of processes. Pass, in one line::

    --post_checkpoint_script="python -m memwatch.integrations.simpletuner --checkpoint {local_checkpoint_path}
        --pretrained BASE --images train/ --controls heldout/ --config memwatch.yaml"

- Whatever this command does not know itself goes to ``memwatch scan``. ``--output`` is ``memwatch`` beside the
  checkpoints, and a LoRA is compared with its base, unless that is passed.
- When a stop is decided, by the same rule as in training, its reason is written to ``STOP`` beside the checkpoints.
  SimpleTuner reads no such file: ``--stop-training`` interrupts it, as Ctrl-C does, and the checkpoint is what is left.
- It runs beside training. ``--device cpu``, or the number of another GPU, keeps its memory from the model's.
- SimpleTuner starts up to two scripts at once; they wait for each other.
- Without ``checkpoints_total_limit`` the history is whole. Checkpoints that are deleted vanish from it.
- Its exit code is the scan's, or 3 when a stop is decided; SimpleTuner logs any other than 0 as a failed script.

Read against commit bc8e6ab7 (August 2026); both ways were tried on a miniature of it only.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from filelock import FileLock

from memwatch.callback import MemWatch
from memwatch.config import MemWatchConfig, StopConfig
from memwatch.config_file import load_config
from memwatch.integrations.runner import read_settings, refuse, watch_or_refuse
from memwatch.integrations.tracker import MemWatchTracker
from memwatch.judge.stop import EXIT_CODE, StopState, decide_stop
from memwatch.report.history import HISTORY, Event, Run
from memwatch.resume import FIRST, load
from memwatch.run_folder import write_whole
from memwatch.scan.checkpoints import lora_file

logger = logging.getLogger("memwatch")

TRAINER, FOLDER, STOP = "SimpleTuner", "memwatch", "STOP"
STATE = "simpletuner.helpers.training.state_tracker"  # where SimpleTuner keeps what it trains
OF_A_LAUNCH = re.compile(
    r"((LOCAL|GROUP|ROLE|NODE)_)?RANK|((LOCAL|GROUP|ROLE)_)?WORLD_SIZE|ROLE_NAME|MASTER_(ADDR|PORT)"
    r"|(TORCHELASTIC|ACCELERATE|FSDP)_.*"
)


# --- in training -----------------------------------------------------------------------------------------------------


class SimpleTunerTracker(MemWatchTracker):
    """Watches what SimpleTuner trains; derive from it in ``custom-trackers``, see above.

    Attributes:
        settings: YAML file of memwatch's settings. pretrained: pipeline that parts are loaded from; ``None`` takes the
            one that is trained.

    Raises:
        SystemExit: settings that cannot be used; when SimpleTuner starts, or before its first step.
    """

    settings: str | None = None
    pretrained: str | None = None

    def __init__(self, run_name: str, logging_dir: str | None = None) -> None:
        super().__init__(self._made)
        self._theirs = importlib.import_module(STATE).StateTracker
        self._step: int | None = None
        if self.settings is None:
            refuse('the tracker\'s class names no settings; write settings = "memwatch.yaml" into it')
        self._config = read_settings(self.settings, TRAINER)
        if (count := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
            why = "trackers live on the main one; use --post_checkpoint_script"
            refuse(f"the tracker works with one process, not {count}: {why} (see memwatch.integrations.simpletuner)")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """SimpleTuner calls this once the model is prepared, and again as training begins.

        It saves before it logs, so that the event of a checkpoint's own step is made up for after a resume.
        """
        if self.watch is None:
            self.watch = self._made()
        else:
            self.watch.begin(self._resumed)
            self.watch.on_step_end(self._resumed)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """After every optimizer step; more than once, because accelerate adds the tracker at every initialization."""
        if self.watch is None or step is None or step == self._step:
            return
        self._step = step
        self.watch.on_step_end(step)
        if self.watch.should_stop:
            logger.warning("memwatch stops training after step %d (%s)", step, self.watch.stop_reason)
            for settings in (self._theirs.get_args(), self._theirs.get_model().config):
                settings.max_train_steps = step

    @property
    def _resumed(self) -> int:
        """The step that training goes on from."""
        return int(self._theirs.get_global_resume_step() or 0)

    def _made(self) -> MemWatch:
        theirs, args = self._theirs.get_model(), self._theirs.get_args()
        if "lora" in args.model_type and str(args.lora_type).lower() != "standard":
            refuse(f"--lora_type: got {args.lora_type}, allowed: standard, or use --post_checkpoint_script")
        if getattr(args, "controlnet", False):
            refuse("--controlnet is set, and memwatch looks at denoisers only")
        given: dict[str, Any] = {"scheduler": theirs.noise_schedule}
        if getattr(args, "train_text_encoder", False):
            given |= {"text_encoder": list(theirs.text_encoders), "tokenizer": list(theirs.tokenizers)}
        changes: dict[str, Any] = {"max_train_steps": self._config.max_train_steps or args.max_train_steps or None}
        if self._config.output_dir == MemWatchConfig().output_dir:
            changes["output_dir"] = str(Path(args.output_dir) / FOLDER)
        watch = watch_or_refuse(
            self._theirs.get_accelerator(),
            theirs.get_trained_component(unwrap_model=False),
            self.pretrained or args.pretrained_model_name_or_path,
            config=replace(self._config, **changes),
            **given,
        )
        watch.observer.limit_batches(args.train_batch_size)
        if self._resumed:
            load(watch, Path(args.output_dir) / f"checkpoint-{self._resumed}" / FIRST)
        return watch


# --- after a checkpoint ----------------------------------------------------------------------------------------------


def stop_reason(events: Sequence[Event], rule: StopConfig) -> str | None:
    """Why training would have been stopped at these events; ``None`` where it would not have been."""

    def after(state: StopState, event: Event) -> StopState:
        findings: list[Any] = [
            SimpleNamespace(**vars(row), proof=row.copied and SimpleNamespace(copied=any(row.copied["is_copy"])))
            for row in event.rows
        ]
        return decide_stop(state, findings, event.step, rule)

    return reduce(after, events, StopState()).reason


def environment(device: str | None, inherited: Mapping[str, str]) -> dict[str, str]:
    """For the scan: without what ``accelerate launch`` told the training process, whose ranks it would wait for.

    Args:
        device: ``cpu``, or numbers of GPUs; ``None`` keeps what training sees.
    """
    own = {key: value for key, value in inherited.items() if not OF_A_LAUNCH.fullmatch(key)}
    if device is None:
        return own
    is_cpu = device == "cpu"
    return own | {"CUDA_VISIBLE_DEVICES": "" if is_cpu else device, "ACCELERATE_USE_CPU": str(is_cpu).lower()}


def scan(checkpoint: Path, output: Path, options: Sequence[str], device: str | None) -> int:
    """``memwatch scan`` over the folder of a checkpoint, one at a time; its exit code."""
    asks = any(option.partition("=")[0] == "--baseline" for option in options)
    baseline = [] if asks or lora_file(str(checkpoint)) is None else ["--baseline", "base"]
    command = [sys.executable, "-m", "memwatch", "scan", str(checkpoint.parent), "--output", str(output)]
    output.mkdir(parents=True, exist_ok=True)
    with FileLock(output / "scan.lock"):
        return subprocess.run([*command, *baseline, *options], env=environment(device, os.environ)).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: those of ``memwatch scan``; 3 when a stop is decided."""
    parser = argparse.ArgumentParser(prog="python -m memwatch.integrations.simpletuner", allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="{local_checkpoint_path}")
    add("--config", metavar="FILE", help="settings as for training (YAML)")
    add("--output", type=Path, metavar="DIR", help="default: memwatch beside the checkpoint")
    add("--device", metavar="cpu|GPU", help="where to look; default: where training is")
    add("--stop-training", action="store_true", help="interrupt SimpleTuner when a stop is decided")
    args, options = parser.parse_known_args(argv)
    if not re.fullmatch(r"checkpoint-\d+", args.checkpoint.name):
        print(f"memwatch: {args.checkpoint} is no checkpoint-N, so it is not looked at", file=sys.stderr)
        return 0
    try:
        rule = load_config(args.config).stop
        output = args.output or args.checkpoint.parent / FOLDER
        options = [*options, "--config", args.config] if args.config else options
        code = scan(args.checkpoint, output, options, args.device)
        reason = stop_reason(Run.read(output).events, rule) if code < 2 and (output / HISTORY).is_file() else None
        if reason is None:
            return code
        if not (file := args.checkpoint.parent / STOP).exists():
            write_whole(file, f"{reason}\n")
    except (ValueError, OSError) as error:
        print(f"memwatch: {error}", file=sys.stderr)
        return 2
    print(f"memwatch would stop training: {reason}", file=sys.stderr)
    if args.stop_training:
        os.kill(os.getppid(), signal.SIGINT)
    return EXIT_CODE


if __name__ == "__main__":
    sys.exit(main())
