"""With the paper's preset, the maps that ``memwatch scan`` writes are those of the published procedure.

The procedure is written out here formula by formula: Kim & Lee, ICML 2026 (arXiv 2605.26756). The same seeds, hence the
same initial noise and test vectors; float32 on both sides.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from support.builders import history
from support.families import save_pipeline
from support.processes import new_process

from memwatch.cli import main
from memwatch.measure.curvature import CurvatureMap, test_vectors
from memwatch.measure.signals import Comparison, Signals
from memwatch.measure.views import seeded

PROMPT, NAME = "a red poster", "a-red-poster"
STEPS, GUIDANCE, K = 50, 7.5, 16


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A pipeline, and a later one in which both network and text encoder have changed."""
    folder = tmp_path_factory.mktemp("models")
    earlier = save_pipeline(folder)
    pipeline = StableDiffusionPipeline.from_pretrained(earlier)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in [*pipeline.unet.parameters(), *pipeline.text_encoder.parameters()]:
            parameter.add_(0.3 * parameter.std(correction=0) * torch.randn_like(parameter))
        for name, parameter in pipeline.unet.named_parameters():
            if ".attn2." in name or "conv_out" in name:
                parameter.mul_(5)  # an untrained network hardly listens to its prompt; this one does
    pipeline.save_pretrained(folder / "now")
    return folder / "now", earlier


@torch.no_grad()
def embedding(pipeline, prompt):
    tokens = pipeline.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt")
    return pipeline.text_encoder(tokens.input_ids)[0]


@torch.no_grad()
def last_latents(pipeline, seed):
    """Guided DDIM until the last step has its turn: x_t and t."""
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) * scheduler.init_noise_sigma
    both = torch.cat([embedding(pipeline, ""), embedding(pipeline, PROMPT)])
    for t in scheduler.timesteps[: STEPS - 1]:
        unconditional, conditional = pipeline.unet(torch.cat([x, x]), t, both).sample.chunk(2)
        x = scheduler.step(unconditional + GUIDANCE * (conditional - unconditional), t, x).prev_sample
    return x, scheduler.timesteps[STEPS - 1]


def curvature(difference, x, vectors):
    """relu of minus the diagonal of the Jacobian of s = -d, summed over channels; by Hutchinson with K vectors."""
    x = x.clone().requires_grad_()
    s = -difference(x)
    diagonal = sum(v * torch.autograd.grad((s * v).sum(), x, retain_graph=True)[0] for v in vectors) / len(vectors)
    return torch.relu(-diagonal.sum(1))[0].detach()


@pytest.fixture(scope="module")
def published(models):
    now, earlier = (StableDiffusionPipeline.from_pretrained(folder) for folder in models)
    x, t = last_latents(now, seed=0)
    c, null, c_earlier = embedding(now, PROMPT), embedding(now, ""), embedding(earlier, PROMPT)
    sigma = (1 - now.scheduler.alphas_cumprod[t]) ** 0.5
    generator = seeded(0, "vectors", NAME, int(t))  # memwatch's own, so that both use the same test vectors
    vectors = test_vectors(K, (4, 8, 8), generator)[:, None]

    def conditional_and_null(x):
        both = now.unet(torch.cat([x, x]), t, torch.cat([c, null])).sample  # both halves depend on x
        return both[:1] - both[1:]

    def now_and_earlier(x):
        return now.unet(x, t, c).sample - earlier.unet(x, t, c_earlier).sample

    with torch.no_grad():
        against_null, against_earlier = (
            (difference(x) / sigma).square().sum(1)[0] for difference in (conditional_and_null, now_and_earlier)
        )
    return {
        "timestep": int(t),
        "sigma": float(sigma),
        "curvature_unconditional": curvature(conditional_and_null, x, vectors),
        "curvature_earlier": curvature(now_and_earlier, x, vectors),
        "raw_curvature": curvature(lambda x: now.unet(x, t, c).sample, x, vectors),
        "score_unconditional": against_null,
        "score_earlier": against_earlier,
    }


@pytest.fixture(scope="module")
def scanned(models, tmp_path_factory):
    """What ``memwatch scan --preset paper`` wrote."""
    folder = tmp_path_factory.mktemp("scan")
    (folder / "prompts.txt").write_text(PROMPT, encoding="utf-8")
    now, earlier = models
    options = {"baseline": earlier, "prompts": folder / "prompts.txt", "preset": "paper", "output": folder / "memwatch"}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    assert main(["scan", str(now), *arguments]) == 0
    new_process()
    return folder


MAPS = {  # ours: (theirs, power of sigma that ours has more)
    "collapse": ("curvature_earlier", 1),
    "collapse_null": ("curvature_unconditional", 1),
    "raw": ("raw_curvature", 1),
    "score": ("score_earlier", 2),
    "score_null": ("score_unconditional", 2),
}


def assert_same_map(ours, theirs):
    """To float32: memwatch keeps rho, whose rounding near 1 is 6e-8; the conversion multiplies by 4 / sigma = 97."""
    assert theirs.max() > 2e-3  # a hundred tolerances: how much there is depends on how transformers draws weights
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("ours", MAPS)
def test_paper_preset_equals_the_published_formulas(scanned, published, ours):
    (row,) = history(scanned)
    assert row["findings"][0]["timesteps"] == [published["timestep"]] == [1]
    theirs, power = MAPS[ours]
    values = load_file(scanned / "memwatch" / "maps" / "step_0000000.safetensors")[f"{NAME}/{ours}"][0]
    if power == 1:
        values = torch.relu(values)  # a curvature; a squared difference has no sign
    assert_same_map(values * 4 / published["sigma"] ** power, published[theirs])


def test_reproduce_paper_converts_alike(scanned, published):
    pytest.importorskip("pyarrow", reason="the script reads parquet files: extra [examples]")
    from evidence.reproduce_paper import paper_maps

    stored = load_file(scanned / "memwatch" / "maps" / "step_0000000.safetensors")
    maps = {name: CurvatureMap(stored[f"{NAME}/{name}"][:, None]) for name in MAPS}
    everywhere = torch.ones(1, 8, 8, dtype=torch.bool)
    snapshot, unconditional = (
        Comparison(maps[f"score{end}"], maps[f"collapse{end}"], maps[f"collapse{end}"], everywhere)
        for end in ("", "_null")
    )
    signals = Signals(snapshot, unconditional, None, maps["raw"])
    for name, values in paper_maps(signals, 4, published["sigma"]).items():
        assert_same_map(torch.from_numpy(values), published[name])
