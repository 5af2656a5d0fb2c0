"""The one place that knows foreign models: every family becomes ``epsilon = denoiser(noisy_latents, timesteps, conditioning)``.

A new family is one subclass of ``Denoiser`` and one entry in ``FAMILIES``.
"""

from __future__ import annotations

import logging
import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memwatch.noise import NoiseSchedule

logger = logging.getLogger("memwatch")

Conditioning = Mapping[str, Tensor]  # of one probe, without batch dimension; on the CPU


@dataclass
class Components:
    """What turns probes into latents and conditioning. Any of them may be the user's own."""

    scheduler: Any
    vae: Any = None
    text_encoder: Any = None
    tokenizer: Any = None


class Denoiser(ABC):
    """A model of one family, called with one signature.

    Args:
        model: the bare network, unwrapped.
        schedule: its noise schedule and prediction type.
    """

    name: str
    needs_text: bool = True
    once: bool = True  # whether one forward pass serves several backward passes

    def __init__(self, model: nn.Module, schedule: NoiseSchedule) -> None:
        self.model = model
        self.schedule = schedule

    @classmethod
    @abstractmethod
    def fits(cls, model: nn.Module) -> bool:
        """Whether ``model`` belongs to this family, judged by its config."""

    @abstractmethod
    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The model's own output; ``conditioning`` batched, everything on the model's device and in its dtype."""

    @abstractmethod
    def encode(self, prompts: Sequence[str], components: Components) -> list[Conditioning]:
        """Conditioning of every prompt (the empty prompt is the unconditional branch)."""

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def latent_channels(self) -> int:
        return int(_get(self.model, "in_channels"))

    @property
    def sample_size(self) -> int | None:
        """Side of the latents that the model was made for."""
        size = _get(self.model, "sample_size")
        return size if isinstance(size, int) else size[0] if size else None

    def __call__(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """epsilon, float32.

        Args:
            noisy_latents: ``(b, c, h, w)``, float32, on the model's device.
            timesteps: ``(b,)``.
            conditioning: as ``stack`` returns it.
        """
        output = self.predict(noisy_latents.to(self.dtype), timesteps, conditioning)
        return self.schedule.epsilon(output.float(), noisy_latents, timesteps)

    def stack(self, items: Sequence[Conditioning]) -> Conditioning:
        """A batch on the model's device, floating point in its dtype."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

        return {key: moved(torch.stack([item[key] for item in items])) for key in items[0]}


class StableDiffusion(Denoiser):
    """Stable Diffusion 1.x and 2.x: ``UNet2DConditionModel``, one CLIP text encoder; epsilon or v_prediction; full or LoRA."""

    name = "Stable Diffusion 1.x / 2.x"

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        same_channels = _get(model, "in_channels") is not None and _get(model, "in_channels") == _get(model, "out_channels")
        other = any(_get(model, key) for key in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type"))
        return same_channels and bool(_get(model, "cross_attention_dim")) and not other

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        hidden = conditioning["encoder_hidden_states"]
        output: Tensor = self.model(noisy_latents, timesteps, encoder_hidden_states=hidden, return_dict=False)[0]
        return output

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], components: Components) -> list[Conditioning]:
        tokenizer, text_encoder = components.tokenizer, components.text_encoder
        encoded: list[Conditioning] = []
        for prompt in prompts:
            warn_if_cut(prompt, tokenizer)
            limit = tokenizer.model_max_length
            tokens = tokenizer(prompt, padding="max_length", truncation=True, max_length=limit, return_tensors="pt").to(text_encoder.device)
            mask = tokens.attention_mask if getattr(text_encoder.config, "use_attention_mask", False) else None
            # clone: a tensor made under inference_mode could not enter a backward pass later
            encoded.append({"encoder_hidden_states": text_encoder(tokens.input_ids, attention_mask=mask)[0][0].float().cpu().clone()})
        return encoded


FAMILIES: tuple[type[Denoiser], ...] = (StableDiffusion,)


def make_denoiser(model: nn.Module, schedule: NoiseSchedule) -> Denoiser:
    """The denoiser of ``model``'s family.

    Raises:
        ValueError: no known family fits; the message says what the model's config holds and which families exist.
    """
    for family in FAMILIES:
        if family.fits(model):
            return family(model, schedule)
    keys = ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type", "class_embed_type")
    seen = ", ".join(f"{key}={_get(model, key)!r}" for key in keys)
    known = "; ".join(family.name for family in FAMILIES)
    raise ValueError(f"model {type(model).__name__} ({seen}) is of no family that memwatch knows: {known}")


