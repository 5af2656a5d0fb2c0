"""Every family: epsilon is the family's own, products and diagonals are right, an event runs; LoRA; what cannot be watched says why."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate import Accelerator
from conftest import CONFIG, assert_same, picture, save_pipeline
from diffusers import ControlNetModel, DDIMPipeline, DDIMScheduler, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from oracles import ALPHAS, DiagonalGaussian, T, denoiser_of, view_of
from safetensors.torch import load_file
from torch import nn

from memwatch import ConfigError, MemWatch, Probe, ProbeError
from memwatch.alerts import Verdict
from memwatch.config import CurvatureConfig, SamplingConfig
from memwatch.curvature import value_and_diag_jacobian
from memwatch.denoiser import Components, Flux, StableDiffusion3, family_of, load_components
from memwatch.denoiser.flux import pack, unpack
from memwatch.measure import measure
from memwatch.noise import NoiseSchedule
from memwatch.probes import PreparedProbe, View, encode_image, prompt_view

PROMPT = "a photo of a cat"
NAMES = ["sdxl", "sd3", "sd3-without-t5", "flux", "flux-schnell", "unconditional"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    paths = {name: build(folder) for name, build in tiny.BUILDERS.items()}
    paths["sd3-without-t5"] = tiny.sd3(folder, t5=False)
    paths["flux-schnell"] = tiny.flux(folder, guidance=False)
    paths["sd1"] = save_pipeline(folder / "sd1")
    return paths


@pytest.fixture(scope="session")
def pipelines(folders):
    """Loaded once; tests must not change them."""
    loaded = {}
    for name, path in folders.items():
        without = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3-without-t5" else {}
        loaded[name] = DiffusionPipeline.from_pretrained(path, **without)
    for pipe in loaded.values():
        network(pipe).eval()
    return loaded


def network(pipe) -> nn.Module:
    return pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer


def adapted(pipe, pretrained=None):
    """The denoiser of a pipeline's network, and its components read from the folder."""
    model = network(pipe)
    family = family_of(model)
    wants = {"needs_vae": not family.in_pixels, "text_encoders": family.text_encoders, "optional": family.optional}
    parts = load_components(pretrained or pipe, Components(None), **wants, device=torch.device("cpu"))
    return family(model, NoiseSchedule.from_scheduler(parts.scheduler)), parts


def inputs(channels: int, t: int, b: int = 2, side: int = 8):
    return torch.randn(b, channels, side, side, generator=torch.Generator().manual_seed(5)), torch.full((b,), t)


# --- epsilon is what the family's own pipeline computes ---------------------------------------------------------------------------------


@torch.no_grad()
def own_epsilon(name: str, pipe, x, t):
    """By the pipeline's own methods; nothing of memwatch."""
    b = len(x)
    if name == "unconditional":
        return pipe.unet(x, t).sample
    if name == "sdxl":
        hidden, _, pooled, _ = pipe.encode_prompt(PROMPT)
        ids = pipe._get_add_time_ids((16, 16), (0, 0), (16, 16), torch.float32, tiny.WIDTH)
        added = {"text_embeds": pooled.expand(b, -1), "time_ids": ids.expand(b, -1)}
        return pipe.unet(x, t, hidden.expand(b, -1, -1), added_cond_kwargs=added).sample
    sigma = t[0].item() / 1000
    if name.startswith("sd3"):
        hidden, _, pooled, _ = pipe.encode_prompt(PROMPT, PROMPT, PROMPT, max_sequence_length=77)
        v = pipe.transformer(x, hidden.expand(b, -1, -1), pooled.expand(b, -1), t).sample
    else:
        hidden, pooled, txt_ids = pipe.encode_prompt(PROMPT, max_sequence_length=512)
        packed = pipe._pack_latents(x, b, 4, 8, 8)
        guidance = torch.full((b,), 3.5) if name == "flux" else None
        img_ids = pipe._prepare_latent_image_ids(b, 4, 4, "cpu", torch.float32)
        v = pipe.transformer(
            packed, hidden.expand(b, -1, -1), pooled.expand(b, -1), t / 1000, img_ids, txt_ids, guidance
        ).sample  # fmt: skip
        v = pipe._unpack_latents(v, 16, 16, 2)
    z_0 = x - sigma * v  # x = (1 - sigma) z_0 + sigma eps, v = eps - z_0
    return z_0 + v


