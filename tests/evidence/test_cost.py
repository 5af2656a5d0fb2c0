"""``memwatch bench --cost``: passes are what a counting network counts, errors those of known Jacobians."""

from __future__ import annotations

import dataclasses
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from evidence.old.cost import ALL, ONE, SHIPPED, Search, designs, plans, shipped
from evidence.old.cost_page import page, plot
from evidence.old.cost_scale import large, rank_passes, seconds_by_passes
from evidence.old.events import FULL, Numbers
from evidence.old.exact import (
    BASE,
    NOW,
    NULL,
    Design,
    Place,
    bootstrap,
    columns_of,
    design_error,
    jacobian_columns,
    published_error,
    smallest,
)
from evidence.old.held import bytes_held
from evidence.old.procedure import (
    Rows,
    all_maps,
    counted_leniently,
    prompt_rows,
    published_maps,
    published_rows,
    reference_rows,
)
from evidence.old.variance import ratios
from torch import nn

from memwatch.cli import main
from memwatch.config import CurvatureConfig, LevelsConfig, MemWatchConfig
from memwatch.config_file import load_config
from memwatch.denoiser import Denoiser
from memwatch.denoiser.schedule import NoiseSchedule
from memwatch.measure.batches import Batches
from memwatch.measure.measure import measure, run_forward
from memwatch.measure.passes import count_passes
from memwatch.measure.views import View

SCHEDULER = DDIMScheduler(clip_sample=False)
SHAPE = (2, 4, 4)


