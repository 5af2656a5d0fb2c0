"""OneTrainer in miniature: its class names, signatures and order of calls (commit 23df3832), on the tiny pipeline.

``install`` stands for what ``import`` finds in a clone. What the trainer saves, logs and is told is kept in lists.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


class ModelType(Enum):
    STABLE_DIFFUSION_15 = "STABLE_DIFFUSION_15"
    STABLE_DIFFUSION_XL_10_BASE = "STABLE_DIFFUSION_XL_10_BASE"
    FLUX_DEV_1 = "FLUX_DEV_1"

    def __str__(self) -> str:
        return self.value

    def text_encoder_parts(self) -> tuple[str, ...]:
        is_xl = self == ModelType.STABLE_DIFFUSION_XL_10_BASE
        return ("text_encoder", "text_encoder_2") if is_xl else ("text_encoder",)

    def model_parts(self) -> tuple[str, ...]:
        return ("unet", *self.text_encoder_parts(), "vae")


class TrainingMethod(Enum):
    LORA = "LORA"
    FINE_TUNE = "FINE_TUNE"
    EMBEDDING = "EMBEDDING"

    def __str__(self) -> str:
        return self.value


class DataType(Enum):
    FLOAT_32 = "FLOAT_32"
    BFLOAT_16 = "BFLOAT_16"

    def __str__(self) -> str:
        return self.value


class TrainConfig:
    """Typed values; enums are named in files."""

    def __init__(self) -> None:
        values: dict[str, Any] = {
            "model_type": ModelType.STABLE_DIFFUSION_15,
            "training_method": TrainingMethod.LORA,
            "base_model_name": "",
            "output_model_destination": "",
            "workspace_dir": "",
            "train_device": "cpu",
            "temp_device": "cpu",
            "train_dtype": DataType.FLOAT_32,
            "resolution": "16",
            "epochs": 2,
            "batch_size": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2,
            "text_encoder_train": True,
            "text_encoder_layer_skip": 0,
            "text_encoder_2_layer_skip": 0,
            "multi_gpu": False,
            "latent_caching": True,
            "dropout_probability": 0.2,
            "backup_after": 0,
            "backup_before_save": False,
            "continue_last_backup": False,
            "rescale_noise_scheduler_to_zero_terminal_snr": False,
        }
        self.types = {name: type(value) for name, value in values.items()}
        self.__dict__.update(values)
        self.cloud, self.secrets = SimpleNamespace(enabled=False), None

    @staticmethod
    def default_values() -> TrainConfig:
        return TrainConfig()

    def from_dict(self, data: dict[str, Any], migrate: bool = True) -> TrainConfig:
        for name, value in data.items():
            kind = self.types[name]
            setattr(self, name, kind[value] if issubclass(kind, Enum) else kind(value))
        return self

    def train_any_embedding(self) -> bool:
        return self.training_method == TrainingMethod.EMBEDDING

    def train_any_output_embedding(self) -> bool:
        return False


class TrainArgs:
    @staticmethod
    def parse_args() -> Any:
        parser = argparse.ArgumentParser()
        parser.add_argument("--preset-path", required=False)
        parser.add_argument("--config-path", required=True)
        parser.add_argument("--secrets-path", required=False)
        parser.add_argument("--config-value", dest="config_values", action="append")
        return parser.parse_args()


class TrainCommands:
    def __init__(self, on_command: Any = None) -> None:
        self.stopped = False

    def stop(self) -> None:
        self.stopped = True

    def get_stop_command(self) -> bool:
        return self.stopped


class TrainCallbacks:
    """Swallows what its functions raise."""

    def __init__(self, on_update_train_progress: Any = None, on_update_status: Any = None, **more: Any) -> None:
        self.progress, self.status = on_update_train_progress, on_update_status

    def on_update_train_progress(self, train_progress: Any, max_step: int, max_epoch: int) -> None:
        with contextlib.suppress(Exception):
            self.progress(train_progress, max_step, max_epoch)

    def on_update_status(self, status: str) -> None:
        with contextlib.suppress(Exception):
            self.status(status)


class PeftBase(nn.Module):
    """Takes the place of a layer's ``forward``, ``train`` and ``eval``."""

    def __init__(self, layer: nn.Linear, dropout: float) -> None:
        super().__init__()
        self._orig_module = [layer]
        self.lora_down, self.dropout = nn.Linear(layer.in_features, 2, bias=False), nn.Dropout(dropout)
        self.lora_up = nn.Linear(2, layer.out_features, bias=False)
        nn.init.zeros_(self.lora_up.weight)

    def hook_to_module(self) -> None:
        layer = self._orig_module[0]
        self.orig_forward, self.orig_train, self.orig_eval = layer.forward, layer.train, layer.eval
        layer.forward, layer.train, layer.eval = self.forward, self._wrap_train, self._wrap_eval

    def _wrap_train(self, mode: bool = True) -> None:
        self.orig_train(mode)
        self.train(mode)

    def _wrap_eval(self) -> None:
        self.orig_eval()
        self.eval()

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return self.orig_forward(x) + self.lora_up(self.dropout(self.lora_down(x)))