@pytest.mark.parametrize("name", NAMES)
def test_epsilon_is_the_familys_own(name, folders, pipelines):
    denoiser, parts = adapted(pipelines[name], folders[name])
    x, t = inputs(denoiser.latent_channels, 141)
    conditioning = denoiser.stack([denoiser.encode(PROMPT, parts, tiny.SIZE)] * 2)
    with torch.no_grad():
        found = denoiser(x, t, conditioning)
    torch.testing.assert_close(found, own_epsilon(name, pipelines[name], x, t), rtol=1e-4, atol=1e-5)
    assert found.std() > 0.01


def test_the_unconditional_branch_is_the_familys_own(folders, pipelines):
    denoiser, parts = adapted(pipelines["sdxl"], folders["sdxl"])
    zeros = denoiser.encode_null(parts, tiny.SIZE)
    _, hidden, _, pooled = pipelines["sdxl"].encode_prompt(PROMPT)
    assert_same(dict(zeros), {"encoder_hidden_states": hidden[0], "text_embeds": pooled[0], "time_ids": zeros["time_ids"]})
    assert zeros["time_ids"].tolist() == [16, 16, 0, 0, 16, 16]
    empty = denoiser.encode_null(Components(None, None, parts.text_encoders, parts.tokenizers, zero_null=False), tiny.SIZE)
    assert_same(dict(empty), dict(denoiser.encode("", parts, tiny.SIZE)))
    assert empty["encoder_hidden_states"].abs().sum() > 0

    denoiser, parts = adapted(pipelines["sd3"], folders["sd3"])
    _, hidden, _, pooled = pipelines["sd3"].encode_prompt(PROMPT, PROMPT, PROMPT, max_sequence_length=77)
    null = denoiser.encode_null(parts, tiny.SIZE)
    torch.testing.assert_close(null["encoder_hidden_states"], hidden[0])
    torch.testing.assert_close(null["pooled_projections"], pooled[0])

    denoiser, parts = adapted(pipelines["unconditional"], folders["unconditional"])
    assert denoiser.encode_null(parts, 8) is None


def test_flux_packs_2x2_pixels_and_back():
    x = torch.arange(2 * 4 * 6 * 8.0).reshape(2, 4, 6, 8)
    packed = pack(x)
    assert packed.shape == (2, 12, 16)
    assert packed[0, 5].tolist() == x[0, :, 2:4, 2:4].flatten().tolist()
    assert torch.equal(unpack(packed, 6, 8), x)


