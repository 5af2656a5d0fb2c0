"""Evidence: the regions of the map that decides, and the numbers of the one that decides among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from memwatch.config import MemWatchConfig
from memwatch.judge.alerts import Evidence
from memwatch.judge.calibration import size_index
from memwatch.judge.compared import References
from memwatch.judge.regions import Region, box_of, components, estimate
from memwatch.measure.measurement import Observation
from memwatch.measure.signals import Signals, factor


def regions_of(
    observation: Observation, signals: Signals | None, references: References, config: MemWatchConfig
) -> tuple[tuple[Region, ...], np.ndarray | None]:
    """The regions of the deciding map with all their numbers, the one that decides first, and their labels ``(h, w)``.

    The one that decides exceeds the controls most; without controls it is the strongest.
    """
    if signals is None or signals.decisive is None or signals.deciding is None:
        return (), None
    rule, samples = config.regions, signals.decisive.samples.double().numpy()
    mean, levels = samples.mean(0), signals.deciding.mean
    scale = observation.image.shape[0] // mean.shape[0] if observation.image is not None else 1
    found = []
    for inside in components(mean, rule.min_factor, rule.relative, rule.min_area):
        effect, sem, low = estimate(samples, inside, rule.min_factor, rule.relative)
        level = observation.timesteps[int(levels[:, torch.from_numpy(inside)].mean(1).argmax())]
        own = float(mean[inside].mean())
        region = Region(box_of(inside, scale), float(inside.mean()), own, effect, sem, low, level=level)
        found.append((calibrated(region, size_index(int(inside.sum()), inside.size), references), inside))
    found.sort(key=lambda pair: pair[0].effect if pair[0].z_score is None else pair[0].z_score, reverse=True)
    labels = np.zeros(mean.shape, dtype=np.int32)
    for i, (_, inside) in enumerate(found, start=1):
        labels[inside] = i
    return tuple(region for region, _ in found), labels


def calibrated(region: Region, size: int, references: References) -> Region:
    """The region with what the controls and the peers say of it.

    Args:
        size: at which it is compared, see ``calibration.size_index``.
    """
    null, peers = references.controls, references.peers
    rank_p_peers = peers.rank_p(region.mean, size) if len(peers) else None
    if not null.is_enough:
        return replace(region, rank_p_peers=rank_p_peers)
    z_score, rank_p = null.z_score(region.mean, size), null.rank_p(region.mean, size)
    return replace(region, z_score=z_score, p=null.p_value(z_score), rank_p=rank_p, rank_p_peers=rank_p_peers)


def evidence_of(
    observation: Observation, signals: Signals | None, regions: Sequence[Region], references: References
) -> Evidence:
    """The numbers of the region that decides; where there is none, those of nothing."""
    null, compared = references.controls, signals is None or signals.decisive is not None
    nothing = 1.0 if null.is_enough and compared and observation.finite else None
    evidence = Evidence(
        p=nothing,
        rank_p=nothing,
        num_controls=len(null),
        any_controls=references.any_controls,
        num_peers=len(references.peers),
        severity_peers=references.severity_peers,
        finite=observation.finite,
        compared=compared,
    )
    if not regions:
        return evidence
    r = regions[0]
    return replace(
        evidence,
        severity=factor(max(0.0, r.effect)),
        severity_low=factor(r.low),
        p=r.p,
        rank_p=r.rank_p,
        z_score=r.z_score,
        rank_p_peers=r.rank_p_peers,
    )