class LoRAModuleWrapper:
    """No module."""

    def __init__(self, module: nn.Module, ends: tuple[str, ...], dropout: float) -> None:
        layers = [(name, layer) for name, layer in module.named_modules() if name.split(".")[-1] in ends]
        self.lora_modules = {name: PeftBase(layer, dropout) for name, layer in layers}
        for lora in self.lora_modules.values():
            lora.hook_to_module()

    def parameters(self) -> list[nn.Parameter]:
        return [p for module in self.lora_modules.values() for p in module.parameters()]

    def to(self, device: Any = None, dtype: Any = None) -> None:
        for module in self.lora_modules.values():
            module.to(device, dtype)


class Model:
    """A ``StableDiffusionModel``, or a ``StableDiffusionXLModel`` with its own names."""

    def __init__(self, config: TrainConfig) -> None:
        self.model_type, self.train_config = config.model_type, config
        self.train_progress = SimpleNamespace(epoch=0, global_step=0)
        self.moved: list[str] = []
        path, is_xl = config.base_model_name, "XL" in str(config.model_type)
        self.unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet")
        self.vae = AutoencoderKL.from_pretrained(path, subfolder="vae")
        self.noise_scheduler = DDIMScheduler.from_pretrained(path, subfolder="scheduler")
        kinds = (CLIPTextModel, CLIPTextModelWithProjection)
        for i, part in enumerate(self.model_type.text_encoder_parts()):
            ours = f"_{i + 1}" if is_xl else ""
            setattr(self, f"text_encoder{ours}", kinds[i].from_pretrained(path, subfolder=part))
            tokenizer = CLIPTokenizer.from_pretrained(path, subfolder=part.replace("text_encoder", "tokenizer"))
            setattr(self, f"tokenizer{ours}", tokenizer)

    @property
    def train_device(self) -> torch.device:
        return torch.device(self.train_config.train_device)

    def named(self, part: str) -> Any:
        stem = f"{part}_1" if hasattr(self, f"{part}_1") else part
        return getattr(self, stem)  # raises when there is no such part

    def materialize(self, *parts: str) -> None:
        for part in parts:
            self.named(part)
            self.moved.append(part)

    def eval(self) -> None:
        for part in self.model_type.model_parts():
            self.named(part).eval()


class ModelSetup:
    def setup_model(self, model: Model, config: TrainConfig) -> None:
        """LoRA, or everything; ``model.parameters`` is what is trained."""
        trains_text = config.text_encoder_train and hasattr(model, "text_encoder")
        parts = [model.named(part) for part in model.model_type.model_parts()]
        if config.training_method == TrainingMethod.FINE_TUNE:
            for part in parts:
                part.requires_grad_(part is model.unet or (trains_text and part is model.text_encoder))
            model.parameters = [p for part in parts for p in part.parameters() if p.requires_grad]
            return
        for part in parts:
            part.requires_grad_(False)
        model.unet_lora = LoRAModuleWrapper(model.unet, ("to_q", "to_v"), config.dropout_probability)
        model.parameters = model.unet_lora.parameters()
        model.text_encoder_lora = None
        if trains_text:
            model.text_encoder_lora = LoRAModuleWrapper(model.text_encoder, ("q_proj",), config.dropout_probability)
            model.parameters += model.text_encoder_lora.parameters()

    def setup_train_device(self, model: Model, config: TrainConfig) -> None:
        model.vae.eval()
        model.unet.train()
        if hasattr(model, "text_encoder"):
            model.text_encoder.train(config.text_encoder_train)

    def predict(self, model: Model, latents: Any, config: TrainConfig, progress: Any) -> Any:
        generator = torch.Generator().manual_seed(progress.global_step)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (len(latents),), generator=generator)
        noisy, added = model.noise_scheduler.add_noise(latents, noise, timesteps), None
        if hasattr(model, "text_encoder"):
            ids = model.tokenizer("a photo of a cat", padding="max_length", return_tensors="pt").input_ids
            hidden = model.text_encoder(ids)[0].expand(len(latents), -1, -1)
        else:
            hidden = torch.ones(len(latents), 3, model.unet.config.cross_attention_dim)
            added = {"text_embeds": torch.ones(len(latents), 16), "time_ids": torch.ones(len(latents), 6)}
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train_dtype == DataType.BFLOAT_16):
            output = model.unet(noisy, timesteps, hidden, added_cond_kwargs=added).sample
        return nn.functional.mse_loss(output.float(), noise)


