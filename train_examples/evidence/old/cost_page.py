"""The page of ``memwatch bench --cost``: ``cost.md`` (its prose lies beside this file), ``cost.json``, ``cost.png``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from evidence.old.cost import ALL, BARS, MODELS, ONE, search, side_by_side
from evidence.old.cost_scale import curves, large
from evidence.old.events import Numbers
from evidence.old.held import NUM_PROBES, RESOLUTION, SIDE, held_after_first_event
from evidence.old.procedure import STEPS, VECTORS, published_rows
from evidence.old.stage import NUM_PIXELS, Stage
from evidence.old.variance import variance_rows, variances
from evidence.pages.markdown import PACKAGES, markdown_table, shown

from memwatch.config import MemWatchConfig
from memwatch.report.about import machine

TEMPLATE = Path(__file__).with_name("cost.md").read_text(encoding="utf-8")
NUM_ITEMS = 4
NUMBERS = Numbers(28)
MEMORY_BARS = {"cpu": 64e6, "gpu": 0.0}  # bytes, at most
CPU = "Seconds are processor time of one core, which what else runs on the machine does not lengthen."
GPU = "Seconds are the clock's, with the GPU waited for."


def measure_all(
    base: Path, runs: Path, config: MemWatchConfig, models: Sequence[str] = MODELS, num_items: int = NUM_ITEMS
) -> dict[str, Any]:
    """Everything that the page shows, as plain values.

    Args:
        base: the tiny-sd pipeline. runs: where the benchmark's runs lie.
        models: of ``MODELS``; the first is always needed.
    """
    accelerator = Accelerator()
    device = accelerator.device
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        stage = Stage.of(base, runs, num_items)
        stage.model.to(device)
        searches = search(stage, config)
        found: dict[str, Any] = {
            "machine": machine(*PACKAGES, device=device),
            "device": device.type,
            "models": list(models),
        }
        found |= {"timesteps": list(config.levels.timesteps), "seeds": config.seeds}
        found["variances"] = variances(stage, config)
        found["side_by_side"] = side_by_side(stage, searches, config)
        found |= {"pixels": NUM_PIXELS, "coordinates": stage.denoiser.latent_channels * stage.side**2}
        sides = [int(name.rpartition("-")[2]) for name in models if name.startswith("sd15")]
        found["large"] = large(searches, sides, config, device)
        found["curves"] = curves(accelerator, stage.model, base, config, NUMBERS)
        found["held"] = held_after_first_event(accelerator, base, config)
    finally:
        torch.set_num_threads(threads)
    return found


def write(found: Mapping[str, Any], folder: Path, command: str) -> None:
    """``cost.md``, ``cost.json`` and ``cost.png`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cost.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    plot(found["curves"], folder / "cost.png")
    (folder / "cost.md").write_text(page(found, command), encoding="utf-8")


def page(found: Mapping[str, Any], command: str) -> str:
    """Markdown."""
    beside, maps = found["side_by_side"], {name: rows.passes for name, rows in published_rows().items()}
    published = beside["published"]
    return TEMPLATE.format(
        command=command,
        machine=found["machine"],
        clock=CPU if found["device"] == "cpu" else GPU,
        says=beside["says"],
        items=beside["items"],
        steps=STEPS,
        before=STEPS - 1,
        vectors=VECTORS,
        passes_null=maps["null"],
        passes_snapshot=maps["snapshot"],
        passes_score=maps["score null"],
        passes_score_snapshot=maps["score snapshot"],
        rows=published["rows"],
        lenient=published["lenient"],
        shared=published["shared"],
        published_seconds=ranged(published["seconds"], published["seconds_interval"]),
        seeds=found["seeds"],
        coordinates=found["coordinates"],
        pixels=found["pixels"],
        one=ONE,
        all=ALL,
        timesteps=", ".join(map(str, found["timesteps"])),
        side_by_side=markdown_table([beside_row(row) for row in beside["rows"]]),
        bar_reference="{:g} and {:g}".format(*BARS["reference"]),
        bar_prompt="{:g} and {:g}".format(*BARS["prompt"]),
        verdicts="\n".join(verdicts(beside["rows"])),
        large=markdown_table([large_row(row) for row in found["large"]]),
        per_row="\n".join(per_row_lines(found["large"])),
        numbers=NUMBERS.references,
        curves="\n\n".join(curve_table(axis, points) for axis, points in found["curves"].items()),
        variances=markdown_table(variance_rows(found["variances"])),
        held_probes=NUM_PROBES,
        resolution=RESOLUTION,
        side=SIDE,
        held=markdown_table(list(held_rows(found["held"], found["device"]))),
    )


def beside_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the comparison."""
    line = {key: row[key] for key in ("probe", "map", "draws", "vectors")}
    if row["vectors"] is None:
        return line | dict.fromkeys(BESIDE, f"none up to {VECTORS}")
    own = errors_text(row, "error") if "error" in row else "-"
    return line | dict(
        zip(
            BESIDE,
            (
                own,
                errors_text(row, "error_published") if "error" in row else "-",
                row["passes"],
                ranged(row["seconds"], row["seconds_interval"]),
                ranged(row["fewer"], row["fewer_interval"]),
                f"{row['fewer_than_rows']:.1f}, {row['fewer_than_shared']:.1f}",
                ranged(row["faster"], row["faster_interval"]),
            ),
            strict=True,
        )
    )


BESIDE = (
    "error",
    "published error",
    "passes",
    "seconds",
    "times fewer",
    "of all rows, of one trajectory",
    "times faster",
)


def errors_text(row: Mapping[str, Any], key: str) -> str:
    """One error per map."""
    return ", ".join(ranged(e, i, 4) for e, i in zip(row[key], row[f"{key}_interval"], strict=True))


def ranged(value: float, interval: Sequence[float] | None, digits: int = 3) -> str:
    """A number with its interval."""
    text = f"{value:.{digits}g}"
    return text if interval is None else f"{text} [{interval[0]:.{digits}g}, {interval[1]:.{digits}g}]"


def verdicts(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Bar by bar, whether it is met."""
    yield "| probe | map | error | passes | time |"
    yield "|---|---|---|---|---|"
    for row in rows:
        marks = [
            "**missed**" if row["vectors"] is None or row[key] < bar else "met"
            for key, bar in zip(("fewer", "faster"), BARS[row["probe"]], strict=True)
        ]
        yield f"| {row['probe']} | {row['map']} | {error_verdict(row)} | {marks[0]} | {marks[1]} |"


def error_verdict(row: Mapping[str, Any]) -> str:
    """Whether a row's error is what the bars ask for; the shipped settings need not have it."""
    if "error" not in row:
        return "not known"
    as_good = all(ours <= theirs for ours, theirs in zip(row["error"], row["error_published"], strict=True))
    return "equal or lower" if as_good else "**larger**"


def large_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the large network's table."""
    line = {key: row[key] for key in ("latents", "probe", "map", "passes")}
    numbers = {"seconds": f"{row['seconds']:.3g}", "published, seconds": f"{row['published']:.3g}"}
    met = "yes" if row["faster"] >= BARS[row["probe"]][1] else "**no**"
    return line | numbers | {"times faster": f"{row['faster']:.1f}", "bar met": met}


def per_row_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What single passes took, once per size."""
    by_size = {row["latents"]: row["per_row"] for row in rows}
    for latents, passes in by_size.items():
        yield (
            f"At {latents} a row takes {passes['forward']:.3g} s forward, {passes['graph']:.3g} s with a graph and "
            f"{passes['product']:.3g} s backward (batches of {passes['batch']:.0f})."
        )


def curve_table(axis: str, points: Sequence[Mapping[str, Any]]) -> str:
    """Every kind of event over one axis."""

    def line(point: Mapping[str, Any]) -> dict[str, Any]:
        cells: dict[str, Any] = {axis: point["n"]}
        for name, event in point["events"].items():
            seconds = f" ({event['seconds']:.3g} s)" if "seconds" in event else ""
            cells[name] = f"{event['passes']:.0f}{seconds}"
        return cells

    return markdown_table([line(point) for point in points])


def held_rows(held: Mapping[str, int], device: str) -> Iterator[dict[str, str]]:
    """Memory against its bars."""
    for key, bar in MEMORY_BARS.items():
        no_gpu = key == "gpu" and device == "cpu"
        met = "no GPU here" if no_gpu else "yes" if held[key] <= bar else "**no**"
        yield {"where": key.upper(), "MB": shown(held[key] / 1e6), "at most": f"{bar / 1e6:g}", "met": met}
    mapped = "mapped from files that the system may let go of"
    yield {"where": mapped, "MB": shown(held["mapped"] / 1e6), "at most": "-", "met": "-"}
    yield {"where": "disk", "MB": shown(held["disk"] / 1e6), "at most": "-", "met": "-"}


def plot(found: Mapping[str, Sequence[Mapping[str, Any]]], file: Path) -> None:
    """One panel per axis: passes as lines, seconds as dots on an axis of their own."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(4 * len(found), 3.6))
    for panel, (axis, points) in zip(axes, found.items(), strict=True):
        numbers, timed = [point["n"] for point in points], panel.twinx()
        for i, name in enumerate(points[0]["events"]):
            events = [point["events"][name] for point in points]
            panel.plot(numbers, [event["passes"] for event in events], color=f"C{i}", label=name)
            if "seconds" in events[0]:
                timed.plot(numbers, [event["seconds"] for event in events], "o", color=f"C{i}", alpha=0.6)
        panel.set(xlabel=axis, ylabel="passes", xscale="log", yscale="log", xticks=numbers)
        panel.set_xticks(numbers, labels=map(str, numbers))
        panel.minorticks_off()
        timed.set(ylabel="seconds on tiny-sd (dots)", yscale="log")
        timed.set_visible(axis != "ranks")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    plt.close(figure)