class Counter(nn.Module):
    """Counts rows that go through it: forward without a graph, forward with one, and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = Rows()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            self.rows += Rows(forward=len(x))
            return 0.5 * x
        self.rows += Rows(graph=len(x))
        y = 0.5 * x
        y.register_hook(self.back)
        return y

    def back(self, gradient: torch.Tensor) -> None:
        self.rows += Rows(products=len(gradient))


class Counting(Denoiser):
    """A denoiser that is nothing but a counter."""

    def __init__(self) -> None:
        super().__init__(Counter(), NoiseSchedule.from_scheduler(SCHEDULER))

    @classmethod
    def fits(cls, model):
        return False

    def encode(self, prompt, components, resolution):
        return {}

    def predict(self, noisy_latents, timesteps, conditioning):
        return self.model(noisy_latents)


# --- passes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "vectors"), [(50, 16), (5, 3)])
def test_published_rows_are_those_of_the_procedure(steps, vectors):
    now, earlier = Counter(), Counter()
    solver = DDIMScheduler.from_config(SCHEDULER.config)
    solver.set_timesteps(steps)
    x, generator = torch.randn(1, *SHAPE), torch.Generator().manual_seed(0)
    maps = published_maps(lambda x, t: now(x), lambda x, t: earlier(x), solver, x, generator, vectors)
    assert set(maps) == set(published_rows())
    assert now.rows + earlier.rows == all_maps(published_rows(steps, vectors))
    assert earlier.rows == Rows(2 * steps, 2, 2 * vectors)
    assert all(m.shape == SHAPE[1:] for m in maps.values())


def test_known_counts():
    assert all_maps(published_rows()).passes == 598
    assert counted_leniently() == 450


def test_published_maps_of_a_known_network():
    """Outputs ``a * x`` without and ``b * x`` with the prompt: the curvature map is ``channels * (b - a)``."""
    solver = DDIMScheduler.from_config(SCHEDULER.config)
    solver.set_timesteps(4)

    def network(a, b):
        return lambda x, t: torch.cat([a * x[:1], b * x[1:]])

    x, generator = torch.randn(1, *SHAPE), torch.Generator().manual_seed(0)
    maps = published_maps(network(0.1, 0.4), network(0.0, 0.3), solver, x, generator, 2)
    torch.testing.assert_close(maps["null"], torch.full(SHAPE[1:], 2 * 0.3))
    torch.testing.assert_close(maps["snapshot"], torch.full(SHAPE[1:], 2 * 0.1))
    torch.testing.assert_close(maps["score null"], 9 * maps["score snapshot"])


def test_memwatchs_rows_are_those_of_its_look():
    levels, draws, vectors = 3, 2, 4
    denoiser = Counting()
    view = View("x", torch.randn(levels, draws, *SHAPE), (61, 141, 301), None, {})
    curvature = CurvatureConfig(vectors=vectors, tile=2, batch_size=4)
    for _ in range(2):  # branches
        measure(denoiser, view, curvature, seed=0)
    assert denoiser.model.rows == reference_rows(levels * draws, vectors)
    before = denoiser.model.rows
    run_forward(denoiser, view, {}, Batches(4))
    config = MemWatchConfig(
        levels=LevelsConfig(timesteps=(61, 141, 301), draws=draws, screen_draws=draws), curvature=curvature
    )
    counted = count_passes(config, 1, 0)
    assert denoiser.model.rows.passes - before.passes == counted.screen
    assert before.passes == counted.full


def test_an_events_passes_are_those_of_count_passes():
    config = MemWatchConfig(screen=False)
    latents, sampling = len(config.levels.timesteps) * config.levels.draws, config.sampling
    how = latents, config.curvature.vectors
    assert reference_rows(*how).passes == count_passes(config, 1, 0).of_event(1)
    rows = prompt_rows(*how, config.seeds, sampling.num_inference_steps)
    assert rows.passes == count_passes(config, 0, 1).of_event(1)
    assert shipped(config).passes(len(config.levels.timesteps)) == count_passes(config, 1, 0).full


def test_ranks_share_out_the_probes():
    config = MemWatchConfig()
    one, four = (rank_passes(config, Numbers(28), ranks)[FULL]["passes"] for ranks in (1, 4))
    assert one == 4 * four == count_passes(config, 28, 0).of_event(1)
    assert rank_passes(config, Numbers(5), 4)[FULL] == rank_passes(config, Numbers(2), 1)[FULL]


def test_seconds_are_rows_times_what_each_takes():
    passes = {"forward": 1.0, "graph": 10.0, "product": 100.0, "batch": 8.0}
    assert seconds_by_passes(Rows(1, 2, 3), passes) == 321


# --- errors ----------------------------------------------------------------------------------------------------------


def place(decay: float, levels: int = 1, draws: int = 2) -> Place:
    """Jacobians whose entries fall off with the distance of two coordinates; looks differ by a factor."""
    c, h, w = SHAPE
    points = torch.cartesian_prod(*map(torch.arange, (c, h, w))).float()
    near = torch.exp(-decay * torch.cdist(points, points))
    many = near.expand(levels, draws, -1, -1)
    timesteps = (141, 301, 501, 701)[:levels]
    known = {name: factor * many for name, factor in ((NOW, 0.5), (NULL, 0.3), (BASE, 0.2))}
    return Place(NoiseSchedule.from_scheduler(SCHEDULER), SHAPE, timesteps, torch.arange(h * w), known)


def test_columns_of_a_jacobian():
    weight, columns = torch.randn(6, 6), torch.tensor([4, 1])
    x = torch.randn(1, 1, 2, 3)
    found = jacobian_columns(lambda x: (x.flatten(1) @ weight.T).reshape(x.shape), x, columns)
    torch.testing.assert_close(found, weight[:, columns])


def test_some_pixels_are_those_of_the_whole():
    p, design = place(decay=0.5, levels=2), Design(2, 2)
    pixels = torch.tensor([3, 7, 0])
    columns = columns_of(pixels, SHAPE)
    some = dataclasses.replace(p, pixels=pixels, jacobians={k: j[..., columns] for k, j in p.jacobians.items()})
    torch.testing.assert_close(some.exact(NOW), p.exact(NOW)[..., pixels])
    torch.testing.assert_close(some.rademacher(NOW, 4, 0), p.rademacher(NOW, 4, 0)[..., pixels])
    torch.testing.assert_close(some.estimated(NOW, design, 0), p.estimated(NOW, design, 0)[..., pixels])


def test_exact_is_exact_and_both_estimators_are_unbiased():
    p = place(decay=0.5, levels=2)
    sigma = p.sigma()
    torch.testing.assert_close(p.exact(NOW), (1 - 0.5 * sigma)[:, None, None].expand(2, 2, 16))
    many = torch.stack([p.rademacher(NOW, 16, seed) for seed in range(200)]).mean((0, 2))
    ours = torch.stack([p.estimated(NOW, Design(1, 4), seed) for seed in range(200)]).mean(0)
    torch.testing.assert_close(many, p.exact(NOW)[:, 0], rtol=0, atol=0.05)
    torch.testing.assert_close(ours, p.exact(NOW)[:, 0], rtol=0, atol=0.05)


def test_a_diagonal_is_estimated_without_error():
    p = place(decay=1e3)
    for design in (Design(1, 1), Design(2, 2)):
        np.testing.assert_allclose(design_error(p, design, pooled=False), 0, atol=1e-10)
    np.testing.assert_allclose(published_error(p, 1), 0, atol=1e-10)


def test_published_error_is_that_of_rademacher_vectors():
    """Its mean square is the sum of squares off the diagonal over K, for a mean over channels."""
    p = place(decay=0.5)
    jacobian = (p.jacobians[BASE] - p.jacobians[NOW])[0, 0] * p.sigma()[0]
    symmetric = (jacobian + jacobian.T) / 2  # within a pixel products of two channels come twice
    off = jacobian.square().sum(1) - jacobian.diagonal().square()
    c, pixels = SHAPE[0], SHAPE[1] * SHAPE[2]
    pairs = sum(2 * symmetric[q, q + pixels] ** 2 - jacobian[q, q + pixels] ** 2 for q in range(pixels)) / pixels
    expected = (off.mean() * c + 2 * pairs) / c**2 / 16
    found = np.mean([published_error(p, 16)[0]])
    assert found == pytest.approx(float(expected), rel=0.4)


def test_blocks_vary_less_where_neighbours_cancel_and_no_less_where_nothing_does():
    near, far = (ratios(place(decay, levels=2), Design(1, 4)) for decay in (2.0, 0.0))
    assert len(near) == 2
    assert min(near) > 2
    assert max(far) < 2
    assert ratios(place(2.0), Design(1, 4, tile=1)) == [1.0]


def test_fewer_vectors_do_where_neighbours_cancel():
    """Known Jacobians that fall off quickly: blocks need fewer vectors than independent ones for the same error."""
    p = place(decay=2.0)
    errors = {d: design_error(p, d, pooled=False)[None] for d in designs(1)}
    found = Search(published_error(p, 16)[None], errors, levels=1)
    best = found.best()
    assert best is not None
    assert best.draws == 1
    assert best.vectors < 16
    cheaper = [d for d in errors if d.passes(1) < best.passes(1)]
    assert all((errors[d].mean(0) > found.published.mean(0)).any() for d in cheaper)


def test_the_cheapest_that_is_good_enough_on_every_map():
    errors = {1: np.array([[4.0, 1.0]]), 2: np.array([[2.0, 2.0]]), 4: np.array([[1.0, 1.0]])}
    costs = {1: 1.0, 2: 2.0, 4: 4.0}
    assert smallest(errors, np.array([[2.0, 2.0]]), costs) == 2
    assert smallest(errors, np.array([[2.0, 1.5]]), costs) == 4
    assert smallest(errors, np.array([[0.5, 0.5]]), costs) is None


def test_bootstrap():
    values = np.array([1.0, 2.0, 3.0, 4.0])
    low, high = bootstrap(4, lambda items: float(values[items].mean()))
    assert 1 <= low < 2.5 < high <= 4
    assert bootstrap(4, lambda items: None) is None


# --- memory ----------------------------------------------------------------------------------------------------------


def test_every_storage_counts_once_and_what_belongs_to_others_not_at_all():
    whole = torch.zeros(100)
    array = np.zeros((10, 10))
    theirs = SimpleNamespace(big=torch.zeros(1000))
    thing = SimpleNamespace(a=whole[:10], b=[whole[50:], {"c": array[:5]}], d=array, e=theirs, f=lambda: None)
    assert bytes_held(thing, [theirs]) == {"cpu": 400 + 800, "gpu": 0, "mapped": 0}
    assert bytes_held(thing) == {"cpu": 400 + 800 + 4000, "gpu": 0, "mapped": 0}


# --- page ------------------------------------------------------------------------------------------------------------


def row(probe, name, vectors=2):
    if vectors is None:
        return {"probe": probe, "map": name, "draws": None, "vectors": None}
    numbers = {"passes": 24, "seconds": 0.1, "seconds_interval": None, "fewer": 18.75, "fewer_interval": (15.0, 20.0)}
    ratios = {"fewer_than_rows": 24.9, "fewer_than_shared": 6.2, "faster": 9.0, "faster_interval": None}
    errors = {f"error{end}": [0.01, 0.02] for end in ("", "_published")}
    errors |= {f"error{end}_interval": [(0.0, 0.03), None] for end in ("", "_published")}
    return {"probe": probe, "map": name, "draws": 1, "vectors": vectors} | numbers | ratios | errors


@pytest.fixture
def measured():
    points = [{"n": n, "events": {"full": {"passes": 10 * n, "seconds": 0.1 * n}}} for n in (1, 2)]
    ranks = [{"n": n, "events": {"full": {"passes": 10 / n}}} for n in (1, 2)]
    passes = {"forward": 1.0, "graph": 2.0, "product": 3.0, "batch": 1.0}
    sd15 = {"latents": "32x32", "probe": "reference", "map": ONE, "passes": 6, "seconds": 10.0, "published": 50.0}
    published = {"rows": 598, "lenient": 450, "shared": 149, "seconds": 1.0, "seconds_interval": (0.9, 1.1)}
    rows = [row("reference", ONE), row("reference", ALL, None), row("prompt", SHIPPED)]
    return {
        "machine": "a machine",
        "device": "cpu",
        "timesteps": [141, 301],
        "seeds": 4,
        "coordinates": 1024,
        "pixels": 16,
        "variances": [{"item": "a", "ratios": [3.0] * 6}, {"item": "b", "ratios": [3.0, 1.9, 3.0, 3.0, 1.0, 1.0]}],
        "side_by_side": {"says": "tiny-sd", "items": 4, "published": published, "rows": rows},
        "large": [sd15 | {"faster": 5.0, "per_row": passes}],
        "curves": {"probes": points, "ranks": ranks},
        "held": {"cpu": 70_000_000, "gpu": 0, "mapped": 0, "disk": 1_000_000},
    }


def test_a_missed_bar_is_said(measured):
    text = page(measured, "memwatch bench --cost")
    assert (
        f"| reference | {ONE} | equal or lower | met | **missed** |" in text
    )  # 18.75 times fewer passes, but 9 times faster
    assert f"| reference | {ALL} | not known | **missed** | **missed** |" in text
    assert f"| prompt | {SHIPPED} | equal or lower | met | met |" in text
    assert "| 32x32 | reference | one noisy latent | 6 | 10 | 50 | 5.0 | **no** |" in text
    assert "| CPU | 70.000 | 64 | **no** |" in text
    assert "| GPU | 0.000 | 0 | no GPU here |" in text
    assert "all four | **598**" in text
    assert "| a | 3.0 | 3.0 | 3.0 | 3.0 | 3.0 | 3.0 | met |" in text
    assert "| b | 3.0 | 1.9 | 3.0 | 3.0 | 1.0 | 1.0 | **missed** |" in text
    measured["side_by_side"]["rows"][0]["error"] = [0.01, 0.03]
    assert f"| reference | {ONE} | **larger** | met" in page(measured, "memwatch bench --cost")
    assert "{" not in text


def test_the_plot_is_drawn(measured, tmp_path):
    plot(measured["curves"], tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 0


def test_what_is_put_side_by_side():
    config = load_config(None)
    error = {d: np.ones((1, 2)) for d in designs(1)}
    searches = {
        (kind, name): Search(np.ones((1, 2)), error, n)
        for (kind, (name, n)) in itertools.product(("reference", "prompt"), ((ONE, 1), (ALL, 4)))
    }
    found = list(plans(searches, config))
    assert [(kind, name) for kind, name, *_ in found] == [*searches, ("reference", SHIPPED), ("prompt", SHIPPED)]
    assert found[0][2] == Design(1, 1)
    assert found[-1][2:] == (
        shipped(config),
        len(config.levels.timesteps),
        config.seeds,
    )
    assert large(searches, [], config, torch.device("cpu")) == []


def test_an_unknown_network_is_one_clear_line(tmp_path, capsys):
    assert main(["bench", "--cost", str(tmp_path), "--cost-models", "sd3"]) == 2
    assert "--cost-models: got 'sd3', allowed: tiny-sd, sd15-32, sd15-64" in capsys.readouterr().err


def test_numbers_are_plain(measured):
    assert json.loads(json.dumps(measured, allow_nan=False))["coordinates"] == 1024
    assert dataclasses.asdict(Rows(1, 2, 3)) == {"forward": 1, "graph": 2, "products": 3}