class GenericTrainer:
    def __init__(self, config: TrainConfig, callbacks: TrainCallbacks, commands: TrainCommands) -> None:
        self.config, self.callbacks, self.commands = config, callbacks, commands
        self.scalars: list[tuple[str, float, int]] = []
        self.tensorboard = SimpleNamespace(add_scalar=self._add_scalar)
        self.has_ended, self.modes = False, []
        RUNS.append(self)

    def _add_scalar(self, tag: str, value: Any, global_step: int | None = None) -> None:
        self.scalars.append((tag, float(value), global_step))

    def start(self) -> None:
        set_seed(1)
        self.model, self.model_setup = Model(self.config), ModelSetup()
        self.model_setup.setup_train_device(self.model, self.config)
        self.model_setup.setup_model(self.model, self.config)
        self.model.eval()
        self.optimizer = torch.optim.AdamW(self.model.parameters, lr=self.config.learning_rate)
        if self.config.continue_last_backup:
            saved = torch.load(max(Path(self.config.workspace_dir).glob("*.backup")), weights_only=False)
            self.model.train_progress.__dict__.update(saved["progress"])
            self.optimizer.load_state_dict(saved["optimizer"])
            for parameter, value in zip(self.model.parameters, saved["parameters"], strict=True):
                parameter.data.copy_(value)

    def train(self) -> None:
        config, progress = self.config, self.model.train_progress
        generator = torch.Generator().manual_seed(2)
        rows = [torch.randn(config.batch_size, 4, 8, 8, generator=generator) for _ in range(4)]
        for _ in range(progress.epoch, config.epochs):
            if self.commands.get_stop_command():
                return
            self.callbacks.on_update_status("Starting epoch/caching")
            self.model_setup.setup_train_device(self.model, config)
            for latents in rows:
                if config.backup_after and progress.global_step % config.backup_after == 0 and progress.global_step:
                    self.backup()
                self.callbacks.on_update_status("Training ...")
                self.modes.append([module.training for module in self.model.unet.modules()])
                loss = self.model_setup.predict(self.model, latents, config, progress)
                (loss / config.gradient_accumulation_steps).backward()
                if (progress.global_step + 1) % config.gradient_accumulation_steps == 0:
                    self.optimizer.step()
                    self.optimizer.zero_grad(set_to_none=True)
                    self.tensorboard.add_scalar("loss/train_step", loss.item(), progress.global_step)
                if progress.global_step == 2:
                    self.tensorboard.add_scalar("loss/validation_step/cats", 0.5, progress.global_step)
                progress.global_step += 1
                self.callbacks.on_update_train_progress(progress, len(rows), config.epochs)
                if self.commands.get_stop_command():
                    return
            progress.epoch += 1
            self.callbacks.on_update_train_progress(progress, len(rows), config.epochs)

    def backup(self) -> None:
        self.callbacks.on_update_status("Creating backup")
        state = {
            "progress": vars(self.model.train_progress),
            "optimizer": self.optimizer.state_dict(),
            "parameters": [p.detach().clone() for p in self.model.parameters],
        }
        file = Path(self.config.workspace_dir) / f"{self.model.train_progress.global_step:04d}.backup"
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, file)
        self.model_setup.setup_train_device(self.model, self.config)

    def end(self) -> None:
        self.has_ended = True
        named = {str(i): p.detach().clone().contiguous() for i, p in enumerate(self.model.parameters)}
        save_file(named, self.config.output_model_destination)


RUNS: list[GenericTrainer] = []


def install(monkeypatch: Any) -> None:
    """Let ``import`` find them by the names that they have in a clone."""
    contents: dict[str, dict[str, Any]] = {
        "modules": {},
        "modules.util": {},
        "modules.util.create": {"create_trainer": GenericTrainer},
        "modules.util.args": {},
        "modules.util.args.TrainArgs": {"TrainArgs": TrainArgs},
        "modules.util.callbacks": {},
        "modules.util.callbacks.TrainCallbacks": {"TrainCallbacks": TrainCallbacks},
        "modules.util.commands": {},
        "modules.util.commands.TrainCommands": {"TrainCommands": TrainCommands},
        "modules.util.config": {},
        "modules.util.config.TrainConfig": {"TrainConfig": TrainConfig},
        "modules.util.config.SecretsConfig": {"SecretsConfig": SimpleNamespace(default_values=Secrets)},
        "scripts": {},
        "scripts.util": {},
        "scripts.util.import_util": {"script_imports": lambda allow_zluda=True: None},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)


class Secrets(SimpleNamespace):
    def from_dict(self, data: dict[str, Any]) -> Secrets:
        return Secrets(**data)


def write_config(folder: Path, pretrained: Path, **changes: Any) -> Path:
    """A configuration file as the UI exports it."""
    values = {
        "base_model_name": str(pretrained),
        "output_model_destination": str(folder / "saved.safetensors"),
        "workspace_dir": str(folder / "workspace"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values | changes), encoding="utf-8")
    return folder / "config.json"
