"""memwatch as a callback of transformers' ``Trainer``."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from memwatch.callback import MemWatch

logger = logging.getLogger("memwatch")


class MemWatchCallback(TrainerCallback):  # type: ignore[misc]
    """Watches the model of a ``Trainer``.

    Scalars go wherever the trainer reports, pictures and the trainer's evaluation losses to ``output_dir``::

        trainer.add_callback(MemWatchCallback(trainer, "path/to/pipeline", picked=picked))

    Train on ``picked.train`` of ``picked = memwatch.pick(dataset)``. A stop asks the trainer for a checkpoint
    first. The state is saved in every checkpoint as ``memwatch.json``, and read when training resumes from a
    checkpoint in the trainer's ``output_dir``. With FSDP or DeepSpeed, the trained model must be the denoiser
    itself.

    Args:
        trainer: the ``Trainer``.
        pretrained: as for ``MemWatch``.
        denoiser: picks the denoiser out of the trained model, such as ``lambda model: model.unet``. By default the
            trained model is the denoiser.
        options: further arguments of ``MemWatch``.

    Raises:
        ConfigError, ProbeError, ValueError: as ``MemWatch`` does, when training begins.
    """

    def __init__(
        self,
        trainer: Any,
        pretrained: Any = None,
        *,
        denoiser: Callable[[nn.Module], nn.Module] | None = None,
        **options: Any,
    ) -> None:
        self.trainer, self.pretrained, self.denoiser, self.options = trainer, pretrained, denoiser, options
        self.watch: MemWatch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        model = trainer.model_wrapped if self.denoiser is None else self.denoiser(trainer.model)
        options = {"max_train_steps": state.max_steps} | self.options
        self.watch = MemWatch(trainer.accelerator, model, self.pretrained, **options)
        if state.global_step:
            saved = self._file(args, state)
            if saved.is_file():
                self.watch.load_state_dict(json.loads(saved.read_text(encoding="utf-8")))
            else:
                logger.warning("%s not found; the baseline is the model that training resumes from", saved)
        if (loader := kwargs.get("train_dataloader")) is not None:
            self.watch.guard(loader)  # for what it checks; the trainer keeps its own loader
        self._log(self.watch.begin(state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        assert self.watch is not None
        self._log(self.watch.on_step_end(state.global_step))
        if self.watch.should_stop:
            control.should_save = control.should_training_stop = True
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if self.watch is not None and metrics:
            self.watch.note_losses(metrics, state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.watch is not None and state.is_world_process_zero:
            self._file(args, state).write_text(json.dumps(self.watch.state_dict()), encoding="utf-8")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.watch is not None:
            self.watch.close()

    def _log(self, report: Any) -> None:
        if report is not None:
            self.trainer.log(report.scalars())

    @staticmethod
    def _file(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "memwatch.json"
