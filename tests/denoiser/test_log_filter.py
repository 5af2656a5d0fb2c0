"""What other libraries say while memwatch loads is shown once, and whatever was changed for that is given back."""

from __future__ import annotations

import json
import logging
import shutil
import warnings

import diffusers.utils.logging
import pytest
import transformers.utils.logging
from support.builders import Loop

import memwatch.denoiser.log_filter
from memwatch.denoiser.log_filter import LIBRARIES, quietly

BARS = (diffusers.utils.logging, transformers.utils.logging)
LOG = logging.getLogger("diffusers.models.some_model")  # as its files name theirs


@pytest.fixture
def noisy(pretrained, tmp_path):
    """The pipeline with settings that diffusers comments on at every load, by its log and by a warning."""
    folder = tmp_path / "noisy"
    shutil.copytree(pretrained, folder)
    for file, setting in (("vae/config.json", {"odd": 1}), ("scheduler/scheduler_config.json", {"steps_offset": 0})):
        settings = json.loads((folder / file).read_text(encoding="utf-8")) | setting
        (folder / file).write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch):
    monkeypatch.setattr(memwatch.denoiser.log_filter, "_said", set())


@pytest.fixture
def heard():
    """What two handlers of diffusers and one for everybody else show."""
    texts: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record):
            texts.append(record.getMessage())

    ears = [(logging.getLogger(name), Ear()) for name in ("diffusers", "diffusers", None)]
    for log, ear in ears:
        log.addHandler(ear)
    yield texts
    for log, ear in ears:
        log.removeHandler(ear)


def settings():
    """All that ``quietly`` could leave behind."""
    loggers = [logging.getLogger(name) for name in (None, *LIBRARIES, LOG.name)]
    logs = [(log.level, log.propagate, list(log.filters), list(log.handlers)) for log in loggers]
    handlers = [(h.level, list(h.filters)) for log in loggers for h in log.handlers]
    bars = [log.is_progress_bar_enabled() for log in BARS]
    return logs, handlers, bars, warnings.showwarning, list(warnings.filters)


def test_a_construction_leaves_everything_as_it_was(noisy, tmp_path, heard):
    """Also after one that fails; and what is said, is said once."""
    loop = Loop(noisy, tmp_path)
    with warnings.catch_warnings(record=True, action="always") as caught:
        before = settings()
        for _ in range(2):
            loop.watch(str(noisy)).close()
        (noisy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
        with pytest.raises(ValueError, match="cannot be loaded"):
            loop.watch(str(noisy))
        assert settings() == before
    assert sum("'odd': 1" in text for text in heard) == 2  # handlers
    assert len([w for w in caught if "steps_offset" in str(w.message)]) == 1


@pytest.mark.parametrize("shown", [True, False])
def test_errors_are_always_shown_and_what_the_user_chose_comes_back_after_an_exception(shown, heard, monkeypatch):
    for log in BARS:
        monkeypatch.setattr(log, "_tqdm_active", shown)
    before, inside = settings(), []

    def load():
        with quietly():
            inside.append([log.is_progress_bar_enabled() for log in BARS])
            LOG.error("broken")
            logging.getLogger("somebody.else").warning("theirs")
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            load()
    assert inside == [[False, False]] * 2
    assert settings() == before
    assert heard.count("theirs") == 2
    assert heard.count("broken") == 2 * 2


def test_a_warning_made_an_error_is_raised():
    for _ in range(2):
        with pytest.raises(FutureWarning, match="old name"), quietly():
            warnings.warn("old name", FutureWarning, stacklevel=1)