# --- products and diagonals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_vector_jacobian_products_agree_with_central_differences(name, folders, pipelines):
    denoiser, parts = adapted(pipelines[name])
    x, t = inputs(denoiser.latent_channels, 301)
    conditioning = denoiser.stack([denoiser.encode(PROMPT, parts, tiny.SIZE)] * 2)
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(x.shape, generator=generator), torch.randint(2, x.shape, generator=generator).float() * 2 - 1
    _, products = value_and_diag_jacobian(lambda x: denoiser(x, t, conditioning), x, v[None])
    h = 1e-2
    with torch.no_grad():
        slope = (denoiser(x + h * u, t, conditioning) - denoiser(x - h * u, t, conditioning)) / (2 * h)
    torch.testing.assert_close((u * (v * products[0])).sum((1, 2, 3)), (v * slope).sum((1, 2, 3)), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_retained_variance_agrees_with_the_exact_jacobian(name, pipelines):
    """64 vectors tiled over all 4x4 latents are orthogonal: Hutchinson's estimate is then exact."""
    denoiser, parts = adapted(pipelines[name])
    c, t = denoiser.latent_channels, 141
    x, _ = inputs(c, t, b=1, side=4)
    conditioning = denoiser.encode(PROMPT, parts, 8)
    view = View("a", x[None], (t,), None, conditioning)
    found = measure(denoiser, [view], CurvatureConfig(vectors=64, tile=64), seed=0)[0].rho.mean[0]
    batch = denoiser.stack([conditioning])
    jacobian = torch.autograd.functional.jacobian(lambda x: denoiser(x, torch.tensor([t]), batch), x)
    diagonal = jacobian.reshape(c * 16, c * 16).diagonal().reshape(c, 4, 4)
    sigma = t / 1000 if denoiser.schedule.alphas is None else (1 - denoiser.schedule.alphas[t] ** 2).sqrt().item()
    expected = 1 - sigma * diagonal.mean(0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 1e-4


# --- the same oracle in the clothes of two families -------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """An oracle called as SD 3's transformer is called (``flux=False``) or, packed, as Flux's."""

    def __init__(self, oracle, *, flux: bool) -> None:
        super().__init__()
        self.oracle, self.flux = oracle, flux
        self.config = SimpleNamespace(in_channels=16 if flux else 4, sample_size=8, patch_size=2, guidance_embeds=False)

    def forward(self, hidden_states, timestep, encoder_hidden_states, pooled_projections, return_dict, **ids):
        assert pooled_projections.shape == (len(hidden_states), 8)
        if not self.flux:
            return self.oracle(hidden_states, timestep, encoder_hidden_states)
        assert ids["img_ids"].shape == (16, 3)
        output = self.oracle(unpack(hidden_states, 8, 8), (timestep * 1000).round(), encoder_hidden_states)[0]
        return (pack(output),)


@pytest.mark.parametrize("family", [StableDiffusion3, Flux])
def test_flow_families_and_stable_diffusion_give_the_same_map_of_the_same_law(family):
    variance = torch.full((4, 8, 8), 0.8)
    variance[:, 2:5, 3:7] = 0.01
    timesteps = (61, 301)
    plain = measure(
        denoiser_of(DiagonalGaussian(variance)), [view_of(timesteps)], CurvatureConfig(vectors=8, tile=8), 0
    )[0]  # fmt: skip
    transformer = Transformer(DiagonalGaussian(variance, prediction_type="flow"), flux=family is Flux)
    view = view_of(timesteps, flow=True)
    conditioning = {**view.conditioning, "pooled_projections": torch.zeros(8)}
    view = View(view.key, view.noisy_latents, view.timesteps, view.eps, conditioning)
    flow = measure(family(transformer, NoiseSchedule(None, T, "flow")), [view], CurvatureConfig(vectors=8, tile=8), 0)[0]
    torch.testing.assert_close(flow.rho.samples, plain.rho.samples, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(flow.epsilon, plain.epsilon, rtol=1e-4, atol=1e-5)
    truth = torch.stack([DiagonalGaussian(variance).rho(t).mean(0) for t in timesteps]).float()
    torch.testing.assert_close(flow.rho.mean, truth, rtol=1e-4, atol=1e-5)
    assert len(ALPHAS) == T


# --- events -----------------------------------------------------------------------------------------------------------------------------


def watch_of(model, pretrained, folder, *, size=tiny.SIZE, **overrides):
    probes = [Probe(PROMPT, picture(0, size), name="cat"), Probe(PROMPT, seed=3, name="drawn")]
    config = {"probes": probes, "config": CONFIG, "every_steps": 1, "resolution": size, "strict": True, "output_dir": str(folder)}
    return MemWatch(Accelerator(cpu=True), model, pretrained, **(config | overrides))


def size_of(name: str) -> int:
    return 8 if name == "unconditional" else tiny.SIZE


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "unconditional"])
def test_an_event_of_every_family(name, folders, pipelines, tmp_path, caplog):
    """From the folder; unchanged weights read exactly 0, changed ones do not; nothing that was loaded stays."""
    model = copy.deepcopy(network(pipelines[name])).train()
    with caplog.at_level(logging.INFO, "memwatch"):
        watch = watch_of(model, folders[name], tmp_path, size=size_of(name))
    assert ("no unconditional branch" in caplog.text) == (name == "unconditional")
    assert watch._parts.text_encoders == ()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first = watch.begin()
    unchanged = watch.on_step_end(1)
    assert_same(before, dict(model.state_dict()))
    assert all(module.training for module in model.modules())
    for finding in unchanged.findings:
        assert finding.verdict is Verdict.NO_EVIDENCE
        assert finding.image.shape == (size_of(name), size_of(name), 3)
        assert not finding.signals.log_ratio.samples.any()
        assert finding.signals.log_ratio.mean.shape[-2:] == (8, 8)
        assert (finding.signals.score_null is None) == (name == "unconditional")
    moved(model)
    changed = watch.on_step_end(2)
    for finding in changed.findings:
        assert finding.signals.log_ratio.mean.abs().max() > 0
        assert finding.signals.raw.mean.isfinite().all()
    assert first.findings[0].timesteps == (61, 301)
    assert len(changed.findings[1].timesteps) == 1
    assert changed.findings[1].timesteps[0] < 500  # the last of three steps


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "unconditional"])
def test_prompt_probes_are_sampled_as_the_pipeline_samples(name, folders, pipelines):
    pipe = copy.copy(pipelines[name])
    denoiser, parts = adapted(pipelines[name], folders[name])
    generator = torch.Generator().manual_seed(3)
    if denoiser.schedule.prediction_type != "flow":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    size = size_of(name)
    arguments = {} if name == "unconditional" else {"prompt": PROMPT, "height": size, "width": size, "guidance_scale": 3.0}
    arguments |= {"sd3": {"max_sequence_length": 77}, "flux": {"guidance_scale": 3.5}}.get(name, {})
    if name == "unconditional":
        expected = DDIMPipeline(pipe.unet, pipe.scheduler)(num_inference_steps=3, generator=generator, output_type="np").images[0]
    else:
        expected = pipe(**arguments, num_inference_steps=3, generator=generator, output_type="latent").images
        expected = unpack(expected, 8, 8)[0] if name == "flux" else expected[0]
    prepared = PreparedProbe(Probe(PROMPT, seed=3, name="a"), denoiser.encode(PROMPT, parts, size), None, None, False)
    sampling = SamplingConfig(num_inference_steps=3, guidance_scale=3.0)
    null = denoiser.encode_null(parts, size)
    view, latents = prompt_view(prepared, null, denoiser, parts.scheduler, sampling, draws=2, side=8)
    if name == "unconditional":
        latents, expected = (latents.permute(1, 2, 0) / 2 + 0.5).clamp(0, 1), torch.from_numpy(expected)
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-4)
    assert view.noisy_latents.shape == (1, 2, denoiser.latent_channels, 8, 8)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_lora_keeps_its_own_tensors_only_and_the_base_model_is_a_baseline(name, folders, pipelines, tmp_path):
    from peft import LoraConfig

    def with_lora():
        model = copy.deepcopy(network(pipelines[name])).requires_grad_(False)
        model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
        return model

    model = with_lora()
    watch = watch_of(model, folders[name], tmp_path / "first")
    watch.begin()
    stored = load_file(tmp_path / "first" / "snapshots" / "step_0000000.safetensors")
    assert stored
    assert all("lora_" in key for key in stored)
    moved(model)
    changed = watch.on_step_end(1)
    based = watch_of(model, folders[name], tmp_path / "base", signals={"baseline": "base"}).begin()
    assert not (tmp_path / "base" / "snapshots").exists()
    for a, b in zip(changed.findings, based.findings, strict=True):  # before training, LoRA is the base model
        assert a.signals.log_ratio.mean.abs().max() > 0
        assert_same(a.signals.log_ratio.samples, b.signals.log_ratio.samples)


