"""Last clean: the latest weights saved before any probe was memorized, in the form diffusers loads."""

from __future__ import annotations

import inspect
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from memwatch.denoiser.log_filter import quietly
from memwatch.faults import Faults, PartError
from memwatch.judge.findings import Finding
from memwatch.judge.verdict import ProbeState, Verdict
from memwatch.measure.observer import Observer
from memwatch.measure.weights import averages, write_safetensors
from memwatch.report.about import PACKAGES, versions
from memwatch.run_folder import stem_of, write_json

logger = logging.getLogger("memwatch")

KEEPING, SAYING = "keeping the weights to roll back to", "saying how to load the weights to roll back to"
ABOUT = "memwatch.json"  # comes last into a folder, and says that it is whole
LORA_FILE = "pytorch_lora_weights.safetensors"


def is_clean(states: Mapping[str, ProbeState], findings: Sequence[Finding]) -> bool:
    """Whether no watched probe is memorized, or would be by this event alone, and all output is finite.

    ``states``: after the event.
    """
    watched = [states.get(finding.name, finding.state) for finding in findings]
    return all(s.finite and not s.has_begun and s.verdict is not Verdict.MEMORIZED for s in watched)


@dataclass(frozen=True)
class Part:
    """A network of the pipeline that may be trained: its name there, and a text encoder's tokenizer."""

    name: str
    network: nn.Module
    tokenizer: Any = None


