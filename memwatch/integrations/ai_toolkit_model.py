"""ai-toolkit's model and settings, in the form that memwatch takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from memwatch.callback import MemWatch
from memwatch.config import MemWatchConfig, require
from memwatch.config_file import load_config
from memwatch.denoiser import as_tuple, family_of, unwrap
from memwatch.integrations.runner import pipeline_of
from memwatch.integrations.wrapped import patched
from memwatch.resume import read

SECTION, STATE = "memwatch", "memwatch.json"


def settings_of(process: Any) -> tuple[MemWatchConfig, Any]:
    """The configuration in a job's section, and the ``pretrained`` that it names or ``None``.

    Raises:
        ConfigError: the section is missing or wrong, or asks for what cannot be done in ai-toolkit.
    """
    section = process.get_conf(SECTION, None)
    allowed = "a mapping of memwatch's keys, such as probes and controls, beside 'type: memwatch'"
    require(isinstance(section, Mapping) and bool(section), SECTION, section, allowed)
    given = {"output_dir": str(Path(process.save_root) / "memwatch"), "max_train_steps": process.train_config.steps}
    given |= section
    pretrained = given.pop("pretrained", None)
    if process.network_config is not None:
        require(
            not given.get("rollback"), "rollback", True, "false for ai-toolkit's LoRA; go back to a save of its own"
        )
        given["rollback"] = False
    config = load_config(given)
    require_supported(process)
    return config, pretrained


def require_supported(process: Any) -> None:
    """Refuse what changes the model in ways that memwatch cannot follow.

    Raises:
        ConfigError: the message names the key of the job.
    """
    train, network = process.train_config, process.network_config
    swaps, merges = train.do_paramiter_swapping, train.merge_network_on_save
    kind = "" if network is None else str(network.type).lower()
    require(not swaps, "train.do_paramiter_swapping", swaps, "false with memwatch: which weights are trained changes")
    require(not merges, "train.merge_network_on_save", merges, "false with memwatch: the base under the LoRA changes")
    require(kind != "lorm", "network.type", kind, "another one with memwatch: LoRM trains layer by layer")
    for key in ("adapter", "decorator"):
        value = process.get_conf(key, None)
        require(value is None, key, value, "none with memwatch, which looks at the denoiser alone")


def watch_of(process: Any, config: MemWatchConfig, pretrained: Any) -> MemWatch:
    """The watch of a job whose models are loaded, on every rank. Where the job is resumed, so is the watch.

    Raises:
        ConfigError, ProbeError, ValueError: as ``MemWatch``.
    """
    sd, train, lora = process.sd, process.train_config, process.network
    encoders, tokenizers = [unwrap(encoder) for encoder in as_tuple(sd.text_encoder)], as_tuple(sd.tokenizer)
    family_of(model := with_lora(unwrap(sd.unet), lora))  # before anything is read from models of other kinds
    given: dict[str, Any] = {"scheduler": sd.noise_scheduler}
    if train.train_text_encoder or process.embed_config is not None:
        given |= {"text_encoder": [with_lora(encoder, lora) for encoder in encoders], "tokenizer": tokenizers}
    parts = pretrained or parts_of(encoders, tokenizers, sd, process.accelerator.device)
    with switched_on(lora):
        watch = MemWatch(process.accelerator, model, parts, config=config, **given)
    watch.observer.limit_batches(train.batch_size)
    if process.step_num > 0:
        state = read(Path(process.save_root) / STATE)
        is_earlier = (last := state.get("last_step")) is not None and last <= process.step_num
        watch.load_state_dict(state if is_earlier else {})
    return watch


def parts_of(encoders: Sequence[Any], tokenizers: Sequence[Any], sd: Any, device: Any) -> SimpleNamespace:
    """A job's models under the names of a pipeline. memwatch lets go of them once the probes are encoded."""
    ends = ["", *(f"_{number}" for number in range(2, len(encoders) + 1))]
    named = {f"text_encoder{end}": encoder for end, encoder in zip(ends, encoders, strict=True)}
    named |= {f"tokenizer{end}": tokenizer for end, tokenizer in zip(ends, tokenizers, strict=False)}
    config = getattr(getattr(sd, "pipeline", None), "config", None)
    return SimpleNamespace(**vars(pipeline_of(unwrap(sd.vae), sd.noise_scheduler, device)), config=config, **named)


def with_lora(network: nn.Module, lora: nn.Module | None) -> nn.Module:
    """A network and ai-toolkit's LoRA as one module."""
    return network if lora is None else patched(network, lora)


@contextmanager
def switched_on(lora: Any) -> Iterator[None]:
    """Inside, ai-toolkit's LoRA is active at strength 1; backward passes belong inside as well. ``None`` is no LoRA.

    A training step leaves one strength per row of its batch behind, which fits no other batch.
    """
    if lora is None:
        yield
        return
    was, strength = lora.is_active, lora.multiplier
    try:
        lora.is_active, lora.multiplier = True, 1.0
        yield
    finally:
        lora.is_active, lora.multiplier = was, strength