# --- what is loaded, what is not ---------------------------------------------------------------------------------------------------------


def test_lists_of_text_encoders_are_used_and_the_rest_is_loaded(folders, pipelines, tmp_path):
    pipe = pipelines["sdxl"]
    model = copy.deepcopy(pipe.unet)
    mine = copy.deepcopy(pipe.text_encoder_2).requires_grad_(False)
    with torch.no_grad():
        mine.text_projection.weight.mul_(2)
    plain = watch_of(model, folders["sdxl"], tmp_path / "a")
    passed = watch_of(model, folders["sdxl"], tmp_path / "b", text_encoder=[None, mine])
    theirs, ours = (w._prepared[0].conditioning for w in (plain, passed))
    assert_same(theirs["encoder_hidden_states"], ours["encoder_hidden_states"])
    torch.testing.assert_close(2 * theirs["text_embeds"], ours["text_embeds"])
    everything = {
        "text_encoder": [pipe.text_encoder, pipe.text_encoder_2], "tokenizer": (pipe.tokenizer, pipe.tokenizer_2), "vae": pipe.vae,
    }  # fmt: skip
    watch = watch_of(model, None, tmp_path / "c", scheduler=pipe.scheduler, **everything)
    assert_same(dict(theirs), dict(watch._prepared[0].conditioning))
    with pytest.raises(ValueError, match=r"pass text_encoder=, tokenizer= \(lists, for text_encoder, text_encoder_2\) or a pretrained"):
        watch_of(model, None, tmp_path / "d", scheduler=pipe.scheduler, vae=pipe.vae)
    with pytest.raises(ValueError, match="got 3 text encoders or tokenizers, this model has 2: text_encoder, text_encoder_2"):
        watch_of(model, folders["sdxl"], tmp_path / "d", text_encoder=[None, None, mine])


