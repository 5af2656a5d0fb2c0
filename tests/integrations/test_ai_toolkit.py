"""memwatch in a miniature of ai-toolkit: watched from before the first step, stopped, resumed, left as it was."""

from __future__ import annotations

import gc
import json
import sys
import weakref

import pytest
import torch
from support.builders import SMALL, choose, history, picture, stop_at
from support.mini_ai_toolkit import MODULES, DiffusionTrainer, LoRASpecialNetwork, run_job

import memwatch.integrations.ai_toolkit as ai_toolkit
from memwatch.config import ConfigError
from memwatch.measure.observer import Observer
from memwatch.report.history import Run


@pytest.fixture
def process(monkeypatch):
    """The process type ``memwatch``, as ai-toolkit gets it."""
    for name, module in MODULES.items():
        monkeypatch.setitem(sys.modules, name, module)
    (extension,) = ai_toolkit.extensions()
    assert extension.uid == "memwatch"
    return extension.get_process()


@pytest.fixture
def job(pretrained, tmp_path):
    """Makes a job's configuration."""
    folder = tmp_path / "probes"
    folder.mkdir()
    picture(0).save(folder / "cat.png")
    (folder / "cat.txt").write_text("a cat", encoding="utf-8")

    def make(*, lora=True, watch=None, train=None, **keys):
        section = SMALL | {"probes": str(folder)} | (watch or {})
        network = {"network": {"type": "lora"}} if lora else {}
        model = {"name_or_path": str(pretrained)}
        common = {"training_folder": str(tmp_path), "model": model, "train": train or {}, "memwatch": section}
        return common | network | keys

    return make


def weights(made):
    return torch.cat([p.detach().flatten() for p in made.params])


def events(tmp_path, name="job"):
    return history(tmp_path / name)


def collapse(row):
    return row["scalars"]["memwatch/collapse/cat"]


@pytest.mark.parametrize(
    ("lora", "train"),
    [(True, {}), (False, {}), (True, {"train_text_encoder": True}), (True, {"cache_text_embeddings": True})],
)
def test_a_job_is_watched_and_left_as_it_was(process, job, tmp_path, lora, train):
    bare = run_job(DiffusionTrainer, job(lora=lora, train=train), "bare")
    watched = run_job(process, job(lora=lora, train=train))
    assert torch.equal(weights(bare), weights(watched))
    assert weights(bare).abs().sum() > 0
    assert [row["step"] for row in events(tmp_path)] == [0, 2, 4]
    assert collapse(events(tmp_path)[-1]) != 0
    assert (watched.saved, watched.sampled, watched.is_done) == (bare.saved, bare.sampled, bare.is_done)
    assert watched.watch.config.max_train_steps == 4


def test_the_baseline_is_the_model_before_the_first_step(process, job, monkeypatch):
    seen = []
    observe = Observer.observe

    def counting(self, *args, **kwargs):
        seen.append(
            [p.detach().abs().sum().item() for n, p in self.model.named_parameters() if n.endswith("up.weight")]
        )
        return observe(self, *args, **kwargs)

    monkeypatch.setattr(Observer, "observe", counting)
    run_job(process, job())
    assert len(seen) == 3
    assert not any(seen[0])
    assert all(seen[1])


def test_the_lora_is_active_for_a_look_alone(process, job, monkeypatch):
    """Also where activations are computed a second time on the way back."""
    states = []
    observe = Observer.observe

    def noting(self, *args, **kwargs):
        (lora,) = (m for m in self.model.modules() if isinstance(m, LoRASpecialNetwork))
        states.append((lora.is_active, lora.multiplier))
        return observe(self, *args, **kwargs)

    monkeypatch.setattr(Observer, "observe", noting)
    made = run_job(process, job())
    assert states == [(True, 1.0)] * 3
    assert (made.network.is_active, made.network.multiplier) == (False, [1.0, 1.0])
    assert torch.equal(made.network.torch_multiplier, torch.ones(2))


def test_gradient_checkpointing_changes_no_number(process, job, tmp_path):
    run_job(process, job(), "kept")
    run_job(process, job(train={"gradient_checkpointing": True}), "recomputed")
    kept, recomputed = (events(tmp_path, name)[-1]["scalars"] for name in ("kept", "recomputed"))
    assert kept["memwatch/collapse/cat"] == pytest.approx(recomputed["memwatch/collapse/cat"], rel=1e-4)


