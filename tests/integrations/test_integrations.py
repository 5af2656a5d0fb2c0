"""memwatch in other people's loops: events are taken, stops are obeyed, training stays the same, resume goes on."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDIMScheduler, UNet2DConditionModel
from support.builders import SMALL, Loop, history, picture, stop_at
from support.families import TOKENS

import memwatch.callback
import memwatch.integrations.tracker
from memwatch import MemWatch, Probe
from memwatch.integrations.tracker import MemWatchTracker
from memwatch.report.history import Run

OPTIONS = {"probes": [Probe("a cat", picture(0), name="cat")], "config": SMALL}


class Trained(torch.nn.Module):
    """What people give to a trainer: the UNet and its loss."""

    def __init__(self, pretrained) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel.from_pretrained(pretrained, subfolder="unet")
        self.scheduler = DDIMScheduler.from_pretrained(pretrained, subfolder="scheduler")

    def forward(self, latents, hidden):
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),))
        output = self.unet(self.scheduler.add_noise(latents, noise, timesteps), timesteps, hidden).sample
        return {"loss": torch.nn.functional.mse_loss(output, noise)}


def data():
    generator = torch.Generator().manual_seed(2)
    return [
        {"latents": torch.randn(4, 8, 8, generator=generator), "hidden": torch.randn(TOKENS, 16, generator=generator)}
        for _ in range(8)
    ]


def trainer(pretrained, folder, steps=4, watch=True):
    """Saves every second step, and evaluates two sets at every step."""
    from transformers import Trainer, TrainingArguments

    from memwatch.integrations.transformers import MemWatchCallback

    set_seed(1)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        remove_unused_columns=False,
    )
    held_out = {"cats": data()[:2], "dogs": data()[2:4]}
    made = Trainer(Trained(pretrained), args, train_dataset=data(), eval_dataset=held_out)
    made.label_names, made.can_return_loss = [], True  # the model's loss needs no labels
    if watch:
        options = OPTIONS | {"output_dir": folder / "memwatch"}
        made.add_callback(MemWatchCallback(made, pretrained, denoiser=lambda model: model.unet, **options))
    return made


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_a_transformers_trainer_is_watched_left_as_it_was_resumed_and_stopped(pretrained, tmp_path, monkeypatch):
    bare, watched = trainer(pretrained, tmp_path / "bare", watch=False), trainer(pretrained, tmp_path)
    for made in (bare, watched):
        set_seed(1)
        made.evaluate()  # before training there is no watch
        made.train()
        made.evaluate()  # after training it is closed
    assert torch.equal(weights(bare.model), weights(watched.model))
    assert [row["step"] for row in history(tmp_path)] == [0, 2, 4]
    logged = [row for row in watched.state.log_history if "memwatch/step" in row]
    assert [row["memwatch/step"] for row in logged] == [0, 2, 4]
    assert "memwatch/collapse/cat" in logged[-1]
    names = ("eval_cats_loss", "eval_dogs_loss")
    told = [(row["step"], name, row[name]) for row in watched.state.log_history for name in names if name in row]
    assert [step for step, *_ in told] == [1, 1, 2, 2, 3, 3, 4, 4, 4, 4]
    assert Run.read(tmp_path / "memwatch").losses == tuple(told[:-2])

    saved = json.loads((tmp_path / "checkpoint-2" / "memwatch.json").read_text(encoding="utf-8"))
    assert (saved["last_step"], saved["ledger"]) == (2, [0])
    stop_at(6, monkeypatch)
    again = trainer(pretrained, tmp_path, steps=20)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 6
    rows = history(tmp_path)
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    assert rows[-1]["findings"][0]["baseline_step"] == 0  # from before the interruption


def lightning_fit(pretrained, folder, steps=4, watch=True, checkpoint=None):
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    from torch.utils.data import DataLoader

    from memwatch.integrations.lightning import MemWatchCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.unet = Trained(pretrained).train()

        def training_step(self, batch, index):
            return self.unet(**batch)["loss"]

        def validation_step(self, batch, index):
            self.log("val_loss", self.unet(**batch)["loss"])
            self.log("val_time", 1.0)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    set_seed(1)
    options = OPTIONS | {"output_dir": folder / "memwatch"}
    made = lightning.Trainer(
        max_steps=steps,
        callbacks=[MemWatchCallback(lambda module: module.unet.unet, pretrained, **options)] if watch else [],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        accumulate_grad_batches=2,
        val_check_interval=4,
    )
    module = Module()
    made.fit(module, DataLoader(data(), batch_size=1), DataLoader(data()[:2], batch_size=1), ckpt_path=checkpoint)
    return made, module


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and logging
def test_a_lightning_trainer_is_watched_left_as_it_was_resumed_and_stopped(pretrained, tmp_path, monkeypatch):
    _, bare = lightning_fit(pretrained, tmp_path / "bare", watch=False)
    made, watched = lightning_fit(pretrained, tmp_path)
    assert torch.equal(weights(bare), weights(watched))
    assert [row["step"] for row in history(tmp_path)] == [0, 2, 4]
    losses = Run.read(tmp_path / "memwatch").losses
    assert [(step, key) for step, key, _ in losses] == [(2, "val_loss"), (4, "val_loss")]  # not Lightning's own check
    assert losses[-1][-1] == pytest.approx(float(made.callback_metrics["val_loss"]))

    made.save_checkpoint(tmp_path / "saved.ckpt")
    stop_at(6, monkeypatch)
    made, _ = lightning_fit(pretrained, tmp_path, steps=20, checkpoint=tmp_path / "saved.ckpt")
    assert made.global_step == 6
    rows = history(tmp_path)
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    assert rows[-1]["findings"][0]["baseline_step"] == 0


class Tracked(Loop):
    """A loop that knows of nothing but its trackers, and logs its loss a step late, as some do."""

    def make_accelerator(self, **options):
        watching = OPTIONS | {"output_dir": self.folder / "memwatch"}
        self.tracker = MemWatchTracker(lambda: MemWatch(self.accelerator, self.unet, self.pretrained, **watching))
        return Accelerator(cpu=True, **options | {"log_with": [self.tracker]})


def test_a_tracker_watches_without_another_line(pretrained, tmp_path, monkeypatch, caplog):
    bare = Loop(pretrained)
    bare.run(None, 6)
    loop = Tracked(pretrained, tmp_path, log_with="memwatch")
    loop.pretrained = pretrained
    stop_at(6, monkeypatch)
    with caplog.at_level(logging.WARNING, "memwatch"):
        loop.run(None, 6, each=lambda loop: loop.accelerator.log({"loss": 1.0}, step=loop.step))
    assert torch.equal(weights(bare.bare), weights(loop.bare))
    assert [row["step"] for row in history(tmp_path)] == [1, 2, 4, 6]
    assert loop.tracker.watch.should_stop
    assert sum("would stop here" in message for message in caplog.messages) == 1
    loop.accelerator.log({"loss": 1.0})  # without a step
    loop.accelerator.end_training()
    assert loop.tracker.watch.on_step_end(8) is None  # closed
    assert [row["step"] for row in history(tmp_path)] == [1, 2, 4, 6]


def test_a_tracker_that_hears_of_odd_steps_only_still_looks(pretrained, tmp_path):
    loop = Tracked(pretrained, tmp_path, log_with="memwatch", lr=0.0)
    loop.pretrained = pretrained
    for step in (1, 5, 9):
        loop.accelerator.log({"val_loss": 1.0 / step}, step=step)
    assert [row["step"] for row in history(tmp_path)] == [1, 5, 9]
    losses = Run.read(tmp_path / "memwatch").losses
    assert losses == tuple((step, "val_loss", 1.0 / step) for step in (1, 5, 9))  # each once, the first included


def test_a_tracker_refuses_several_processes_before_it_waits_for_them(monkeypatch):
    monkeypatch.setattr(memwatch.integrations.tracker, "PartialState", lambda: SimpleNamespace(num_processes=2))
    made = []
    with pytest.raises(ValueError, match="works with one process, not 2"):
        MemWatchTracker(lambda: made.append(True)).log({}, step=1)
    assert not made
