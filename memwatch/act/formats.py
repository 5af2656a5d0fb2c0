"""Formats: trained weights, written as diffusers loads them. The live networks are only read."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from memwatch.denoiser.log_filter import quietly
from memwatch.measure.weights import write_safetensors

LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Part:
    """A network of the pipeline that may be trained.

    Attributes:
        name: in the pipeline: ``unet``, ``transformer``, ``text_encoder``, ``text_encoder_2``, ...
        network: the bare one.
        tokenizer: of a text encoder; ``None`` for the denoiser.
    """

    name: str
    network: nn.Module
    tokenizer: Any = None


Weights = Mapping[str, Tensor]  # of one part, by parameter name, on the CPU


def write_parts(parts: Sequence[Part], weights: Mapping[str, Weights], pipeline: str, folder: Path) -> str:
    """Write each part's trained weights into an existing folder, in the form that goes with how it is trained.

    LoRA goes into one file for all parts, the embeddings of added words into one file per text encoder, and any other
    part into a folder of its own, whole. What is not trained is written as it is in the network now.

    Args:
        weights: by part.
        pipeline: name of the diffusers class, whose LoRA format is written.

    Returns:
        Python that loads it, in one line. ``pipe`` stands for a pipeline of the model that training began with.

    Raises:
        ValueError: the weights do not fit the network, or diffusers has no form that holds all of them.
    """
    adapters: dict[str, tuple[Part, Weights]] = {}
    lines: list[str] = []
    for part in parts:
        trained = weights.get(part.name, {})
        require_fit(part, trained)
        lora = {name: tensor for name, tensor in trained.items() if ".lora_" in name}
        others = {name: tensor for name, tensor in trained.items() if name not in lora}
        if lora:
            adapters[part.name] = part, lora
        if set(others) == {embedding_name(part.network)} and (words := added_words(part.tokenizer)):
            lines.append(write_words(part, next(iter(others.values())), words, folder))
        elif others:
            lines.append(write_network(part, others, folder))
    return "; ".join([*lines, *([write_lora(adapters, pipeline, folder)] if adapters else [])])


def require_fit(part: Part, weights: Weights) -> None:
    """Raise a ``ValueError`` where a weight has no parameter of the same shape: the network was changed since."""
    shapes = {name: tuple(p.shape) for name, p in part.network.named_parameters()}
    for name, tensor in weights.items():
        if (shape := shapes.get(name)) != tuple(tensor.shape):
            has = f"has {shape}" if shape else "has no such parameter any more"
            raise ValueError(f"{part.name} was changed: {name} had shape {tuple(tensor.shape)}, and the network {has}")


# --- a whole network -------------------------------------------------------------------------------------------------


def write_network(part: Part, weights: Weights, folder: Path) -> str:
    """A folder as ``save_pretrained`` writes it, unless the network holds adapters. Returns the line that loads it."""
    network: Any = part.network
    if getattr(network, "peft_config", None):
        name = next(iter(weights))
        raise ValueError(f"{part.name} holds adapters and trains {name} as well; no form of diffusers holds both")
    settings: dict[str, Any] = getattr(getattr(network, "config", None), "__dict__", {})
    before = dict(settings)
    try:
        with replaced(network, weights), quietly():
            network.save_pretrained(folder / part.name)
    finally:  # transformers notes in the configuration what it saves
        settings.clear()
        settings.update(before)
    return f"{part.name} = {type(network).__name__}.from_pretrained({os.fspath(folder / part.name)!r})"


@contextmanager
def replaced(network: nn.Module, weights: Weights) -> Iterator[None]:
    """Inside, ``network.state_dict()`` returns these weights instead of its own.

    No parameter is touched: that takes no memory on the device, keeps the type in which the weights were trained, and
    DDP forgets its hooks when a parameter changes device or type.
    """
    names = {id(p): name for name, p in network.named_parameters()}
    tied = {name: names[id(p)] for name, p in network.named_parameters(remove_duplicate=False)}

    def hook(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state |= {prefix + name: weights[first] for name, first in tied.items() if first in weights}

    handle = network.register_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        handle.remove()


# --- LoRA ------------------------------------------------------------------------------------------------------------


def write_lora(adapters: Mapping[str, tuple[Part, Weights]], pipeline: str, folder: Path) -> str:
    """``LORA_FILE``, as the pipeline's own ``save_lora_weights`` writes it, with rank and alpha. Returns its line."""
    import diffusers
    from peft import get_peft_model_state_dict

    save: Any = getattr(getattr(diffusers, pipeline), "save_lora_weights", None)
    known = inspect.signature(save).parameters if save is not None else {}
    arguments: dict[str, Any] = {}
    for name, (part, trained) in adapters.items():
        if f"{name}_lora_layers" not in known:
            raise ValueError(f"{pipeline} knows no LoRA of {name}")
        network: Any = part.network
        adapter, config = adapter_of(part, trained)
        rest = {n: p.detach() for n, p in network.named_parameters() if ".lora_" in n and f".{adapter}." in f"{n}."}
        state = get_peft_model_state_dict(network, {**rest, **trained}, adapter, save_embedding_layers=False)
        arguments[f"{name}_lora_layers"] = {key: tensor.contiguous() for key, tensor in state.items()}
        arguments[f"{name}_lora_adapter_metadata"] = config.to_dict()
    save(folder, **arguments)
    return f"pipe.load_lora_weights({os.fspath(folder)!r}, weight_name={LORA_FILE!r})"


