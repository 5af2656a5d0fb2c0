"""Runs kohya's ``train_network.py`` (LoRA of Stable Diffusion 1.x and 2.x) with memwatch in it; see README.md.

The runner subclasses their ``NetworkTrainer``, whose ``sample_images`` is called once before training and after every
optimizer step, on every rank: there memwatch takes the baseline, and later its events.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from kohya_model import EncoderWithLoRA, UNetWithLoRA, pipeline_of
from torch.utils.data import DataLoader

from memwatch import ConfigError, MemWatch, MemWatchConfig
from memwatch.config_file import load_config
from memwatch.denoiser import unwrap
from memwatch.guard import GuardedLoader
from memwatch.resume import FIRST, load, save
from memwatch.run_folder import write_json

logger = logging.getLogger("memwatch")

SCRIPT = "train_network"
NEVER = sys.maxsize  # epochs
STEP = "memwatch_step.json"  # in their checkpoints: memwatch's count of steps


class Watching:
    """What ``main`` mixes into their ``NetworkTrainer``.

    Attributes:
        settings: memwatch's configuration.
        watch: ``None`` before training.
    """

    settings: MemWatchConfig
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
        """They log to each tracker directly, not through ``accelerator.log``."""
        if self.watch is not None:
            self.watch.note_losses(logs, self._step)
        super().accelerator_logging(accelerator, logs, *args, **kwargs)  # type: ignore[misc]

    # --- what memwatch does there ------------------------------------------------------------------------------------

    def _should_stop(self) -> bool:
        return self.watch is not None and self.watch.should_stop

    def _begin(self, accelerator: Any, args: Any, vae: Any, tokenizers: Any, text_encoder: Any, unet: Any) -> None:
        checkpoint = Path(args.resume) if args.resume else None
        self._step = start = step_of(checkpoint)
        left = args.max_train_steps if start == 0 or not args.skip_until_initial_step else args.max_train_steps - start
        config = replace(
            self.settings,
            max_train_steps=self.settings.max_train_steps or start + left,
            resolution=self.settings.resolution or min(int(side) for side in re.findall(r"\d+", str(args.resolution))),
        )
        encoder = unwrap(text_encoder[0] if isinstance(text_encoder, list | tuple) else text_encoder)
        loras, skip = getattr(self._network, "text_encoder_loras", ()), (args.clip_skip or 1) - 1
        try:
            self.watch = MemWatch(
                accelerator,
                UNetWithLoRA(unwrap(unet), self._network, encoder),
                pipeline_of(vae, args, accelerator.device),
                config=config,
                text_encoder=EncoderWithLoRA(encoder, loras, accelerator.autocast, skip),
                tokenizer=tokenizers[0],
            )
        except ValueError as error:  # ConfigError and ProbeError are ValueErrors
            refuse(error)
        self.watch.observer.limit_batches(args.train_batch_size)
        accelerator.register_save_state_pre_hook(self._save)
        if checkpoint is not None:
            load(self.watch, checkpoint / FIRST)
            if self.watch.should_stop:
                go_on = "to train on, resume an earlier checkpoint"
                logger.warning("memwatch has stopped this run before (%s); %s", self.watch.stop_reason, go_on)
                run_empty(args, 0)
        self.watch.begin(start)

    def _end_step(self, args: Any, global_step: int) -> None:
        assert self.watch is not None
        self._step += 1
        self.watch.on_step_end(self._step)
        if self.watch.should_stop:
            run_empty(args, global_step)

    def _save(self, models: Any, weights: Any, folder: str) -> None:
        """Their last checkpoint comes after the watch is closed, when memwatch's own hook is gone."""
        assert self.watch is not None
        save(self.watch, Path(folder) / FIRST)
        with self.watch.faults.surviving("saving the count of steps", "a run that resumes from it counts from 0"):
            if self.watch.accelerator.is_main_process:
                write_json(Path(folder) / STEP, {"step": self._step})


def guard_prepared(accelerator: Any, should_stop: Callable[[], bool]) -> None:
    """Let the first dataloader that ``accelerator.prepare`` returns, the training one, be empty after a stop."""
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


def refuse(why: object) -> NoReturn:
    """End the program with one message and exit code 2, before training."""
    print(f"memwatch: {' '.join(str(why).split())}", file=sys.stderr)
    raise SystemExit(2)


def read_settings(file: str | None) -> MemWatchConfig:
    """The configuration in a YAML file. Rollback is off, because sd-scripts saves in a format of its own."""
    if not file:
        refuse("--memwatch: got nothing, allowed: a YAML file with the settings, 'probes' and 'controls' among them")
    try:
        config = load_config(file)
    except ConfigError as error:
        refuse(error)
    if config.picked is None and config.probes is None:
        refuse(f"{file}: 'probes' is missing (an image folder or prompts), or 'picked' (a folder of 'memwatch pick')")
    return replace(config, rollback=False, precision="loop")


def main(argv: Sequence[str]) -> None:
    """Train by their script, watched.

    Raises:
        SystemExit: with code 2, where it cannot be watched; the message says why.
    """
    script = Path(argv[0]) if argv else Path()
    if script.stem != SCRIPT:
        refuse(f"script: got {argv[0] if argv else 'nothing'!r}, allowed as the first argument: {SCRIPT}.py")
    sys.argv = [str(script), *argv[1:]]  # they parse it a second time for --config_file
    sys.path.insert(0, str(script.resolve().parent))
    module = importlib.import_module(SCRIPT)
    parser = module.setup_parser()
    parser.add_argument("--memwatch", metavar="YAML", help="settings of memwatch")
    args = parser.parse_args()
    module.train_util.verify_command_line_training_args(args)
    args = module.train_util.read_config_from_file(args, parser)
    for option in ("deepspeed", "fp8_base", "fp8_base_unet"):
        if getattr(args, option, None):
            refuse(f"--{option} is set, and memwatch cannot look at such a model; train without it")
    trainer = type("WatchingTrainer", (Watching, module.NetworkTrainer), {"settings": read_settings(args.memwatch)})
    trainer().train(args)


if __name__ == "__main__":
    main(sys.argv[1:])
