"""ai-toolkit in miniature: its class names, signatures and order of calls (commit 27a03a91), on the tiny pipeline.

``MODULES`` stands for what ``import`` finds in a clone. What a trainer saves, samples and logs is kept in lists.
"""

from __future__ import annotations

import random
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler, StableDiffusionPipeline
from support.builders import TOKENS
from support.processes import new_process
from torch import Tensor, nn


class Extension:
    name: str | None = None
    uid: str | None = None

    @classmethod
    def get_process(cls) -> Any: ...


class LoRAModule(nn.Module):
    """Hangs in the ``forward`` of a linear layer."""

    def __init__(self, lora_name: str, org_module: nn.Linear, lora_dim: int, network: Any) -> None:
        super().__init__()
        self.lora_name, self.org_module, self.network_ref = lora_name, [org_module], lambda: network
        self.lora_down = nn.Linear(org_module.in_features, lora_dim, bias=False)
        self.lora_up = nn.Linear(lora_dim, org_module.out_features, bias=False)
        self.dropout = 0.1
        nn.init.zeros_(self.lora_up.weight)

    def apply_to(self) -> None:
        self.org_forward = self.org_module[0].forward
        self.org_module[0].forward = self.forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        network = self.network_ref()
        if not network.is_active or network._multiplier == 0:
            return self.org_forward(x, *args, **kwargs)
        down = self.lora_down(x.to(self.lora_down.weight.dtype))
        added = self.lora_up(nn.functional.dropout(down, self.dropout, self.training))
        strength = network.torch_multiplier
        if len(added) != len(strength):  # a batch that is no multiple of it fails below, as theirs does
            strength = strength.repeat_interleave(len(added) // len(strength))
        return self.org_forward(x, *args, **kwargs) + (added * strength[:, None, None]).to(x.dtype)


class LoRASpecialNetwork(nn.Module):
    def __init__(self, text_encoder: Any, unet: nn.Module, train_text_encoder: bool) -> None:
        super().__init__()
        self.is_active, self._multiplier = False, 1.0
        named = [("lora_unet", unet)] + ([("lora_te", text_encoder)] if train_text_encoder else [])
        self.loras = [
            LoRAModule(f"{prefix}_{name.replace('.', '_')}", layer, 2, self)
            for prefix, model in named
            for name, layer in model.named_modules()
            if name.endswith(("to_q", "to_v", "q_proj", "v_proj"))
        ]
        self._update_torch_multiplier()

    def apply_to(self) -> None:
        for lora in self.loras:
            lora.apply_to()
            self.add_module(lora.lora_name, lora)

    def _update_torch_multiplier(self) -> None:
        value = self._multiplier if isinstance(self._multiplier, list) else [self._multiplier]
        self.torch_multiplier = torch.tensor(value)

    @property
    def multiplier(self) -> Any:
        return self._multiplier

    @multiplier.setter
    def multiplier(self, value: Any) -> None:
        if self._multiplier != value:
            self._multiplier = value
            self._update_torch_multiplier()

    def __enter__(self) -> None:
        self.is_active = True

    def __exit__(self, *error: object) -> None:
        self.is_active = False


class FakeTextEncoder(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class StableDiffusion:
    def __init__(self, name_or_path: str) -> None:
        self.pipeline = pipe = StableDiffusionPipeline.from_pretrained(name_or_path)
        self.unet, self.vae, self.text_encoder, self.tokenizer = pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer
        self.noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        self.network: Any = None

    def encode_prompt(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids)[0]


class Logger:
    def __init__(self) -> None:
        self.waiting: dict[str, Any] = {}
        self.committed: list[tuple[int | None, dict[str, Any]]] = []
        self.is_finished = False

    def start(self) -> None: ...

    def log(self, log_dict: dict[str, Any]) -> None:
        self.waiting |= log_dict

    def commit(self, step: int | None = None) -> None:
        self.committed.append((step, self.waiting))
        self.waiting = {}

    def finish(self) -> None:
        self.is_finished = True


TRAIN = {
    "steps": 4,
    "batch_size": 2,
    "train_text_encoder": False,
    "merge_network_on_save": False,
    "do_paramiter_swapping": False,
    "disable_sampling": False,
    "gradient_checkpointing": False,
    "cache_text_embeddings": False,
}


class BaseSDTrainProcess:
    def __init__(self, process_id: int, job: Any, config: dict[str, Any], custom_pipeline: Any = None) -> None:
        self.config, self.job = config, job
        self.accelerator = Accelerator(cpu=True)
        self.save_root = str(Path(config["training_folder"]) / job.name)
        network = self.get_conf("network")
        self.network_config = SimpleNamespace(**network) if network is not None else None
        self.train_config = SimpleNamespace(**TRAIN | self.get_conf("train", {}))
        self.embed_config = self.get_conf("embedding")
        self.save_every, self.validate_every = config.get("save_every"), config.get("validate_every")
        self.logger, self.progress_bar, self.network = Logger(), None, None
        self.step_num = self.start_step = 0
        self.additional_logs: dict[str, float] = {}
        self.saved: list[int | None] = []
        self.sampled: list[int] = []
        self.is_done = False

    def get_conf(self, key: str, default: Any = None) -> Any:
        return self.config.get(key, default)

    def hook_before_train_loop(self) -> None:
        self.logger.start()
        self.sd.vae = self.accelerator.prepare(self.sd.vae)
        self.sd.unet = self.accelerator.prepare(self.sd.unet)
        if self.sd.network is not None:
            self.sd.network = self.accelerator.prepare(self.sd.network)
        self.optimizer = self.accelerator.prepare(self.optimizer)

    def ensure_params_requires_grad(self) -> None:
        for param in self.params:
            param.requires_grad_(True)

    def sample(self, step: int | None = None, is_first: bool = False) -> None:
        self.sampled.append(step)

    def save(self, step: int | None = None) -> None:
        self.saved.append(step)
        torch.save([p.detach().clone() for p in self.params], Path(self.save_root) / "weights.pt")
        Path(self.save_root, "step.txt").write_text(str(self.step_num), encoding="utf-8")
        self.post_save_hook(str(Path(self.save_root) / "weights.pt"))

    def post_save_hook(self, save_path: str) -> None: ...

    def done_hook(self) -> None:
        self.is_done = True

    def end_step_hook(self) -> None: ...

    def validate(self) -> None:
        self.additional_logs["val/loss"] = float(self.step_num)

    def run(self) -> None:
        train, job = self.train_config, Path(self.save_root)
        job.mkdir(parents=True, exist_ok=True)
        set_seed(1)
        self.sd = StableDiffusion(self.config["model"]["name_or_path"])
        for model in (self.sd.unet, self.sd.text_encoder, self.sd.vae):
            model.requires_grad_(False).eval()
        if train.gradient_checkpointing:
            self.sd.unet.enable_gradient_checkpointing()
        self.params = list(self.sd.unet.parameters())
        if self.network_config is not None:
            self.network = LoRASpecialNetwork(self.sd.text_encoder, self.sd.unet, train.train_text_encoder)
            self.sd.network = self.network
            self.network.apply_to()
            self.params = list(self.network.parameters())
        if (job / "weights.pt").is_file():
            for param, kept in zip(self.params, torch.load(job / "weights.pt"), strict=True):
                param.data.copy_(kept)
            self.step_num = self.start_step = int((job / "step.txt").read_text(encoding="utf-8"))
        self.ensure_params_requires_grad()
        self.optimizer = torch.optim.SGD(self.params, lr=1.0)
        self.hook_before_train_loop()
        self.sample(self.step_num)
        self.sd.unet.train()
        self.ensure_params_requires_grad()
        for step in range(self.step_num, train.steps):
            self.step_num = step
            with self.accelerator.accumulate([self.sd.unet]):
                loss_dict = self.hook_train_loop([self.batch()])
            if self.validate_every and step % self.validate_every == 0:
                self.validate()
            with torch.no_grad():
                if step != self.start_step and self.save_every and step % self.save_every == 0:
                    self.save(step)
                self.logger.log(loss_dict)
                self.logger.commit(step=step)
                self.step_num = step + 1
                self.end_step_hook()
        self.accelerator.wait_for_everyone()
        self.save()
        if not train.disable_sampling:
            self.sample(self.step_num)
        self.logger.finish()
        self.accelerator.end_training()
        self.done_hook()

    def batch(self) -> tuple[Tensor, list[str]]:
        """Draws from the streams of Python, NumPy and torch: all three are watched."""
        latents = torch.randn(self.train_config.batch_size, 4, 8, 8) * (1 + 0.1 * float(np.random.rand()))
        return latents, [random.choice(["a cat", "a dog"]) for _ in latents]


class SDTrainer(BaseSDTrainProcess):
    def hook_before_train_loop(self) -> None:
        super().hook_before_train_loop()
        self.sd.vae.to("cpu")
        self.cached = None
        if self.train_config.cache_text_embeddings:
            with torch.no_grad():
                self.cached = {prompt: self.sd.encode_prompt([prompt]) for prompt in ("a cat", "a dog")}
            self.sd.text_encoder = self.sd.pipeline.text_encoder = FakeTextEncoder()

    def hook_train_loop(self, batch: list[Any]) -> dict[str, float]:
        ((latents, prompts),) = batch
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (len(latents),))
        noisy = self.sd.noise_scheduler.add_noise(latents, noise, timesteps)

        def loss() -> Tensor:
            told = self.sd.encode_prompt(prompts) if not self.cached else torch.cat([self.cached[p] for p in prompts])
            return nn.functional.mse_loss(
                self.sd.unet(noisy, timestep=timesteps, encoder_hidden_states=told).sample, noise
            )

        self.optimizer.zero_grad()
        if self.network is None:
            self.accelerator.backward(found := loss())
        else:
            self.network.multiplier = [1.0] * len(latents)
            with self.network:
                self.accelerator.backward(found := loss())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": float(found.detach())}


class DiffusionTrainer(SDTrainer): ...


def module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(contents, __path__=[])
    return made


TRAINERS = "extensions_built_in.sd_trainer"
MODULES = {
    "toolkit": module("toolkit"),
    "toolkit.extension": module("toolkit.extension", Extension=Extension),
    "extensions_built_in": module("extensions_built_in"),
    TRAINERS: module(TRAINERS),
    f"{TRAINERS}.DiffusionTrainer": module(f"{TRAINERS}.DiffusionTrainer", DiffusionTrainer=DiffusionTrainer),
}


def run_job(process: type, config: dict[str, Any], name: str = "job") -> Any:
    """What ``run.py`` does with a job of one process; the process."""
    new_process()
    made = process(0, SimpleNamespace(name=name), config)
    made.run()
    return made
