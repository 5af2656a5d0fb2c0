"""LoRA files of every trainer, on every family: what is loaded predicts what the trained model predicts."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import FluxLoraLoaderMixin
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from support import trainers as by
from support.builders import maps
from support.families import PROMPT, SIZE, adapted, network
from torch import nn

from memwatch.scan.checkpoint_store import copy_text_encoders
from memwatch.scan.checkpoints import copy_into, load_model, read_weights, text_encoders
from memwatch.scan.weight_files import CheckpointError

FAMILIES = ("sd1", "sdxl", "sd3", "flux")
UNET = [*by.WIDE, "proj_in", "conv1", "conv2", "time_emb_proj", "conv_shortcut"]
JOINT = ["norm1.linear", "norm1_context.linear", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
LAYERS = {
    "sd1": [*UNET, "downsamplers.0.conv", "linear_1"],
    "sdxl": [*UNET, "upsamplers.0.conv"],
    "sd3": [*by.WIDE, *JOINT, "ff_context.net.0.proj", "norm_out.linear", "pos_embed.proj"],
    "flux": [*JOINT, "norm.linear", "ff.net.0.proj", "ff.net.2", "ff_context.net.2", "x_embedder", "context_embedder"],
}
LAYERS["flux"] += [f"transformer_blocks.0.attn.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")]
LAYERS["flux"] += ["timestep_embedder.linear_1", "guidance_embedder.linear_2", "text_embedder.linear_1"]
RANK, ALPHA = 2, 3  # a scale of 1.5


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, families):
    """Name of the family, and its denoiser with a LoRA in it; tests must not change it."""
    model = copy.deepcopy(network(families[request.param]))
    return request.param, by.with_lora(model, LAYERS[request.param], rank=RANK, alpha=ALPHA).eval()


def named(model: nn.Module, name: str) -> by.Factors:
    """The layers under the names that most trainers give them: for SDXL and Flux those of the original repository."""
    return by.joined(by.factors_of(model), model) if name in ("sdxl", "flux") else by.factors_of(model)


def kohya(model: nn.Module, name: str):
    return by.kohya(named(model, name), "lora_unet_")


def comfyui(model: nn.Module, name: str, names: str = "AB"):
    return by.dotted(named(model, name), "diffusion_model.", alphas=True, names=names)


def part_of(name: str) -> str:
    return "unet" if name in ("sd1", "sdxl") else "transformer"


WRITERS = {
    "kohya": kohya,
    "comfyui": comfyui,
    "comfyui-down-up": lambda model, name: comfyui(model, name, "down/up"),
    "onetrainer": lambda model, name: by.kohya(by.factors_of(model), f"lora_{part_of(name)}_"),
    "ai-toolkit": lambda model, name: by.dotted(by.factors_of(model), f"{part_of(name)}."),
    "peft": lambda model, _: by.dotted(by.factors_of(model), "base_model.model."),
}


def predicted(model: nn.Module, pipe: DiffusionPipeline, encoders=None) -> torch.Tensor:
    """Epsilon of fixed noise and a fixed prompt; ``encoders`` in place of the pipeline's."""
    denoiser, parts = adapted(pipe)
    denoiser.model = model
    if encoders is not None:
        parts.text_encoders = encoders
    noisy = torch.randn(1, denoiser.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    said = denoiser.stack([denoiser.encode(PROMPT, parts, SIZE)])
    with torch.no_grad():
        return denoiser(noisy, torch.tensor([301]), said)


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal but for the order in which alpha / rank is multiplied."""
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)


def sd1_lora(families, layers=("to_q",), **options) -> nn.Module:
    """A Stable Diffusion 1 network with a LoRA in it."""
    return by.with_lora(copy.deepcopy(network(families["sd1"])), list(layers), **options).eval()


@pytest.mark.parametrize("writer", WRITERS)
def test_every_trainers_names(trained, writer, families, family_folders, tmp_path):
    name, model = trained
    save_file(WRITERS[writer](model, name), tmp_path / "lora.safetensors")
    loaded = load_model(str(tmp_path / "lora.safetensors"), family_folders[name])
    ours, base = predicted(loaded, families[name]), predicted(network(families[name]), families[name])
    assert_close(ours, predicted(model, families[name]))
    assert (ours - base).abs().max() > 0.01
    assert len(by.factors_of(loaded)) == len(by.factors_of(model))


@pytest.mark.parametrize("settings", ["adapter_config.json", "metadata", None])
def test_files_whose_alpha_lies_beside_the_tensors(trained, settings, families, family_folders, tmp_path):
    """PEFT's folder and diffusers' file; where nothing tells alpha, diffusers takes the rank."""
    name, model = trained
    part = part_of(name)
    if settings == "adapter_config.json":
        by.save_peft(tmp_path / "lora", model, ALPHA, RANK)
    else:
        layers = {f"{part}_lora_layers": get_peft_model_state_dict(model, adapter_name="default")}
        layers |= {f"{part}_lora_adapter_metadata": model.peft_config["default"].to_dict()} if settings else {}
        families[name].save_lora_weights(tmp_path / "lora", **layers)
    loaded = load_model(str(tmp_path / "lora"), family_folders[name])
    ours, theirs = predicted(loaded, families[name]), predicted(model, families[name])
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=2e-4) == (settings is not None)


# --- text encoders ----------------------------------------------------------------------------------------------------

PREFIXES = {
    "sd1": ("lora_te_",),
    "sdxl": ("lora_te1_", "lora_te2_"),
    "sd3": ("lora_te1_", "lora_te2_"),
    "flux": ("lora_te1_", "lora_te3_"),
}


def encoder_names(name: str) -> list[str]:
    return ["text_encoder", "text_encoder_2"][: len(PREFIXES[name])]


def trained_encoders(pipe: DiffusionPipeline, names: list[str]) -> list[nn.Module]:
    encoders = []
    for name in names:
        encoder = copy.deepcopy(getattr(pipe, name))
        targets = ["q", "wo"] if type(encoder).__name__.startswith("T5") else by.TEXT
        encoders.append(by.with_lora(encoder, targets, rank=RANK, alpha=ALPHA, seed=1).eval())
    return encoders


@pytest.mark.parametrize("writer", ["kohya", "diffusers", "comfyui"])
def test_the_text_encoders_lora(trained, writer, families, family_folders, tmp_path, caplog):
    """kohya trains them by default; prompts are encoded with it, and without it where a later file has none.

    Embeddings that were trained along are left out, which is said once.
    """
    name, model = trained
    pipe, names = families[name], encoder_names(name)
    encoders = trained_encoders(pipe, names)
    tensors = kohya(model, name) | {"bundle_emb.<cat>.clip_l": torch.zeros(1, 16)}
    comfy = {"text_encoder": "clip_l", "text_encoder_2": "t5xxl" if name == "flux" else "clip_g"}
    for encoder, part, prefix in zip(encoders, names, PREFIXES[name], strict=True):
        factors = by.factors_of(encoder)
        if not type(encoder).__name__.startswith("T5"):
            factors = by.text_prefixed(factors)
        if writer == "kohya":
            tensors |= by.kohya(factors, prefix)
        elif writer == "diffusers":
            tensors |= by.dotted(factors, f"{part}.")
        else:
            tensors |= by.dotted(factors, f"text_encoders.{comfy[part]}.transformer.", alphas=True)
    source = str(tmp_path / "lora.safetensors")
    save_file(tensors, source)
    assert text_encoders(source) == names

    denoiser, parts = adapted(pipe)
    ours = tuple(copy.deepcopy(encoder) for encoder in parts.text_encoders)
    copy_text_encoders(source, denoiser, ours)
    theirs = (*encoders, *parts.text_encoders[len(encoders) :])
    loaded = load_model(source, family_folders[name])
    base = predicted(loaded, pipe)
    assert_close(predicted(loaded, pipe, ours), predicted(model, pipe, theirs))
    assert (predicted(loaded, pipe, ours) - base).abs().max() > 1e-4
    assert caplog.text.count("memwatch ignores the trained embeddings") == 1

    save_file(kohya(model, name), tmp_path / "without.safetensors")
    copy_text_encoders(str(tmp_path / "without.safetensors"), denoiser, ours)
    assert torch.equal(predicted(loaded, pipe, ours), base)


# --- one after the other ----------------------------------------------------------------------------------------------


def test_a_later_file_replaces_the_earlier_one(families, family_folders, tmp_path):
    """Also where alpha has changed; never where the rank or the layers have."""
    options = ({"alpha": 2}, {"alpha": 1, "seed": 1}, {"rank": 3, "alpha": 3}, {"layers": ["to_q", "to_k"]})
    models = [sd1_lora(families, **each) for each in options]
    files = [str(tmp_path / f"lora-{number}.safetensors") for number in range(len(models))]
    for model, file in zip(models, files, strict=True):
        save_file(kohya(model, "sd1"), file)
    loaded = load_model(files[0], family_folders["sd1"])
    copy_into(loaded, read_weights(files[1], loaded))
    assert torch.equal(predicted(loaded, families["sd1"]), predicted(models[1], families["sd1"]))
    with pytest.raises(CheckpointError, match=r"lora-2.safetensors: .*has shape \(3, 16\), the model \(2, 16\)"):
        read_weights(files[2], loaded)
    with pytest.raises(CheckpointError, match="no such parameter"):
        read_weights(files[3], loaded)
    with pytest.raises(CheckpointError, match="of the model's parameters are missing"):
        read_weights(files[0], load_model(files[3], family_folders["sd1"]))


def test_ranks_that_differ_from_layer_to_layer(families, family_folders, tmp_path):
    model = sd1_lora(families, ["to_q", "to_k"], alpha=3)
    factors = by.factors_of(model)
    first = next(iter(factors))
    down, up, alpha = factors[first]
    wider = torch.cat([down, torch.zeros_like(down)]), torch.cat([up, torch.zeros_like(up)], dim=1), 2 * alpha
    save_file(by.kohya(factors | {first: wider}, "lora_unet_"), tmp_path / "lora.safetensors")
    loaded = load_model(str(tmp_path / "lora.safetensors"), family_folders["sd1"])
    assert len(by.factors_of(loaded)[first][0]) == 4
    torch.testing.assert_close(predicted(loaded, families["sd1"]), predicted(model, families["sd1"]))


def test_the_command_turns_both_loras_off_for_the_base(scan, pretrained, pipeline, prompts, tmp_path):
    """Only the text encoder's LoRA does anything: the base is told what the base's own encoder says."""
    idle = by.with_lora(copy.deepcopy(pipeline.unet), ["to_q"])
    still = {layer: (down, 0 * up, alpha) for layer, (down, up, alpha) in by.factors_of(idle).items()}
    encoder = by.with_lora(copy.deepcopy(pipeline.text_encoder), by.TEXT)
    text = by.text_prefixed(by.factors_of(encoder))
    run = tmp_path / "run"
    run.mkdir()
    for step, factors in ((1, {layer: (down, 0 * up, alpha) for layer, (down, up, alpha) in text.items()}), (2, text)):
        save_file(
            by.kohya(still, "lora_unet_") | by.kohya(factors, "lora_te_"), run / f"cat-step{step:08d}.safetensors"
        )
    arguments = ("--baseline", "base", "--pretrained", pretrained, "--prompts", prompts)
    for step, changed in ((1, False), (2, True)):
        assert scan(run / f"cat-step{step:08d}.safetensors", *arguments)[0] == 0
        assert (maps(tmp_path, 0)["a-red-poster/score"].max() > 0) == changed


# --- what cannot be read ----------------------------------------------------------------------------------------------

HALF = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        *[
            ({f"{HALF}.{name}": torch.zeros(2, 2)}, rf"{name} is no tensor of a plain LoRA .*merge the file")
            for name in ("dora_scale", "lora_magnitude_vector.weight", "hada_w1_a", "lokr_w1", "oft_blocks")
        ],
        ({f"{HALF}.lora_mid.weight": torch.zeros(2, 2)}, "lora_mid.weight is no tensor of a plain LoRA"),
        ({f"{HALF}.diff_b": torch.zeros(2)}, "diff_b is no tensor of a plain LoRA"),
        ({f"{HALF}.alpha": torch.ones(())}, "lacks one half of its LoRA; it has alpha"),
        (
            {f"{HALF}.lora_down.weight": torch.zeros(2, 5), f"{HALF}.lora_up.weight": torch.zeros(16, 2)},
            r"the LoRA of mid_block.attentions.0.proj_in has A \(2, 5\), B \(16, 2\), the base's layer",
        ),
        (
            {"unet.nothing.lora_A.weight": torch.zeros(2, 5), "unet.nothing.lora_B.weight": torch.zeros(5, 2)},
            "1 of its layers are not in the model .*nothing first; is it a LoRA of another base",
        ),
    ],
)
def test_a_tensor_that_fits_nowhere_is_named(more, message, families, family_folders, tmp_path):
    """diffusers drops what it does not know; memwatch never does."""
    file = tmp_path / "lora.safetensors"
    save_file(kohya(sd1_lora(families), "sd1") | more, file)
    with pytest.raises(CheckpointError, match=f"^{file}: .*{message}"):
        load_model(str(file), family_folders["sd1"])


@pytest.mark.parametrize(
    ("name", "base"), [("sd1", "sdxl"), ("sdxl", "sd1"), ("flux", "sd3"), ("sd3", "flux"), ("flux", "sd1")]
)
def test_a_lora_of_another_base(name, base, families, family_folders, tmp_path):
    model = by.with_lora(copy.deepcopy(network(families[name])), LAYERS[name])
    source = str(tmp_path / f"{name}.safetensors")
    save_file(kohya(model, name), source)
    with pytest.raises(CheckpointError, match=f"^{source}: ") as caught:
        load_model(source, family_folders[base])
    assert "\n" not in str(caught.value)


def test_sd3_under_its_original_names(families, family_folders, tmp_path):
    model = by.with_lora(copy.deepcopy(network(families["sd3"])), by.WIDE)
    save_file(by.kohya(by.joined(by.factors_of(model), model), "lora_unet_"), tmp_path / "lora.safetensors")
    with pytest.raises(
        CheckpointError, match="not in the model .*diffusers has no converter for SD 3's original names"
    ):
        load_model(str(tmp_path / "lora.safetensors"), family_folders["sd3"])


def test_what_a_converter_drops_is_an_error(families, family_folders, tmp_path, monkeypatch):
    model = by.with_lora(copy.deepcopy(network(families["flux"])), ["ff.net.0.proj", "ff.net.2"])
    file = tmp_path / "lora.safetensors"
    save_file(kohya(model, "flux"), file)
    real = FluxLoraLoaderMixin.lora_state_dict

    def dropping(tensors):
        return {name: tensor for name, tensor in real(tensors).items() if ".ff.net.2." not in name}

    monkeypatch.setattr(FluxLoraLoaderMixin, "lora_state_dict", dropping)
    with pytest.raises(CheckpointError, match=r"diffusers converts \d+ of the \d+ rows of double_blocks_0_"):
        load_model(str(file), family_folders["flux"])


def test_a_file_without_a_base_without_a_denoiser_and_cut_off(families, family_folders, tmp_path):
    file = tmp_path / "lora.safetensors"
    encoder = trained_encoders(families["sd1"], ["text_encoder"])[0]
    save_file(by.kohya(by.text_prefixed(by.factors_of(encoder)), "lora_te_"), file)
    with pytest.raises(CheckpointError, match="holds no LoRA of the denoiser"):
        load_model(str(file), family_folders["sd1"])
    save_file(kohya(sd1_lora(families), "sd1"), file)
    with pytest.raises(CheckpointError, match="pass the model's pipeline as --pretrained"):
        load_model(str(file))
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="lora.safetensors: cannot be read: "):
        load_model(str(file), family_folders["sd1"])
    assert text_encoders(str(file)) == []