class LastClean:
    """The weights of the newest clean event, in ``output_dir/last_clean/step_NNNNNNN``, as diffusers loads them.

    They are the denoiser, as averages where MemWatch was given an ``ema``, and the text encoders that it was given, as
    far as they are trained. Lives on every rank; the main process writes and deletes.

    Attributes:
        step: whose weights are kept; ``None`` where none are.
        unclean_since: step of the first event after it that was not clean; ``None`` where there is none, and so nothing
            to roll back to.
        final: whether something was memorized, so that nothing later is kept.
    """

    def __init__(self, observer: Observer, folder: Path, faults: Faults) -> None:
        self.ranks, self._denoiser, self._faults = observer.ranks, observer.denoiser, faults
        self._is_main, self.folder = bool(self.ranks.accelerator.is_main_process), folder / "last_clean"
        names, tokenizers = observer.denoiser.text_encoders, observer.parts.tokenizers
        given = zip(names, observer.text_encoders, tokenizers, strict=False)  # not all need be given
        encoders = [Part(name, network, tokenizer) for name, network, tokenizer in given if network is not None]
        self._parts = [Part(observer.denoiser.part, observer.model), *encoders]
        self._trained: dict[str, set[str]] = {part.name: set() for part in self._parts}
        self.step: int | None = None
        self.unclean_since: int | None = None
        self.final = False
        self._protected: int | None = None  # the last checkpoint's
        self._said: int | None = None
        ema, parameters = observer.ema, list(observer.model.parameters())
        fits = ema is None or len(ema.shadow_params) in (len(parameters), sum(p.requires_grad for p in parameters))
        self._ema = ema if fits else None
        if self._is_main and not fits:
            what = "the EMA averages %d tensors, and the model has %d or trains fewer; rollback keeps the live weights"
            logger.warning(what, len(ema.shadow_params), len(parameters))

    def _place(self, step: int) -> Path:
        return self.folder / stem_of(step)

    # --- at each event -----------------------------------------------------------------------------------------------

    def note(self, step: int, clean: bool, *, final: bool = False) -> None:
        """Keep the weights of a clean event in place of those kept before; call it at each event, on every rank.

        Where that fails, those kept before stay. ``clean``: see ``is_clean``; ``final``: a probe is called memorized.
        """
        self.final = self.final or final
        if not clean or self.final:
            self.unclean_since = step if self.unclean_since is None else self.unclean_since
            return
        for part in self._parts:  # a script may train a part for some of its steps only
            self._trained[part.name] |= {name for name, p in part.network.named_parameters() if p.requires_grad}
        if self._faults.is_off(KEEPING) or not any(self._trained.values()):
            return
        with suppress(PartError):
            self.ranks.together(KEEPING, self._faults, lambda: self._write(step) if self._is_main else None)
            self.step, self.unclean_since = step, None

    def _write(self, step: int) -> None:
        """A folder of what is trained, whole or not at all; then delete those that no checkpoint needs."""
        place, lines, adapters = self._place(step), [], {}
        shutil.rmtree(place, ignore_errors=True)  # of a past that a resume has left
        try:
            place.mkdir(parents=True)
            for i, part in enumerate(self._parts):
                trained = self._trained[part.name]
                averaged = averages(part.network, self._ema) if i == 0 and self._ema is not None else {}
                averaged = {name: tensor for name, tensor in averaged.items() if name in trained}
                lora = {name for name in trained if ".lora_" in name}
                if lora:
                    adapters[part.name] = part.network, adapter_of(part, lora), averaged
                if words := words_of(part, trained - lora):
                    lines.append(write_words(part, words, place))
                elif trained - lora:
                    lines.append(write_network(part, averaged, place))
            if adapters:
                lines.append(write_lora(adapters, self._denoiser.pipeline, place))
            about = {"step": step, "ema": self._ema is not None, "load": "; ".join(lines)}
            write_json(place / ABOUT, about | {"versions": versions((*PACKAGES, "peft"))})
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        needed = {self._place(s) for s in (step, self._protected) if s is not None}
        for other in set(self.folder.glob("step_*")) - needed:
            shutil.rmtree(other, ignore_errors=True)

    # --- at the end, and after a resume ------------------------------------------------------------------------------

    def end(self) -> Path | None:
        """Say once how to load what is kept, on every rank; it waits for no other rank.

        Returns its folder; ``None`` where nothing is kept, or there is no reason to roll back: then it is deleted.
        """
        if self.step is None:
            return None
        if self.unclean_since is None:
            self.step = None
            if self._is_main:
                shutil.rmtree(self.folder, ignore_errors=True)
            return None
        place = self._place(self.step)
        if self._is_main and self._said != self.step:
            with self._faults.surviving(SAYING, f"the weights of step {self.step} stay in {place}"):
                how = json.loads((place / ABOUT).read_text(encoding="utf-8"))["load"]
                what = "the latest weights saved before any probe was memorized"
                since = f"since step {self.unclean_since} one is or begins to be, or output is not finite"
                logger.warning("%s (step %d) are in %s; %s. To load them: %s", what, self.step, place, since, how)
            self._said = self.step
        return place

    def state_dict(self) -> dict[str, Any]:
        """Plain values. The folder of now outlasts newer ones until the next checkpoint."""
        self._protected = self.step
        return {"step": self.step, "unclean_since": self.unclean_since, "final": self.final}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, on every rank; from an empty one afresh."""
        self.step, self.unclean_since = state.get("step"), state.get("unclean_since")
        self.final, self._said, self._protected = bool(state.get("final", False)), None, self.step
        if self._is_main and self.step is not None and not (self._place(self.step) / ABOUT).is_file():
            what = f"the weights of step {self.step}, kept to roll back to, are missing from {self.folder}"
            logger.warning("%s; those of the next clean event are kept", what)
            self.step = None


# --- forms of diffusers ----------------------------------------------------------------------------------------------


def adapter_of(part: Part, lora: Collection[str]) -> str:
    """Name of the one LoRA adapter that is trained; a ``ValueError`` where there is no such thing."""
    configs: Mapping[str, Any] = getattr(part.network, "peft_config", None) or {}
    names = [adapter for adapter in configs if any(f".{adapter}." in f"{name}." for name in lora)]
    if len(names) != 1:
        raise ValueError(f"{part.name} trains {len(names)} adapters ({', '.join(names)}), and one file holds one")
    kind = configs[names[0]].peft_type
    if (kind := getattr(kind, "value", kind)) != "LORA":
        raise ValueError(f"{part.name} trains an adapter of PEFT's kind {kind}, and diffusers loads LORA")
    return names[0]


def write_network(part: Part, averaged: Mapping[str, Tensor], folder: Path) -> str:
    """The whole network as ``save_pretrained`` writes it. Returns the line that loads it."""
    network: Any = part.network
    if getattr(network, "peft_config", None):
        raise ValueError(f"{part.name} holds adapters and trains more than them; no form of diffusers holds both")
    settings: dict[str, Any] = getattr(getattr(network, "config", None), "__dict__", {})
    before = dict(settings)
    try:
        with replaced(network, averaged), quietly():
            network.save_pretrained(folder / part.name)
    finally:  # transformers notes in the configuration what it saves
        settings.clear()
        settings.update(before)
    return f"{part.name} = {type(network).__name__}.from_pretrained({os.fspath(folder / part.name)!r})"


@contextmanager
def replaced(network: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, ``network.state_dict()`` returns these weights instead of its own. No parameter is touched."""
    names = {id(p): name for name, p in network.named_parameters()}
    tied = {name: names[id(p)] for name, p in network.named_parameters(remove_duplicate=False)}

    def hook(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state |= {prefix + name: weights[first] for name, first in tied.items() if first in weights}

    handle = network.register_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        handle.remove()


def write_lora(adapters: Mapping[str, tuple[Any, str, Mapping[str, Tensor]]], pipeline: str, folder: Path) -> str:
    """``LORA_FILE`` as the pipeline's own ``save_lora_weights`` writes it, with rank and alpha. Returns its line.

    ``adapters`` has by part the network, its adapter's name, and averages that take the place of its weights.
    """
    import diffusers
    from peft import get_peft_model_state_dict

    save: Any = getattr(getattr(diffusers, pipeline), "save_lora_weights", None)
    arguments: dict[str, Any] = {}
    for name, (network, adapter, averaged) in adapters.items():
        if save is None or f"{name}_lora_layers" not in inspect.signature(save).parameters:
            raise ValueError(f"{pipeline} knows no LoRA of {name}")
        mine = {n: p.detach() for n, p in network.named_parameters() if ".lora_" in n and f".{adapter}." in f"{n}."}
        state = get_peft_model_state_dict(network, {**mine, **averaged}, adapter, save_embedding_layers=False)
        arguments[f"{name}_lora_layers"] = {key: tensor.contiguous() for key, tensor in state.items()}
        arguments[f"{name}_lora_adapter_metadata"] = network.peft_config[adapter].to_dict()
    save(folder, **arguments)
    return f"pipe.load_lora_weights({os.fspath(folder)!r}, weight_name={LORA_FILE!r})"


def words_of(part: Part, others: Collection[str]) -> dict[str, list[int]]:
    """The rows of every word that was added to the tokenizer, where its embedding is all that is trained of a part.

    ``<toy>``, ``<toy>_1``, ``<toy>_2`` are three vectors of one word, as diffusers names them.
    """
    if part.tokenizer is None:
        return {}
    weight = part.network.get_input_embeddings().weight  # type: ignore[operator,union-attr]
    if {name for name, p in part.network.named_parameters() if p is weight} != set(others):
        return {}
    words: dict[str, list[int]] = {}
    added: Mapping[str, int] = part.tokenizer.get_added_vocab()
    for row, token in sorted((row, token) for token, row in added.items() if row >= part.tokenizer.vocab_size):
        word, _, number = token.rpartition("_")
        if word in words and number == str(len(words[word])):
            words[word].append(row)
        else:
            words[token] = [row]
    return words


def write_words(part: Part, words: Mapping[str, list[int]], folder: Path) -> str:
    """Rows of an embedding by added word, as ``load_textual_inversion`` reads them. Returns the line that loads it."""
    number = part.name.removeprefix("text_encoder")  # nothing, or _2
    embedding = part.network.get_input_embeddings().weight.detach()  # type: ignore[operator,union-attr]
    file = folder / f"learned_embeds{number}.safetensors"
    write_safetensors(file, {word: embedding[rows] for word, rows in words.items()}, {"format": "pt"})
    where = f", text_encoder=pipe.{part.name}, tokenizer=pipe.tokenizer{number}" if number else ""
    if len(words) == 1:
        return f"pipe.load_textual_inversion({os.fspath(file)!r}{where})"
    each = f"pipe.load_textual_inversion({{word: rows}}{where})"  # a file may hold one word only
    return f"[{each} for word, rows in safetensors.torch.load_file({os.fspath(file)!r}).items()]"
