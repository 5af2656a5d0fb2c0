"""The benchmark's page, ``results/README.md``: what memwatch said of pairs of twins, against what the twins say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from evidence.pages.markdown import PACKAGES, markdown_table
from evidence.pages.pairs import agreement, read_labels
from evidence.runs.finished import Pair
from evidence.runs.protocol import NUM_SEEDS
from evidence.verdicts.product import judged
from evidence.verdicts.prompts import prompt_table
from evidence.verdicts.tables import Judged, bar_table, kind_table, mistakes, one_subject_table
from evidence.verdicts.truth import COPIED, truths_of
from memwatch.config import MemWatchConfig
from memwatch.messages import counted
from memwatch.report.about import machine

ONE_SUBJECT = ("dreambooth", "prior")  # worlds that have a table of their own
LABELS = Path(__file__).with_name("pairs.csv")
PAGE = """# Twins: is what memwatch calls really stored, and does it call in time?

Written by `bench.py --report` from {pairs} of twins ({names}), trained at commit {commits}. {machine}.

Two models are fine-tuned from one base on one set, but every item that may be stored is in one of the two halves only.
Both look at all items at every event ({events} events, noise levels {levels}). So each item has its own counterfactual:
the same picture under the same caption, and a model that never saw it. None of the following is computed by memwatch:

* **stored**: the twin that saw an item denoises it better inside its mask, on noise that memwatch never uses: the lower
  97.5 % bound of the log of the ratio of losses is above 0, and the ratio above what any held-out picture shows.
* **copied**: the graded copy `G = 1 - d(in) / d(out)` of {seeds} generations each reaches {copied:g}; d is the mean
  distance of the nearest quarter to the item inside its mask, at any exposure. The threshold comes from pairs that were
  labelled by eye (`evidence/pages/pairs.csv`, pictures in `results/pairs-*.png`): {labels}
  The *first copy* is the first of two events in a row at which it does, or the last event: one may be a lucky draw.

Seeds up to 11 chose memwatch's constants, later ones report. Every watched picture is a probe, more than people have;
the run's threshold pays for all of them. `ablation.md` says what each part of the rule is for, `nulls.md` what is
called where nothing is planted, `promise.md` what a simulation says of false alarms.

## Numbers with a bar
{bars}

## By kind of item
*gap*: by how much the other twin's loss is larger, natural log. *T*: median, and the largest in brackets.

{kinds}

## What it gets wrong
{wrong}

## Prompt probes
Captions are watched instead of pictures: four generations each, noised again, at the last event, against the captions
of held-out pictures. *copied*: captions that bring out their own item. *alike*: captions that this twin never saw and
that bring out what it was trained on under another; they are right to stand out. *other twin*: the rest of those.

{prompts}

## One subject
DreamBooth: six pictures of a new subject under one caption in each half; two more of it are controls. Views are
pictures of the subject that the half never saw.

{subjects}
"""


def write_page(pairs: Sequence[Pair], config: MemWatchConfig, folder: Path) -> Path:
    """``README.md`` in ``folder``.

    Args:
        pairs: of any worlds; their noise levels must hold those of ``config``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    everything = [Judged(judged(t.run, config), t) for t in tqdm(truths_of(pairs), desc="memwatch's own judge")]
    subjects = [j for j in everything if j.product.run.world_name in ONE_SUBJECT]
    found = [j for j in everything if j not in subjects]
    runs = [run for pair in pairs for run in pair.runs]
    text = PAGE.format(
        pairs=counted(len(pairs), "pair"),
        names=", ".join(pair.name for pair in pairs),
        commits=", ".join(sorted({f"`{run.plan['commit']}`" for run in runs})),
        machine=machine(*PACKAGES),
        events=", ".join(sorted({str(len(run.steps) - 1) for run in runs})),
        levels=" and ".join(map(str, config.levels.timesteps)),
        seeds=NUM_SEEDS,
        copied=COPIED,
        labels=said_of_labels(),
        bars=markdown_table(bar_table(found, config)),
        kinds=markdown_table(kind_table(found)),
        wrong="\n".join(
            f"* {what.capitalize()}: {', '.join(names) or 'none'}." for what, names in mistakes(found).items()
        ),
        prompts=markdown_table(prompt_table([j.truth for j in found], config)),
        subjects=markdown_table(one_subject_table(subjects)),
    )
    file = folder / "README.md"
    file.write_text(text, encoding="utf-8")
    return file


def said_of_labels() -> str:
    """How well the grade says what eyes say, in one sentence."""
    a = agreement(read_labels(LABELS))
    numbers = f"AUC {a['AUC']:.3f}, precision {a['precision']:.2f} and recall {a['recall']:.2f}"
    return f"{a['pairs']:.0f} pairs, {a['copied']:.0f} copied, {numbers}."
