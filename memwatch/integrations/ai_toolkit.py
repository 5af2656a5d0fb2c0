"""memwatch in ostris' ai-toolkit, as an extension.

Install it once, in the environment that ai-toolkit runs in::

    python -m memwatch.integrations.ai_toolkit install PATH_TO_AI_TOOLKIT

Then a job names the process type ``memwatch`` instead of ``sd_trainer`` or ``diffusion_trainer``, and gets one section
more; everything else in it stays::

    process:
      - type: memwatch
        memwatch:                # the keys of memwatch's configuration files
          probes: watch/probes
          controls: watch/controls
          every_steps: 250

``output_dir`` is ``memwatch`` beside the job's saves, unless the section says otherwise. ``pretrained`` in the section
names a pipeline (folder or hub id), whose text encoders and autoencoder are used instead of the job's own. Scalars go
to the job's logger; pictures and the report page to ``output_dir``. Read against commit 27a03a91 (August 2026), and
tried on a miniature of it only.

How it works, and what to know:

- Their loop does a fixed number of steps. At a stop memwatch leaves it by an exception of its own; then it saves,
  samples and ends the job as they do. Only the upload to the hub is left out.
- The probes are encoded before their text encoders are unloaded (``cache_text_embeddings``, ``unload_text_encoder``).
  The baseline is taken before the first step, when everything is on its device.
- Their LoRA is no part of the network, and is active in training passes only. memwatch makes it active, at strength 1,
  for as long as it looks. ``signals.baseline: base`` knows PEFT's LoRA alone; in a fresh run ``first`` means the same.
- A LoRA is not rolled back, because it is saved in a format of their own: let them save every so many steps.
- Their data loader takes every image of its folders. Train on ``watch/train`` of ``memwatch pick``.
- Steps are theirs, with gradient accumulation as well. memwatch's state lies in ``memwatch.json`` beside their
  ``optimizer.pt``, and like that belongs to the newest save.
- They import every extension for every job. Where memwatch cannot be imported, its type alone is missing.

Not there: families that memwatch does not know (Chroma, Wan, Qwen, Flux.2, ...), adapters and decorators, LoRM,
``merge_network_on_save``, ``do_paramiter_swapping``, ``weights: ema``; these are errors before
training.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memwatch.callback import MemWatch
from memwatch.integrations.ai_toolkit_model import STATE, settings_of, switched_on, watch_of
from memwatch.report.report import Report
from memwatch.resume import SAVING
from memwatch.run_folder import write_json

logger = logging.getLogger("memwatch")

LOGGING = "writing to ai-toolkit's logger"
MARK = '"""memwatch; written by: python -m memwatch.integrations.ai_toolkit install"""\n'
EXTENSION = f"""{MARK}
try:
    from memwatch.integrations.ai_toolkit import extensions
except ImportError as error:
    print(f"The process type 'memwatch' is missing, because memwatch cannot be imported: {{error}}")
    AI_TOOLKIT_EXTENSIONS = []
else:
    AI_TOOLKIT_EXTENSIONS = extensions()
"""


class Stopped(Exception):  # noqa: N818  # no error
    """memwatch has decided to end training; the message says why."""


def extensions() -> list[type]:
    """What the extension's folder gives to ai-toolkit."""
    base: Any = importlib.import_module("toolkit.extension").Extension

    class MemWatchExtension(base):  # type: ignore[misc]
        uid, name = "memwatch", "memwatch"

        @classmethod
        def get_process(cls) -> type:
            trainers = importlib.import_module("extensions_built_in.sd_trainer.DiffusionTrainer")
            return type("MemWatchTrainer", (Watching, trainers.DiffusionTrainer), {})

    return [MemWatchExtension]