def adapter_of(part: Part, trained: Weights) -> tuple[str, Any]:
    """Name and configuration of the one LoRA adapter that is trained; a ``ValueError`` where there is no such thing."""
    configs: Mapping[str, Any] = getattr(part.network, "peft_config", None) or {}
    names = [adapter for adapter in configs if any(f".{adapter}." in f"{name}." for name in trained)]
    if len(names) != 1:
        raise ValueError(f"{part.name} trains {len(names)} adapters ({', '.join(names)}), and one file holds one")
    config = configs[names[0]]
    if (kind := getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise ValueError(f"{part.name} trains an adapter of PEFT's kind {kind}, and diffusers loads LORA")
    return names[0], config


# --- words -----------------------------------------------------------------------------------------------------------


def write_words(part: Part, embedding: Tensor, words: Mapping[str, list[int]], folder: Path) -> str:
    """The embeddings of a textual inversion, as ``load_textual_inversion`` reads them. Returns the line that loads it.

    Args:
        embedding: of all tokens, ``(n, d)``. words: by added word, its rows.
    """
    number = part.name.removeprefix("text_encoder")  # nothing, or _2
    file = f"learned_embeds{number}.safetensors"
    write_safetensors(folder / file, {word: embedding[rows] for word, rows in words.items()}, {"format": "pt"})
    path, where = os.fspath(folder / file), ""
    if number:
        where = f", text_encoder=pipe.{part.name}, tokenizer=pipe.tokenizer{number}"
    if len(words) == 1:
        return f"pipe.load_textual_inversion({path!r}{where})"
    each = f"pipe.load_textual_inversion({{word: rows}}{where})"  # a file may hold one word only
    return f"[{each} for word, rows in safetensors.torch.load_file({path!r}).items()]"


def added_words(tokenizer: Any) -> dict[str, list[int]]:
    """The rows of every word that was added to a tokenizer.

    ``<toy>``, ``<toy>_1``, ``<toy>_2`` are three vectors of one word, as diffusers names them.
    """
    added: Mapping[str, int] = tokenizer.get_added_vocab() if tokenizer is not None else {}
    words: dict[str, list[int]] = {}
    for row, token in sorted((row, token) for token, row in added.items() if row >= tokenizer.vocab_size):
        word, _, number = token.rpartition("_")
        if word in words and number == str(len(words[word])):
            words[word].append(row)
        else:
            words[token] = [row]
    return words


def embedding_name(network: nn.Module) -> str | None:
    """The parameter that holds a text encoder's embedding of tokens; ``None`` where there is no such thing."""
    get: Any = getattr(network, "get_input_embeddings", None)
    weight = getattr(get(), "weight", None) if get is not None else None
    return next((name for name, p in network.named_parameters() if p is weight), None)
