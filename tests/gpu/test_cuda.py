"""On a GPU: exact zeros, untouched training, memory that runs out, no waiting, and a peak like that of training.

Skipped without CUDA. Run it in a process of its own, ``pytest tests/gpu``: cuBLAS reads its variable only once.
"""

from __future__ import annotations

import os

import pytest
import torch
from accelerate import Accelerator
from support.builders import SMALL, Loop, assert_same, picture
from support.families import TOKENS

from memwatch import Probe
from memwatch.config import CurvatureConfig
from memwatch.denoiser import StableDiffusion, borrow
from memwatch.denoiser.schedule import NoiseSchedule
from memwatch.measure.curvature import value_and_diag_jacobian
from memwatch.measure.measure import Batches, measure
from memwatch.measure.views import View

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),
]
if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

CAT = [Probe("a cat", picture(0), name="cat")]
ALONE = SMALL | {"proof": {"enabled": False}}


class OnGPU(Loop):
    """The same loop on the first GPU."""

    def __init__(self, *args, **kind) -> None:
        super().__init__(*args, **kind)
        if self.ema is not None:
            self.ema.to(self.accelerator.device)  # as diffusers' scripts do

    def make_accelerator(self, **options) -> Accelerator:
        return Accelerator(**options)

    def loss(self, latents, hidden):
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        output = self.unet(noisy.to(self.dtype), timesteps, hidden.to(self.dtype)).sample
        return torch.nn.functional.mse_loss(output.float(), noise)

    def state(self):
        return super().state() | {"cuda": torch.cuda.get_rng_state_all()}


@pytest.fixture
def deterministic_training():
    """The loop itself must repeat before anything can be said of a monitor in it."""
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    yield
    torch.set_deterministic_debug_mode(mode)


@pytest.mark.parametrize("precision", ["full", "loop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_compared_with_itself_reads_exactly_0(dtype, precision, pretrained, pipeline, tmp_path):
    loop = OnGPU(pretrained, tmp_path, lora=True, dtype=dtype, lr=0.0, precision="bf16")
    watch = loop.watch(pipeline, CAT, config=ALONE, precision=precision)
    (report,) = loop.run(watch, 2)
    snapshot = report.findings[0].signals.snapshot
    assert not any(getattr(snapshot, name).samples.any() for name in ("collapse", "variance", "score", "loss"))


@pytest.mark.usefixtures("deterministic_training")
@pytest.mark.parametrize(
    "kind", [{}, {"lora": True}, {"precision": "bf16", "checkpointing": True}, {"precision": "fp16", "ema": True}]
)
def test_training_is_bit_identical_with_and_without(kind, pretrained, pipeline, tmp_path):
    without, with_watch = [], []
    OnGPU(pretrained, **kind).run(None, 3, each=lambda running: without.append(running.state()))
    loop = OnGPU(pretrained, tmp_path, **kind)  # only now: it seeds all streams anew
    loop.run(loop.watch(pipeline, CAT, config=ALONE), 3, each=lambda running: with_watch.append(running.state()))
    assert_same(without, with_watch)


def setting(pretrained, side: int, rows: int) -> tuple[StableDiffusion, View]:
    """The tiny UNet on the GPU, and ``rows`` noise draws of latents of ``side`` pixels."""
    unet = Loop.make_unet(pretrained, torch.float32, lora=False, checkpointing=False).cuda()
    scheduler = Loop(pretrained).scheduler
    denoiser = StableDiffusion(unet, NoiseSchedule.from_scheduler(scheduler))
    conditioning = {"encoder_hidden_states": torch.randn(TOKENS, 16)}
    noisy = torch.randn(1, rows, 4, side, side)
    return denoiser, View("view", noisy, (301,), torch.randn_like(noisy), conditioning)


def peak_of(work) -> int:
    """Bytes above what is there before."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def test_a_real_limit_halves_the_batch(pretrained):
    denoiser, view = setting(pretrained, side=64, rows=32)
    curvature = CurvatureConfig(vectors=2, tile=2, batch_size=4)
    total, batches = torch.cuda.get_device_properties(0).total_memory, Batches(32)
    try:
        with borrow(denoiser.model):
            expected = measure(denoiser, view, curvature, 0)
            need = peak_of(lambda: measure(denoiser, view, curvature, 0, Batches(12)))
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + need) / total)
            torch.cuda.empty_cache()
            found = measure(denoiser, view, curvature, 0, batches)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert batches.size < 32
    torch.testing.assert_close(found.epsilon, expected.epsilon, rtol=1e-4, atol=1e-4)


def test_the_host_waits_for_no_vector(pretrained):
    denoiser, view = setting(pretrained, side=8, rows=2)
    x, vectors = view.noisy_latents[0].cuda(), torch.ones(4, *view.noisy_latents[0].shape, device="cuda")
    timesteps, conditioning = torch.tensor([301, 301], device="cuda"), denoiser.stack([view.conditioning] * 2)

    def fn(x):
        output = denoiser(x, timesteps, conditioning)
        torch.cuda.set_sync_debug_mode("error")  # from here on: the backward passes
        return output

    try:
        with borrow(denoiser.model):
            value_and_diag_jacobian(fn, x, vectors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_is_left_on_the_gpu_between_events(pretrained, pipeline, tmp_path):
    loop = OnGPU(pretrained, tmp_path, lr=0.0)
    loop.run(None, 1)
    loop.optimizer.zero_grad()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    watch = loop.watch(pipeline, CAT, config=ALONE)
    watch.begin()
    assert torch.cuda.memory_allocated() == before
    watch.close()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_event_takes_about_as_much_as_a_training_step(checkpointing, pretrained, pipeline, tmp_path):
    loop = OnGPU(pretrained, tmp_path, lr=0.0, checkpointing=checkpointing)
    watch = loop.watch(pipeline, CAT, config=ALONE, resolution=128)  # large enough for activations to decide
    loop.run(watch, 1)  # everything has been allocated once; ``guard`` has read the batch size
    loop.optimizer.zero_grad()
    latents, hidden = (torch.randn(2, *shape, device="cuda") for shape in ((4, 64, 64), (TOKENS, 16)))
    step = peak_of(lambda: loop.accelerator.backward(loop.loss(latents, hidden)))
    loop.optimizer.zero_grad()
    # One noisy latent keeps what one row of training keeps, and its test vector and gradient besides. Training keeps
    # the gradients of the weights; a network this small hardly has any. On an H100: 1.09 and, with checkpointing, 1.12.
    assert peak_of(lambda: watch.on_step_end(2)) <= 1.25 * step