def test_a_screened_event_looks_at_the_first_weights_later(process, job, tmp_path, monkeypatch):
    choose(monkeypatch, "cat")
    run_job(process, job(watch={"screen": True}), "screened")
    run_job(process, job(), "full")
    screened, full = (events(tmp_path, name)[-1] for name in ("screened", "full"))
    assert screened["findings"][0]["baseline_step"] == 0
    assert collapse(screened) == pytest.approx(collapse(full), rel=1e-4)


def test_prompts_are_generated_with_the_lora(process, job, tmp_path):
    run_job(process, job(watch={"probes": ["a cat"]}))
    assert [row["findings"][0]["baseline_step"] for row in events(tmp_path)] == [None, 0, 0]


def test_a_trained_text_encoder_is_asked_at_every_event(process, job):
    made = run_job(process, job(train={"train_text_encoder": True}))
    assert made.watch.observer.trains_text
    said = made.watch.observer.prepared[0].conditioning["encoder_hidden_states"]
    assert not torch.allclose(said, made.sd.encode_prompt(["a cat"])[0], atol=1e-6)  # the LoRA is off now
    with made.network, torch.no_grad():
        made.network.multiplier = 1.0
        now = made.sd.text_encoder.eval()
        tokens = made.sd.tokenizer("a cat", padding="max_length", max_length=32, return_tensors="pt").input_ids
        made.network.eval()
        assert torch.allclose(said, now(tokens)[0][0], atol=1e-6)


def test_memwatch_lets_go_of_text_encoders_that_are_unloaded(process, job, monkeypatch):
    alive = []
    begin = process.hook_before_train_loop

    def noting(self):
        alive.append(weakref.ref(self.sd.text_encoder))
        begin(self)

    monkeypatch.setattr(process, "hook_before_train_loop", noting)
    made = run_job(process, job(train={"cache_text_embeddings": True}))
    gc.collect()
    assert made.watch is not None
    assert alive[0]() is None


def test_a_stop_ends_the_job_as_its_last_step_would(process, job, tmp_path, monkeypatch):
    stop_at(2, monkeypatch)
    made = run_job(process, job(train={"steps": 50}))
    assert made.step_num == 2
    assert made.saved == [None]
    assert made.sampled == [0, 2]
    assert made.logger.is_finished
    assert made.is_done
    assert events(tmp_path)[-1]["stop_reason"] == "enough"
    assert (tmp_path / "job" / "memwatch" / "report.html").is_file()


def test_a_stop_at_the_last_step_leaves_the_end_to_ai_toolkit(process, job, monkeypatch):
    stop_at(4, monkeypatch)
    monkeypatch.setattr(ai_toolkit, "finish", None)
    assert run_job(process, job()).is_done


