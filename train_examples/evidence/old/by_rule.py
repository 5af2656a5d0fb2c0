"""A finished run by another rule for copies: everything that rests on what is stored can be counted by either."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from evidence.old.descriptor import Rule
from evidence.runs.finished import Finished
from evidence.runs.protocol import through_vae
from evidence.worlds.bases import Base
from evidence.worlds.items import Item, Kind

from memwatch.denoiser import Components

OTHERS = 32  # pictures that say what chance gives, at most


@dataclass(frozen=True)
class ByRule(Finished):
    """The same run, where ``copies`` is what another rule says of its generations.

    Attributes:
        vae: the autoencoder that its generations came through; ``None`` where the model works on pixels.
    """

    rule: Rule
    vae: Any

    def copies(self, item: Item, step: int) -> np.ndarray:
        if not item.mask.any() or item.name not in self.numbers[step].get("copy_ratio", {}):
            return np.zeros(0, dtype=bool)
        if (item.name, step) not in self._known:
            self._known[item.name, step] = self.copies_inside(item, step, item.mask)
        return self._known[item.name, step]

    def copies_inside(self, item: Item, step: int, mask: np.ndarray) -> np.ndarray:
        """The same inside another bool mask ``(SIZE, SIZE)``, which is not empty."""
        target, key = self._targets[item.name], (item.name, mask.tobytes())
        if key not in self._chance:
            self._chance[key] = self.rule.chance(target, self.never_shown(item), mask)
        return self.rule.copies(target, self.generated(item, step), mask, self._chance[key])

    def never_shown(self, item: Item) -> np.ndarray:
        """Pictures that were held out from training, uint8 ``(m, H, W, 3)``: what chance gives.

        Generations of other captions are no such thing: a DreamBooth run of this benchmark shows its six pictures under
        captions that it was never trained on.
        """
        unseen = [i for i in self.of_kind(Kind.HELD_OUT, Kind.CONTROL) if i.dose == 0 and i.name != item.name]
        return np.stack([self._targets[i.name] for i in unseen][:OTHERS])

    @cached_property
    def _targets(self) -> dict[str, np.ndarray]:
        """Every item's probe as the autoencoder gives it back, RGB uint8: what it loses is nobody's copying error."""
        pictures = through_vae([np.asarray(item.probe) for item in self.items], self.vae)
        shown = (pictures * 255).round().astype(np.uint8)
        return {item.name: picture for item, picture in zip(self.items, shown, strict=True)}

    @cached_property
    def _known(self) -> dict[tuple[str, int], np.ndarray]:
        return {}

    @cached_property
    def _chance(self) -> dict[tuple[str, bytes], float]:
        return {}


def by_rule(runs: Sequence[Finished], rule: Rule, parts_of: Callable[[Base], Components]) -> list[ByRule]:
    """The same runs by another rule.

    Args:
        parts_of: the autoencoder of a base; it is asked once per base.
    """
    vaes = {name: parts_of(start).vae for name, start in {run.world.base: run.world.start for run in runs}.items()}
    return [ByRule(run.home, rule, vaes[run.world.base]) for run in runs]