class Watching:
    """What is mixed into ai-toolkit's trainer; every public method is one of its hooks.

    Attributes:
        settings: memwatch's configuration, and where parts are loaded from.
        watch: ``None`` until the models are there.
    """

    accelerator: Any  # theirs, and so is what follows
    additional_logs: dict[str, Any]
    logger: Any
    network: Any
    save_root: str
    step_num: int
    train_config: Any
    watch: MemWatch | None = None
    _has_begun = False

    def __init__(self, process_id: int, job: Any, config: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(process_id, job, config, **kwargs)  # type: ignore[call-arg]
        self.settings = settings_of(self)

    def run(self) -> None:
        try:
            super().run()  # type: ignore[misc]
        except Stopped as stopped:
            finish(self, str(stopped))
        finally:
            if self.watch is not None:
                self.watch.close()

    def hook_before_train_loop(self) -> None:
        self.watch = watch_of(self, *self.settings)  # before the text encoders go
        super().hook_before_train_loop()  # type: ignore[misc]

    def hook_train_loop(self, batch: Any) -> Any:
        if not self._has_begun:
            self._has_begun = True
            self._look(self._watch.begin)
        return super().hook_train_loop(batch)  # type: ignore[misc]

    def end_step_hook(self) -> None:
        super().end_step_hook()  # type: ignore[misc]
        self._look(self._watch.on_step_end)
        if self._watch.should_stop and self.step_num < self.train_config.steps:
            raise Stopped(self._watch.stop_reason)

    def validate(self) -> None:
        super().validate()  # type: ignore[misc]
        losses = {key: value for key, value in self.additional_logs.items() if key.startswith("val/")}
        self._watch.note_losses(losses, self.step_num)

    def post_save_hook(self, save_path: str) -> None:
        super().post_save_hook(save_path)  # type: ignore[misc]
        if self.watch is not None:
            with self.watch.faults.surviving(SAVING, "a run that resumes from this save starts afresh"):
                write_json(Path(self.save_root) / STATE, self.watch.state_dict())

    @property
    def _watch(self) -> MemWatch:
        assert self.watch is not None
        return self.watch

    def _look(self, look: Callable[[int], Report | None]) -> None:
        """Look at the model as it is trained, with its LoRA."""
        with switched_on(self.network):
            report = look(self.step_num)
        if report is not None and self.accelerator.is_main_process:
            with self._watch.faults.surviving(LOGGING):
                self.logger.log(report.scalars())


def finish(process: Any, reason: str) -> None:
    """End a job that memwatch has stopped as ai-toolkit ends one that has done all its steps."""
    accelerator = process.accelerator
    accelerator.wait_for_everyone()
    if process.progress_bar is not None:
        process.progress_bar.close()
    logger.warning("memwatch has stopped training after step %d (%s)", process.step_num, reason)
    if accelerator.is_main_process:
        process.save()
    if not process.train_config.disable_sampling:
        process.sample(process.step_num)
    if accelerator.is_main_process:
        process.logger.commit(step=process.step_num)
        process.logger.finish()
    accelerator.end_training()
    process.done_hook()


# --- the command -----------------------------------------------------------------------------------------------------


def install(root: Path) -> Path:
    """Write the extension's folder into a clone of ai-toolkit; the file that was written.

    Raises:
        ValueError: it is no such clone, or something else has the folder's name.
    """
    if not (root / "toolkit" / "extension.py").is_file():
        raise ValueError(f"{root} is no clone of ai-toolkit: it has no toolkit/extension.py")
    folder = root / "extensions" / "memwatch"
    file = folder / "__init__.py"
    if folder.exists() and not (file.is_file() and file.read_text(encoding="utf-8").startswith(MARK)):
        raise ValueError(f"{folder} exists, and memwatch did not write it; move it away")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(EXTENSION, encoding="utf-8")
    return file


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 installed; 2 not, for the reason given."""
    parser = argparse.ArgumentParser(prog="python -m memwatch.integrations.ai_toolkit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="install")
    command = commands.add_parser("install", help="make the process type 'memwatch' known to ai-toolkit")
    command.add_argument("root", type=Path, metavar="PATH_TO_AI_TOOLKIT")
    try:
        print(f"written: {install(parser.parse_args(argv).root)}; a job may now say 'type: memwatch'")
    except (ValueError, OSError) as error:
        print(f"memwatch: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
