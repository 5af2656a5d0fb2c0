"""Text encoder: CLIP as other trainers call it, together with adapters that lie beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from torch import Tensor, nn

from memwatch.integrations.wrapped import Wrapped


class Encoded(NamedTuple):
    """The part of a text encoder's output that memwatch reads: what stands first in it, and the hidden states."""

    first: Tensor
    hidden_states: tuple[Tensor, ...]


class PatchedEncoder(Wrapped):
    """A CLIP text encoder and the adapters that patch its layers, as one module with the parameters of both.

    Args:
        network: transformers' ``CLIPTextModel``, or the one with a projection.
        adapters: they are trained, or it is not.
        precision: entered whenever it is called. Adapters are often of another type than the encoder.
        skip: how many of the last layers are left out, at least 0; "clip skip" is one more.
    """

    def __init__(
        self,
        network: nn.Module,
        adapters: Iterable[nn.Module] = (),
        *,
        precision: Callable[[], AbstractContextManager[Any]],
        skip: int = 0,
    ) -> None:
        super().__init__(network)
        self.adapters = nn.ModuleList(adapters)
        self.precision, self.skip = precision, skip

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """As the encoder does, but without its last layers. The embedding of one that projects stays as it is."""
        with self.precision():
            if not self.skip:
                return self.network(input_ids, attention_mask=attention_mask, **options)
            output = self.network(input_ids, attention_mask=attention_mask, output_hidden_states=True)
            states = tuple(output.hidden_states[: -self.skip])
            if hasattr(output, "text_embeds"):
                return Encoded(output[0], states)
            inner: Any = getattr(self.network, "text_model", self.network)  # transformers 4 nests it
            return Encoded(inner.final_layer_norm(states[-1]), states)
