"""SimpleTuner in miniature: its class names, signatures and order of calls (commit bc8e6ab7), on the tiny pipeline."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import random
import shlex
import string
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import set_seed
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from support.builders import TOKENS
from support.processes import new_process

logger = logging.getLogger("SimpleTuner")


class StateTracker:
    accelerator: Any = None
    args: Any = None
    model: Any = None
    global_step = 0
    global_resume_step: int | None = None

    get_accelerator = classmethod(lambda cls: cls.accelerator)
    get_args = classmethod(lambda cls: cls.args)
    get_model = classmethod(lambda cls: cls.model)
    get_global_step = classmethod(lambda cls: cls.global_step)
    get_global_resume_step = classmethod(lambda cls: cls.global_resume_step)


def modules() -> dict[str, ModuleType]:
    """What ``import`` finds."""
    names = ("simpletuner", "simpletuner.helpers", "simpletuner.helpers.training")
    packages = {name: ModuleType(name) for name in names}
    for package in packages.values():
        package.__path__ = []
    made = ModuleType("simpletuner.helpers.training.state_tracker")
    made.StateTracker = StateTracker  # type: ignore[attr-defined]
    return packages | {made.__name__: made}


class Model:
    def __init__(self, config: Any, accelerator: Any) -> None:
        self.config, self.accelerator = config, accelerator
        self.text_encoders: Any = None
        self.tokenizers: Any = None

    def load(self) -> None:
        path = self.config.pretrained_model_name_or_path
        pipe = StableDiffusionPipeline.from_pretrained(path)
        self.noise_schedule = DDPMScheduler.from_pretrained(path, subfolder="scheduler")
        self.model = pipe.unet.train()
        self.text_encoders, self.tokenizers = [pipe.text_encoder.requires_grad_(False)], [pipe.tokenizer]
        if "lora" in self.config.model_type:
            from peft import LoraConfig

            self.model.requires_grad_(False)
            self.model.add_adapter(LoraConfig(r=2, lora_alpha=2, lora_dropout=0.1, target_modules=["to_q", "to_v"]))
        if self.config.train_text_encoder:
            self.text_encoders[0].requires_grad_(True)
        else:
            self.text_encoders = self.tokenizers = None  # they are unloaded once their output is cached

    def get_trained_component(self, base_model: bool = False, unwrap_model: bool = True) -> Any:
        return self.accelerator.unwrap_model(self.model) if unwrap_model else self.model


CONFIG = {
    "model_type": "lora",
    "lora_type": "Standard",
    "controlnet": False,
    "train_text_encoder": False,
    "train_batch_size": 2,
    "max_train_steps": 4,
    "checkpoint_step_interval": 2,
    "resume_from_checkpoint": None,
    "post_checkpoint_script": None,
    "custom_tracker": None,
}


class Trainer:
    """``submit`` runs a post-checkpoint script's command; there it is another thread's work."""

    def __init__(self, config: dict[str, Any], root: Path, submit: Callable[[list[str]], Any] = print) -> None:
        new_process()
        self.config, self.root, self.submit = SimpleNamespace(**CONFIG | config), root, submit
        name = self.config.custom_tracker
        log_with = None if name is None else self._load_custom_tracker(name, "simpletuner-training-run", None)
        self.accelerator = Accelerator(cpu=True, log_with=log_with)
        self.model = Model(self.config, self.accelerator)
        self.state = {"global_step": 0}
        self.is_saved = False
        StateTracker.accelerator, StateTracker.args, StateTracker.model = self.accelerator, self.config, self.model
        StateTracker.global_step, StateTracker.global_resume_step = 0, 0

    def _load_custom_tracker(self, module_name: str, run_name: str, logging_dir: str | None) -> GeneralTracker:
        path = self.root / "custom-trackers" / f"{module_name}.py"
        spec = importlib.util.spec_from_file_location(f"simpletuner.custom_trackers.{module_name}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        (tracker,) = (
            obj
            for obj in vars(module).values()
            if inspect.isclass(obj) and issubclass(obj, GeneralTracker) and obj.__module__ == module.__name__
        )
        accepts = "logging_dir" in inspect.signature(tracker.__init__).parameters
        return tracker(run_name, **({"logging_dir": logging_dir} if logging_dir and accepts else {}))

    def init_trackers(self) -> None:
        try:
            self.accelerator.init_trackers("simpletuner-training", config={"seed": 1})
        except Exception as error:
            logger.error("Could not initialize trackers: %s", error)

    def run(self) -> None:
        set_seed(1)
        self.model.load()
        self.resume_and_prepare()
        self.init_trackers()
        self.train()

    def resume_and_prepare(self) -> None:
        parts = [self.model.model, *(self.model.text_encoders or [])]
        self.params = [p for part in parts for p in part.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.params, lr=1.0)
        self.model.model, self.optimizer = self.accelerator.prepare(self.model.model, self.optimizer)
        if self.config.resume_from_checkpoint:
            name = self.config.resume_from_checkpoint
            self.accelerator.load_state(str(Path(self.config.output_dir) / name))
            self.state["global_step"] = int(name.removeprefix("checkpoint-"))
        StateTracker.global_step = StateTracker.global_resume_step = self.state["global_step"]

    def train(self) -> None:
        self.init_trackers()
        unet, schedule, text = self.model.model, self.model.noise_schedule, torch.randn(TOKENS, 16)
        while True:
            latents = torch.randn(self.config.train_batch_size, 4, 8, 8) * (1 + 0.1 * float(np.random.rand()))
            told = text.expand(len(latents), -1, -1) * float(random.random() > 0.3)
            if self.config.train_text_encoder:
                told = told + self._said()
            noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (len(latents),))
            with self.accelerator.accumulate([unet]):
                output = unet(schedule.add_noise(latents, noise, timesteps), timesteps, told).sample
                self.accelerator.backward(torch.nn.functional.mse_loss(output, noise))
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.state["global_step"] += 1
            StateTracker.global_step = self.state["global_step"]
            if self.state["global_step"] % self.config.checkpoint_step_interval == 0:
                self.checkpoint_state_save(self.config.output_dir)
            try:
                self.accelerator.log({"train_loss": 1.0}, step=self.state["global_step"])
            except Exception as error:
                logger.error("Failed to log to accelerator; ignoring error: %s", error)
            if self.state["global_step"] >= self.config.max_train_steps:
                break
        self.is_saved = True
        self.accelerator.end_training()

    def _said(self) -> torch.Tensor:
        (encoder,), (tokenizer,) = self.model.text_encoders, self.model.tokenizers
        tokens = tokenizer("a cat", padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        return encoder(tokens.input_ids)[0]

    def checkpoint_state_save(self, output_dir: str, suffix: str | None = None) -> str:
        path = Path(output_dir) / f"checkpoint-{self.state['global_step']}{f'-{suffix}' if suffix else ''}"
        self.accelerator.save_state(str(path))
        if "lora" in self.config.model_type:
            from peft import get_peft_model_state_dict

            layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.model.get_trained_component()))
            StableDiffusionPipeline.save_lora_weights(str(path), unet_lora_layers=layers)
        if self.config.post_checkpoint_script:
            run_hook_script(self.config.post_checkpoint_script, self.submit, str(path), self.state["global_step"])
        return str(path)


def run_hook_script(template: str, submit: Callable[[list[str]], Any], local_path: str, global_step: int) -> None:
    known = {"local_checkpoint_path": local_path, "global_step": str(global_step)}
    names = {name for _, name, _, _ in string.Formatter().parse(template) if name}
    submit(shlex.split(template.format(**{name: known[name] for name in names})))
