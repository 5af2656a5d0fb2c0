"""What a proof says, for people, trackers and files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from memwatch.judge.findings import Finding
from memwatch.measure.copies import Proof
from memwatch.report.history import Row


def copied_text(finding: Finding) -> str | None:
    """A sentence: how many generations copy the region, and which other watched images; ``None`` without a proof."""
    proof = finding.proof
    if proof is None:
        return None
    count = len(proof.generations)
    if not np.isfinite(proof.ratios).any():
        why = "the region is flat" if proof.num_others else "there are no other pictures to compare with"
        return f"{count} generations, but nobody can tell a copy here: {why}"
    if finding.observation.probe.is_reference:
        text = f"{proof.copied} of {count} generations {'copies' if proof.copied == 1 else 'copy'} this region"
    else:
        text = f"{proof.copied} of {count} generations show the same in this region"
    if others := copies_of_others(finding.name, proof):
        text += f"; copies of other images: {', '.join(f'{name} ({n})' for name, n in others.items())}"
    return text


def copies_of_others(name: str, proof: Proof) -> dict[str, int]:
    """By name of another watched image, how many generations copy it."""
    return dict(Counter(other for names in proof.copies for other in names if other != name))


def copied_scalars(findings: Sequence[Finding]) -> dict[str, float]:
    """``memwatch/copied/PROBE`` and ``memwatch/num_copied``; none where nothing was generated."""
    proofs = {f.name: f.proof for f in findings if f.proof is not None}
    if not proofs:
        return {}
    values: dict[str, float] = {f"memwatch/copied/{n}": p.copied / len(p.generations) for n, p in proofs.items()}
    return values | {"memwatch/num_copied": sum(p.copied > 0 for p in proofs.values())}


def copied_row(finding: Finding) -> dict[str, Any] | None:
    """A proof in ``history.jsonl``; ``None`` without one."""
    proof = finding.proof
    if proof is None:
        return None
    return {
        "generations": len(proof.generations),
        "copies": proof.copied,
        "ratios": list(proof.ratios),
        "is_copy": list(proof.is_copy),
        "of_others": copies_of_others(finding.name, proof),
    }


def proof_words(row: Row, *, brief: bool = False) -> str | None:
    """What a probe's generations show, read back from the history; ``None`` where nothing was generated.

    Args:
        brief: for a column that says already that it is about generations.
    """
    proof = row.copied
    if proof is None:
        return None
    if all(ratio is None for ratio in proof.get("ratios", [0.0])):  # nothing to tell a copy from
        return "nobody can tell" if brief else f"{proof['generations']} generations, but nobody can tell a copy here"
    one, noun = proof["copies"] == 1, "" if brief else "generations "
    verb = ("copies" if one else "copy") if row.is_reference else ("shows" if one else "show")
    return f"{proof['copies']} of {proof['generations']} {noun}{verb} it"