def test_failures_end_no_job(process, job, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr(Observer, "observe", fail)
    made = run_job(process, job(watch={"strict": False}))
    assert made.is_done
    assert "broken" in events(tmp_path)[0]["failure"]


def test_a_failing_logger_ends_no_job(process, job, tmp_path, monkeypatch):
    log = DiffusionTrainer.__mro__[2].__init__  # the base's, whose logger is replaced

    def without_logger(self, *args, **kwargs):
        log(self, *args, **kwargs)
        real = self.logger.log

        def only_losses(values):
            if "loss" not in values:
                raise OSError("full")
            real(values)

        self.logger.log = only_losses

    monkeypatch.setattr(DiffusionTrainer.__mro__[2], "__init__", without_logger)
    made = run_job(process, job(watch={"strict": False}))
    assert made.is_done
    assert made.watch.faults.count == 3


def test_scalars_go_to_the_jobs_logger_and_its_losses_to_the_report(process, job, tmp_path):
    made = run_job(process, job(validate_every=2))
    logged = [values["memwatch/step"] for _, values in made.logger.committed if "memwatch/step" in values]
    assert logged == [0, 2]  # the last step's is committed with what comes after it
    assert Run.read(tmp_path / "job" / "memwatch").losses == ((0, "val/loss", 0.0), (2, "val/loss", 2.0))


def test_a_resumed_job_goes_on(process, job, tmp_path):
    first = run_job(process, job(train={"steps": 2}))
    saved = json.loads((tmp_path / "job" / "memwatch.json").read_text(encoding="utf-8"))
    assert saved["last_step"] == first.step_num == 2
    run_job(process, job())
    assert [row["step"] for row in events(tmp_path)] == [0, 2, 4]
    assert events(tmp_path)[-1]["findings"][0]["baseline_step"] == 0


def test_a_job_resumed_from_before_memwatchs_state_starts_afresh(process, job, tmp_path, caplog):
    run_job(process, job())
    (tmp_path / "job" / "step.txt").write_text("1", encoding="utf-8")
    run_job(process, job())
    assert [row["step"] for row in events(tmp_path)] == [1, 2, 4]
    assert "starts afresh" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memwatch": None}, "config key 'memwatch': got None"),
        ({"watch": {"evry_steps": 2}}, "did you mean 'every_steps'"),
        ({"watch": {"rollback": True}}, "config key 'rollback'"),
        ({"watch": {"on_memorized": "drop"}}, "config key 'on_memorized'"),
        ({"train": {"merge_network_on_save": True}}, "train.merge_network_on_save"),
        ({"train": {"do_paramiter_swapping": True}}, "train.do_paramiter_swapping"),
        ({"network": {"type": "LoRM"}}, "network.type"),
        ({"adapter": {"type": "ip"}}, "config key 'adapter'"),
    ],
)
def test_wrong_jobs_are_refused_before_the_model_is_loaded(process, job, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_job(process, job(**changes))


def test_other_families_are_refused(process, job, monkeypatch):
    begin = process.hook_before_train_loop

    def with_another(self):
        self.sd.unet, self.sd.vae = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        begin(self)

    monkeypatch.setattr(process, "hook_before_train_loop", with_another)
    with pytest.raises(ValueError, match="of no family that memwatch knows"):
        run_job(process, job())


def test_parts_come_from_another_pipeline_where_the_job_says_so(process, job, pretrained, tmp_path):
    run_job(process, job(watch={"pretrained": str(pretrained)}), "named")
    run_job(process, job(), "own")
    named, own = (collapse(events(tmp_path, name)[-1]) for name in ("named", "own"))
    assert named == pytest.approx(own, rel=1e-5)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path):
    (tmp_path / "clone" / "toolkit").mkdir(parents=True)
    (tmp_path / "clone" / "toolkit" / "extension.py").touch()
    return tmp_path / "clone"


def test_the_extension_is_installed_and_found(process, clone, capsys):
    assert ai_toolkit.main(["install", str(clone)]) == 0
    assert ai_toolkit.main(["install", str(clone)]) == 0  # again is fine
    file = clone / "extensions" / "memwatch" / "__init__.py"
    assert str(file) in capsys.readouterr().out
    found: dict = {}
    exec(file.read_text(encoding="utf-8"), found)
    assert [extension.uid for extension in found["AI_TOOLKIT_EXTENSIONS"]] == ["memwatch"]


def test_without_memwatch_other_jobs_go_on(clone, monkeypatch, capsys):
    ai_toolkit.main(["install", str(clone)])
    monkeypatch.setitem(sys.modules, "memwatch.integrations.ai_toolkit", None)
    found: dict = {}
    exec((clone / "extensions" / "memwatch" / "__init__.py").read_text(encoding="utf-8"), found)
    assert found["AI_TOOLKIT_EXTENSIONS"] == []
    assert "memwatch cannot be imported" in capsys.readouterr().out


def test_what_is_foreign_is_not_overwritten(clone, tmp_path, capsys):
    file = clone / "extensions" / "memwatch" / "__init__.py"
    file.parent.mkdir(parents=True)
    file.write_text("theirs", encoding="utf-8")
    assert ai_toolkit.main(["install", str(clone)]) == 2
    assert "memwatch did not write it" in capsys.readouterr().err
    assert file.read_text(encoding="utf-8") == "theirs"
    assert ai_toolkit.main(["install", str(tmp_path)]) == 2
    assert "no clone of ai-toolkit" in capsys.readouterr().err
