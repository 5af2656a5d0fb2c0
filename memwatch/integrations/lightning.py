"""memwatch as a callback of Lightning's ``Trainer``."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from lightning.pytorch.callbacks import Callback
from torch import nn

from memwatch.callback import MemWatch


class MemWatchCallback(Callback):  # type: ignore[misc]
    """Watches the denoiser of a ``LightningModule``, on one process or with DDP.

    Scalars go to the trainer's loggers, pictures and the module's validation losses to ``output_dir``::

        Trainer(callbacks=[MemWatchCallback(lambda module: module.unet, "path/to/pipeline", picked=picked)])

    Train on ``picked.train`` of ``picked = memwatch.pick(dataset)``. A stop saves ``stopped.ckpt`` in the trainer's
    ``default_root_dir`` first.

    Args:
        denoiser: picks the denoiser out of the module.
        pretrained: as for ``MemWatch``.
        options: further arguments of ``MemWatch``.

    Raises:
        ConfigError, ProbeError, ValueError: as ``MemWatch`` does, when training starts.
    """

    def __init__(self, denoiser: Callable[[Any], nn.Module], pretrained: Any = None, **options: Any) -> None:
        self.denoiser, self.pretrained, self.options = denoiser, pretrained, options
        self.watch: MemWatch | None = None
        self._restored: dict[str, Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        accelerator = Accelerator(cpu=pl_module.device.type == "cpu")  # it only knows the ranks; it prepares nothing
        steps = trainer.estimated_stepping_batches
        options = ({"max_train_steps": int(steps)} if math.isfinite(steps) else {}) | self.options
        self.watch = MemWatch(accelerator, self.denoiser(pl_module), self.pretrained, **options)
        if self._restored is not None:
            self.watch.load_state_dict(self._restored)
        if trainer.train_dataloader is not None:
            self.watch.guard(trainer.train_dataloader)  # for what it checks; the trainer keeps its own
        self._log(trainer, self.watch.begin(trainer.global_step))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self.watch is not None
        self._log(trainer, self.watch.on_step_end(trainer.global_step))
        if self.watch.should_stop and not trainer.should_stop:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "stopped.ckpt")
            trainer.should_stop = True

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self.watch is not None:  # Lightning's sanity check comes before training
            self.watch.note_losses(trainer.callback_metrics, trainer.global_step)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.watch is not None:
            self.watch.close()

    def state_dict(self) -> dict[str, Any]:
        return self.watch.state_dict() if self.watch is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None  # Lightning calls this before the model is there

    @staticmethod
    def _log(trainer: Any, report: Any) -> None:
        if report is not None:
            for logger in trainer.loggers:
                logger.log_metrics(report.scalars(), step=report.step)