def _get(model: nn.Module, key: str) -> Any:
    config = getattr(model, "config", None)
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def warn_if_cut(prompt: str, tokenizer: Any) -> None:
    """Say which words of a prompt the tokenizer has no room for."""
    ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
    limit = tokenizer.model_max_length
    if len(ids) > limit:
        cut = tokenizer.decode(ids[limit - 1 : -1])  # the last place is the end token's
        logger.warning("probe prompt %r is longer than %d tokens; cut: %r", prompt, limit, cut)


def unwrap(model: nn.Module) -> nn.Module:
    """The eager network inside DDP, ``torch.compile`` and ``PeftModel`` wrappers; nothing is changed on the way."""
    from accelerate.utils import extract_model_from_parallel

    model = extract_model_from_parallel(model, keep_fp32_wrapper=True, keep_torch_compile=False)
    model = getattr(model, "_orig_mod", model)
    base: Any = getattr(model, "get_base_model", lambda: model)
    inner: nn.Module = base()
    return inner


@contextmanager
def borrow(*models: nn.Module) -> Iterator[None]:
    """Use networks in eval mode, eagerly and without autocast, and give them and every random number generator back exactly as found.

    accelerate's mixed-precision wrapper re-enters autocast by itself, so it is bypassed, not disabled.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    forwards = [(model, model.__dict__["forward"]) for model in models if "_original_forward" in model.__dict__]
    python, numpy_, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    grad_enabled = torch.is_grad_enabled()
    try:
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(torch.autocast(_device_type(models), enabled=False))
            for model in models:
                model.eval()
            for model, _ in forwards:
                model.forward = model.__dict__["_original_forward"]
            yield
    finally:
        for module, training in modes:
            module.training = training
        for model, forward in forwards:
            model.forward = forward
        torch.set_grad_enabled(grad_enabled)
        random.setstate(python)
        np.random.set_state(numpy_)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def _device_type(models: Sequence[nn.Module]) -> str:
    return next((p.device.type for model in models for p in model.parameters()), "cpu")


def load_components(pretrained: Any, given: Components, *, needs_vae: bool, needs_text: bool, device: torch.device) -> Components:
    """Fill in what the caller did not pass, from a folder, a hub id or a ``DiffusionPipeline``. The denoiser itself is never loaded.

    Raises:
        ValueError: something is needed that is neither passed nor in ``pretrained``; or ``pretrained`` cannot be read.
    """
    wanted = {"scheduler": True, "vae": needs_vae, "text_encoder": needs_text, "tokenizer": needs_text}
    missing = [name for name, needed in wanted.items() if needed and getattr(given, name) is None]
    if not missing:
        return given
    if pretrained is None:
        raise ValueError(f"pass {', '.join(name + '=' for name in missing)} or a pretrained path, hub id or pipeline to load them from")
    source = _read_pipeline(pretrained, missing) if isinstance(pretrained, str) or hasattr(pretrained, "__fspath__") else pretrained
    found: dict[str, Any] = {name: getattr(source, name, None) for name in missing}
    if absent := [name for name, part in found.items() if part is None]:
        raise ValueError(f"pretrained {pretrained!r} has no {', '.join(absent)}; pass {', '.join(name + '=' for name in absent)}")
    if source is not pretrained:
        for name in {"vae", "text_encoder"} & set(found):
            found[name] = found[name].to(device).eval().requires_grad_(False)
    return Components(**{name: found.get(name, getattr(given, name)) for name in wanted})


def _read_pipeline(pretrained: Any, names: Sequence[str]) -> Any:
    """A pipeline of just the named parts, float32."""
    from diffusers import DiffusionPipeline

    try:
        config = DiffusionPipeline.load_config(pretrained)
        skipped: dict[str, Any] = {name: None for name in config if not name.startswith("_") and name not in names}
        skipped |= {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in config else {}
        return DiffusionPipeline.from_pretrained(pretrained, dtype=torch.float32, **skipped)
    except (OSError, ValueError) as error:
        raise ValueError(f"pretrained {str(pretrained)!r} cannot be loaded: {error}") from error
