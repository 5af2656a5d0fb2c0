"""``memwatch cost MODEL``: what watching this model costs on this machine."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from memwatch.bench.events import LOOKED_AT, Numbers, Setting, SettingCost, Workbench, varied
from memwatch.cli.scan_options import require_option
from memwatch.config_file import load_config
from memwatch.report.about import machine
from memwatch.scan.checkpoints import CheckpointError, is_pipeline, load_model

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEFAULTS: dict[str, Any] = {"probes": 8, "controls": 20, "prompts": 0, "resolution": None, "config": None}
DEFAULTS |= {"step_seconds": None, "batch_size": 1, "steps": 2000, "device": None, "dtype": "float32", "brief": False}
EPILOG = """\
Whole events of one and of two made-up probes are timed: what one more costs is multiplied. The table is Markdown, to
paste. Exit code: 0 done, 2 nothing could be done, for the one reason given.
"""
HEAD = """# What memwatch costs here

`{command}`
{machine}, {dtype}.

{probes} probes and {controls} controls ({references} reference, {prompts} prompt). Measured on {looked_at} of each
kind, made up, at {levels} noise levels: what one more costs, times {times}, and what an event costs in any case.
Passes are rows through the network, forward or backward. Peak memory is {memory};
it does not grow with the number of probes, since a batch never holds two.
"""
ONCE = """
Once in a run the first full event takes {baseline} s longer, because it measures the baseline as well; a probe that the
screen chooses before then measures its own. On disk a baseline takes {ledger} in the ledger and {weights} of
weights."""
LOOP = """
A step of the loop takes {step:.3g} s ({known}). In a run of {steps} steps memwatch looks every {every} steps under the
settings as given; that takes {overhead} of training time (overhead: {allowed:g} is allowed{verdict}).
"""


@dataclass(frozen=True)
class Loop:
    """The loop that is watched: seconds of an optimizer step, how they are known, and how many steps there are."""

    seconds: float
    known: str
    steps: int


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "What watching this model costs on this machine: seconds, memory, and share of training time."
    parser.epilog = EPILOG
    parser.set_defaults(**DEFAULTS)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a diffusers pipeline: its folder or hub id")
    add("--probes", type=int, metavar="N", help="images that are watched (default: %(default)s)")
    add("--controls", type=int, metavar="N", help="images held out (default: %(default)s)")
    add("--prompts", type=int, metavar="N", help="prompt probes, controls included (default: %(default)s)")
    add("--resolution", type=int, metavar="PIXELS", help="side of the images (default: the model's own)")
    add("--config", metavar="FILE", help="settings as for training (YAML)")
    add(
        "--step-seconds",
        type=float,
        metavar="S",
        help="of an optimizer step of your loop; without it steps of this model are timed",
    )
    help_ = "of the timed training steps: AdamW, gradients of all parameters (default: %(default)s)"
    add("--batch-size", type=int, metavar="N", help=help_)
    add("--steps", type=int, metavar="N", help="optimizer steps of the run (default: %(default)s)")
    add("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is one)")
    add("--dtype", metavar="TYPE", help=f"{', '.join(DTYPES)} (default: %(default)s)")
    add("--brief", action="store_true", help="only the settings as given, without the ones that people turn")
    add("--json", action="store_true", help="print numbers, not a table")


def run(args: argparse.Namespace) -> int:
    """Measure, and print the table."""
    check(args)
    config = load_config(args.config)
    config = replace(config, resolution=args.resolution or config.resolution)
    numbers = Numbers(args.probes + args.controls, args.prompts)
    accelerator = Accelerator(cpu=args.device == "cpu")
    settings = [Setting("as given", config), *([] if args.brief else varied(config))]
    timed, seconds = args.step_seconds is None, args.step_seconds
    with tqdm(total=len(settings) * Workbench.ticks(numbers) + timed, unit="run", disable=None) as bar:
        model = model_of(args.model).to(accelerator.device)
        if args.dtype != "float32":
            model = model.to(DTYPES[args.dtype])
        bench = Workbench(accelerator, model, args.model, config.resolution)
        costs = []
        for setting in settings:
            bar.set_description(setting.name)
            costs.append(bench.measure(setting, numbers, bar.update))
        if timed:
            bar.set_description("training steps")
            seconds = bench.step_seconds(args.batch_size)
            bar.update()
    known = f"timed: this model, batch {args.batch_size}, AdamW on all parameters" if timed else "--step-seconds"
    loop, where = Loop(seconds, known, args.steps), machine("torch", "diffusers", "memwatch", device=accelerator.device)
    if args.json:
        print(json.dumps(as_json(costs, args, numbers, loop, where), indent=1, allow_nan=False))
    else:
        print(page(costs, args, numbers, loop, where), end="")
    return 0


def check(args: argparse.Namespace) -> None:
    """What the command line may not say.

    Raises:
        ValueError: the message names option, value and what is allowed.
    """
    least = {"probes": 0, "controls": 0, "prompts": 0, "batch_size": 1, "steps": 1}
    for name, smallest in least.items():
        value = getattr(args, name)
        require_option(value >= smallest, f"--{name.replace('_', '-')}", value, f"{smallest} or greater")
    some = args.probes + args.controls + args.prompts > 0
    require_option(some, "--probes", args.probes, "1 or greater, since there are no controls and no prompts")
    seconds = args.step_seconds
    ok = seconds is None or (math.isfinite(seconds) and seconds > 0)
    require_option(ok, "--step-seconds", seconds, "greater than 0")
    require_option(args.dtype in DTYPES, "--dtype", args.dtype, ", ".join(DTYPES))
    has_cuda = torch.cuda.is_available()
    allowed = "cpu, cuda" if has_cuda else "cpu, since there is no CUDA here"
    ok = args.device in (None, "cpu") or (has_cuda and args.device == "cuda")
    require_option(ok, "--device", args.device, allowed)
    allowed = "the folder or hub id of a diffusers pipeline"
    require_option(is_pipeline(args.model), "MODEL", args.model, allowed)


def model_of(source: str) -> torch.nn.Module:
    """The network of a pipeline.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return load_model(source)
    except CheckpointError as error:
        allowed = "the folder or hub id of a diffusers pipeline"
        raise ValueError(f"MODEL: got {source!r}, allowed: {allowed} ({error})") from error


