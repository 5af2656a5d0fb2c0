"""memwatch in OneTrainer, whose files stay as they are: LoRA and fine-tuning of Stable Diffusion 1.5, 2.x and XL.

Run this instead of ``scripts/train.py``, in OneTrainer's folder and with its arguments::

    python -m memwatch.integrations.onetrainer --config-path config.json --memwatch memwatch.yaml

``memwatch.yaml`` holds memwatch's settings, ``probes`` and ``controls`` among them. A configuration is exported by the
UI ("export"). Read at commit 23df3832 (August 2026), and tried on a miniature of it only.

How it works, and what to know:

- The baseline is taken between ``trainer.start()`` and ``trainer.train()``. Then ``on_update_train_progress`` is called
  after every batch: memwatch counts steps as OneTrainer's ``global_step`` does, under gradient accumulation as well.
- ``TrainCallbacks`` swallows every exception. So memwatch logs and counts its failures itself, and is switched off
  after three in a row; with ``strict: true`` the first one stops training and is raised then.
- A stop is ``TrainCommands.stop()``. The final save follows, as after the UI's stop button.
- Its LoRA modules are no part of the UNet, and patch ``train()`` and ``eval()`` of its layers as well as ``forward``.
  ``Patched`` puts both together, so that every mode is given back as it was.
- VAE and text encoders may rest on another device. memwatch has its own copy of the VAE (0.3 GB), and asks for the
  text encoders once, or at every event when they are trained.
- memwatch's state is kept with every backup, in ``output_dir/onetrainer``; ``continue_last_backup`` goes on from it.
- Scalars go to OneTrainer's TensorBoard, pictures to ``output_dir``; its validation losses are on the report page.
- Its concepts read whole folders: controls must lie elsewhere, and nothing is held out from a ``dataset``.
- memwatch looks at the live weights, not at an EMA. Of a schedule-free optimizer it sees those that are trained, not
  the average that is saved.

Not there: other models, inpainting and depth, embeddings that are trained, several GPUs, the cloud, the UI,
``signals.baseline: base``, ``weights: ema``, ``rollback``, ``on_memorized: drop``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from memwatch.callback import MemWatch
from memwatch.config import MemWatchConfig
from memwatch.faults import StrictError
from memwatch.guard import call_before
from memwatch.integrations.onetrainer_model import make_watch
from memwatch.integrations.runner import has_stopped, import_theirs, read_settings, refuse
from memwatch.resume import load, save

logger = logging.getLogger("memwatch")

TRAINER = "OneTrainer"
V2 = [f"STABLE_DIFFUSION_{version}" for version in ("20", "20_BASE", "21", "21_BASE")]
MODELS = ("STABLE_DIFFUSION_15", *V2, "STABLE_DIFFUSION_XL_10_BASE")
METHODS = ("LORA", "FINE_TUNE")
BACKUP = "Creating backup"  # the status that announces one
LOOKING = "looking at the model in OneTrainer"


class Watcher:
    """Watches what a ``GenericTrainer`` trains. ``update`` and ``status`` are its callbacks.

    Attributes:
        watch: ``None`` before ``begin``.
        error: what ``strict`` raises; its callbacks cannot raise it.
    """

    def __init__(self, settings: MemWatchConfig, commands: Any) -> None:
        self.settings, self.commands = settings, commands
        self.watch: MemWatch | None = None
        self.error: StrictError | None = None
        self._trainer: Any = None
        self._step = 0

    def begin(self, trainer: Any) -> None:
        """Take the baseline; the trainer has started, and does not train yet.

        Raises:
            SystemExit: memwatch's configuration is wrong.
        """
        self._trainer, model, config = trainer, trainer.model, trainer.config
        self._step = model.train_progress.global_step
        model.materialize("unet", *model.model_type.text_encoder_parts())
        self.watch = make_watch(self.settings, model, config)
        self.watch.observer.limit_batches(config.batch_size)
        call_before(trainer.tensorboard, "add_scalar", self._note)
        if self._step:
            load(self.watch, self._state_file())
            if has_stopped(self.watch):
                self.commands.stop()
        self._log(self.watch.begin(self._step))
        trainer.model_setup.setup_train_device(model, config)

    def update(self, progress: Any, epoch_length: int, epochs: int) -> None:
        """After every batch, and once more after every epoch."""
        watch, step = self.watch, progress.global_step
        if watch is None or step == self._step or watch.faults.is_off(LOOKING):
            return
        self._step = step
        if watch.config.max_train_steps is None:  # known only now
            watch.config = replace(watch.config, max_train_steps=epoch_length * epochs)
        try:
            with watch.faults.surviving(LOOKING):
                self._log(watch.on_step_end(step))
        except StrictError as error:
            self.error = error
        if watch.should_stop or self.error is not None:
            self.commands.stop()

    def status(self, status: str) -> None:
        """What the trainer says that it does now."""
        if status == BACKUP and self.watch is not None:
            save(self.watch, self._state_file())

    def _state_file(self) -> Path:
        assert self.watch is not None
        return self.watch.folder.folder / "onetrainer" / f"step_{self._step:07d}.json"

    def _note(self, tag: str, value: Any, step: int | None = None, *args: Any, **kwargs: Any) -> None:
        if self.watch is not None and step is not None:
            self.watch.note_losses({tag: value}, step)

    def _log(self, report: Any) -> None:
        if report is not None:
            for key, value in report.scalars().items():
                self._trainer.tensorboard.add_scalar(key, value, report.step)


# --- the command -----------------------------------------------------------------------------------------------------


def require_supported(config: Any) -> None:
    """Raises ``SystemExit`` for what cannot be watched."""
    allowed = {"model_type": MODELS, "training_method": METHODS}
    for key, values in allowed.items():
        if (value := str(getattr(config, key))) not in values:
            refuse(f"{key}: got {value}, allowed: {', '.join(values)}")
    if config.multi_gpu or config.cloud.enabled:
        refuse("multi_gpu or cloud.enabled is set, and memwatch sees the model of one local process only")
    if config.train_any_embedding() or config.train_any_output_embedding():
        refuse("an embedding is trained, and memwatch reads prompts without OneTrainer's embeddings")


def read_config(args: Any) -> Any:
    """Their ``TrainConfig`` from their arguments, in their order: preset, file, single values, secrets."""
    config = theirs("config.TrainConfig").TrainConfig.default_values()
    if args.preset_path is not None:
        config.from_dict(json.loads(Path(args.preset_path).read_text(encoding="utf-8")), migrate=False)
    own = json.loads(Path(args.config_path).read_text(encoding="utf-8"))
    config.from_dict(own, migrate=args.preset_path is None)
    for assignment in args.config_values or []:
        set_value(config, *assignment.split("=", 1))
    secrets = Path(args.secrets_path or "secrets.json")
    if args.secrets_path is not None or secrets.is_file():
        values = json.loads(secrets.read_text(encoding="utf-8"))
        config.secrets = theirs("config.SecretsConfig").SecretsConfig.default_values().from_dict(values)
    return config


def set_value(config: Any, key: str, value: str = "") -> None:
    """One of their ``--config-value KEY=VALUE``; dots in the key lead to nested objects."""
    *parents, leaf = key.split(".")
    for parent in parents:
        config = getattr(config, parent)
    is_flag = config.types[leaf] is bool
    config.from_dict({leaf: value.lower() in ("true", "1", "yes") if is_flag else value}, migrate=False)


def theirs(name: str) -> Any:
    """A module below their ``modules.util``."""
    return importlib.import_module(f"modules.util.{name}")


def main(argv: Sequence[str] | None = None) -> None:
    """Train as ``scripts/train.py`` does, watched.

    Raises:
        SystemExit: with code 2, when it cannot be watched; the message says why.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--memwatch", metavar="YAML")
    ours, rest = parser.parse_known_args(argv)
    import_theirs("scripts.util.import_util", TRAINER, os.getcwd()).script_imports()
    sys.argv = [sys.argv[0], *rest]
    config = read_config(theirs("args.TrainArgs").TrainArgs.parse_args())
    require_supported(config)
    commands = theirs("commands.TrainCommands").TrainCommands()
    watcher = Watcher(read_settings(ours.memwatch, TRAINER), commands)
    callbacks = theirs("callbacks.TrainCallbacks").TrainCallbacks(
        on_update_train_progress=watcher.update, on_update_status=watcher.status
    )
    train(theirs("create").create_trainer(config, callbacks, commands), watcher)


def train(trainer: Any, watcher: Watcher) -> None:
    """Start, train, end. Ctrl-C ends without the final save, unless a backup is to come before it."""
    trainer.start()
    watcher.begin(trainer)
    interrupted = False
    try:
        trainer.train()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        if watcher.watch is not None:
            watcher.watch.close()
    if watcher.error is not None:
        raise watcher.error
    if not interrupted or trainer.config.backup_before_save:
        trainer.end()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("memwatch").setLevel(logging.INFO)
    main()