def test_text_encoders_are_loaded_in_the_networks_dtype_and_the_vae_in_float32(folders):
    names = StableDiffusion3.text_encoders
    parts = load_components(
        folders["sd3"], Components(None), needs_vae=True, text_encoders=names, device=torch.device("cpu"), dtype=torch.bfloat16
    )  # fmt: skip
    assert [encoder.dtype for encoder in parts.text_encoders] == [torch.bfloat16] * 3
    assert parts.vae.dtype == torch.float32
    assert not any(p.requires_grad for part in (*parts.text_encoders, parts.vae) for p in part.parameters())


def test_the_vaes_shift_is_applied(pipelines):
    vae = pipelines["sd3"].vae
    pixels = torch.zeros(1, 3, 16, 16) + 127 / 127.5 - 1
    with torch.no_grad():
        expected = (vae.encode(pixels).latent_dist.mode() - 0.1) * 0.5
    torch.testing.assert_close(encode_image(torch.full((16, 16, 3), 127, dtype=torch.uint8).numpy(), vae), expected[0])


def test_latents_that_are_not_finite_are_refused(folders, pipelines, tmp_path):
    vae = copy.deepcopy(pipelines["sdxl"].vae)
    with torch.no_grad():
        vae.quant_conv.weight.fill_(torch.nan)
    with pytest.raises(ProbeError, match=r"probe 'cat': the VAE gives latents that are not finite"):
        watch_of(pipelines["sdxl"].unet, folders["sdxl"], tmp_path, vae=vae)


def test_an_unconditional_model_needs_a_scheduler_only(pipelines, tmp_path):
    model = pipelines["unconditional"].unet
    scheduler = DDPMScheduler(prediction_type="sample")
    report = watch_of(model, None, tmp_path, size=8, scheduler=scheduler).begin()
    assert report.findings[0].signals.raw.mean.isfinite().all()
    with pytest.raises(ValueError, match="pass scheduler= or a pretrained path"):
        watch_of(model, None, tmp_path, size=8)
    with pytest.raises(ConfigError, match=r"signals.decide.*log_ratio_null.*no unconditional branch"):
        watch_of(model, None, tmp_path, size=8, scheduler=scheduler, signals={"decide": "log_ratio_null"})


def test_what_cannot_be_watched_says_what_is_missing():
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    unet = {**blocks, "cross_attention_dim": 8, "attention_head_dim": 4, "out_channels": 4}
    unet |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    controlnet = ControlNetModel(
        **blocks, cross_attention_dim=8, attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D")
    )  # fmt: skip
    for model, message in [
        (controlnet, "ControlNetModel is no denoiser: a probe would need a control image"),
        (UNet2DConditionModel(**unet, in_channels=8), "8 channels: a probe would need the image to be edited .InstructPix2Pix."),
        (UNet2DConditionModel(**unet, in_channels=9), "9 channels: a probe would need a mask and the masked image"),
        (UNet2DModel(**blocks, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, num_class_embeds=3), "class labels"),
    ]:
        with pytest.raises(ValueError, match=f"model {type(model).__name__} .*no family that memwatch knows.*{message}"):
            family_of(model)


def test_prompts_that_are_too_long_are_reported(folders, pipelines, caplog):
    long = "a photo of a cat " * 20
    for name, cut in [("sdxl", True), ("sd3", True), ("flux", False), ("unconditional", False)]:
        caplog.clear()
        denoiser, parts = adapted(pipelines[name])
        denoiser.warn_if_cut(long, parts)
        assert ("cut: " in caplog.text) == cut, name