# --- showing ---------------------------------------------------------------------------------------------------------


def page(costs: Sequence[SettingCost], args: argparse.Namespace, numbers: Numbers, loop: Loop, where: str) -> str:
    """Markdown."""
    given, pace = costs[0], costs[0].pace(loop.seconds, loop.steps)
    cuda = args.device != "cpu" and torch.cuda.is_available()
    head = HEAD.format(
        command=command_of(args),
        machine=where,
        dtype=args.dtype,
        probes=args.probes + args.prompts,
        controls=args.controls,
        references=numbers.references,
        prompts=numbers.prompts,
        looked_at=" and on ".join(map(str, LOOKED_AT)),
        levels=len(given.setting.config.levels.timesteps),
        times=times_text(numbers),
        memory="what PyTorch allocates on the GPU" if cuda else "what the process's resident set rises by",
    )
    once = ONCE.format(baseline=f"{given.baseline:.3g}", ledger=size(given.ledger), weights=size(given.weights))
    share = LOOP.format(
        step=loop.seconds,
        known=loop.known,
        steps=loop.steps,
        every=pace.every_steps,
        overhead=percent(pace.overhead),
        allowed=given.setting.config.overhead,
        verdict="" if pace.within else ", so this is more than that",
    )
    return "\n".join([head, *event_table(costs), once, share, *pace_table(costs, loop)]) + "\n"


def times_text(numbers: Numbers) -> str:
    """``28``, or ``28 (reference) and 4 (prompt)``."""
    kinds = [(numbers.references, "reference"), (numbers.prompts, "prompt")]
    some = [f"{n} ({kind})" for n, kind in kinds if n]
    return " and ".join(some) if len(some) > 1 else some[0].partition(" ")[0]


def event_table(costs: Sequence[SettingCost]) -> Iterator[str]:
    """Every kind of event under every setting."""
    yield "| settings | event | passes | seconds | peak memory |"
    yield "|---|---|---|---|---|"
    for cost in costs:
        for name, event in cost.events.items():
            seconds, peak = f"{event.seconds:.3g}", "-" if event.peak is None else size(event.peak)
            yield f"| {cost.setting.name} | {name} | {event.passes:.0f} | {seconds} | {peak} |"


def pace_table(costs: Sequence[SettingCost], loop: Loop) -> Iterator[str]:
    """How often memwatch looks under every setting, and what that comes to."""
    yield "| settings | an event every | overhead | ledger, one event |"
    yield "|---|---|---|---|"
    for cost in costs:
        pace = cost.pace(loop.seconds, loop.steps)
        overhead = percent(pace.overhead)
        yield f"| {cost.setting.name} | {pace.every_steps} steps | {overhead} | {size(cost.ledger)} |"


def percent(share: float) -> str:
    """``1.8 %``"""
    return f"{100 * share:.2g} %" if share < 1 else f"{100 * share:.0f} %"


def size(number: int) -> str:
    """``1.5 MB``: bytes for people, in powers of 1000."""
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def as_json(
    costs: Sequence[SettingCost], args: argparse.Namespace, numbers: Numbers, loop: Loop, where: str
) -> dict[str, Any]:
    """The same as plain values; seconds, bytes and shares."""

    def plain(cost: SettingCost) -> dict[str, Any]:
        pace = asdict(cost.pace(loop.seconds, loop.steps))
        events = {name: asdict(event) for name, event in cost.events.items()}
        once = {"baseline_seconds": cost.baseline, "ledger_bytes": cost.ledger, "weights_bytes": cost.weights}
        return {"name": cost.setting.name, "events": events, "pace": pace} | once

    head = {"command": command_of(args), "machine": where, "dtype": args.dtype, "measured_on": list(LOOKED_AT)}
    return head | {"probes": asdict(numbers), "loop": asdict(loop), "settings": [plain(cost) for cost in costs]}


def command_of(args: argparse.Namespace) -> str:
    """The command line that leads here; options at their default are left out."""
    words = [f"memwatch cost {args.model}"]
    for name, default in DEFAULTS.items():
        if (value := getattr(args, name)) != default:
            option = f"--{name.replace('_', '-')}"
            words.append(option if value is True else f"{option} {value}")
    return " ".join(words)
