"""Networks as other trainers keep them, in the form that memwatch looks at."""

from __future__ import annotations

from typing import Any

from torch import nn


class Wrapped(nn.Module):
    """A network inside another module; whatever that module does not have itself is the network's.

    Args:
        network: bare, without the wrappers of accelerate and ``torch.compile``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)


class Patched(Wrapped):
    """A network and the LoRA that hangs in its layers' ``forward`` methods, as one module with the parameters of both.

    Such LoRA is no part of the network, so that the network alone would seem to have nothing that is trained.
    Accelerate's mixed precision, which sits in the network's ``forward``, is passed by: memwatch brings its own.

    Args:
        network: see ``Wrapped``.
        patch: the module that holds the LoRA layers.
    """

    def __init__(self, network: nn.Module, patch: nn.Module) -> None:
        super().__init__(network)
        self.patch = patch

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        network: Any = self.network
        original = network.__dict__.get("_original_forward")
        if original is None:
            return network(*args, **kwargs)
        mixed, network.forward = network.forward, original
        try:
            return network(*args, **kwargs)
        finally:
            network.forward = mixed


def patched(network: nn.Module, patch: nn.Module) -> Patched:
    """A ``Patched`` whose class has the name of the network's, by which memwatch knows the family."""
    named: type[Patched] = type(type(network).__name__, (Patched,), {})
    return named(network, patch)
