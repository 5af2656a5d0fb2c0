"""A training set whose rows have image and text, and a loop that trains on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from support.builders import Loop
from support.families import SIZE, TOKENS
from torch.utils.data import DataLoader, Sampler

REPEATED = 6  # rows, the first ones, that hold the same picture


def photo(seed: int) -> Image.Image:
    """Smooth colours, so that pictures of different seeds are no duplicates of each other."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def make_rows(count: int = 60) -> list[dict[str, Any]]:
    """Rows with image, text and what is trained on; the first ``REPEATED`` are one picture."""
    generator, rows = torch.Generator().manual_seed(5), []
    for i in range(count):
        row: dict[str, Any] = {"image": photo(max(0, i - REPEATED + 1)), "text": f"a photo of {i}", "row": i}
        tensors = {"latents": (4, SIZE // 2, SIZE // 2), "hidden": (TOKENS, 16)}
        rows.append(row | {key: torch.randn(size, generator=generator) for key, size in tensors.items()})
    return rows


class Epochs(Sampler[int]):
    """An order for each epoch, whatever came before."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.epoch = rows, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        yield from np.random.default_rng((3, self.epoch)).permutation(len(self.rows)).tolist()


class RowsLoop(Loop):
    """A loop over such rows. ``seen`` are the rows that it was given."""

    def __init__(self, pretrained: Path, folder: Path | None = None, rows: Any = None, **options: Any) -> None:
        super().__init__(pretrained, folder, **options)
        self.rows, self.seen = make_rows() if rows is None else rows, list[int]()
        self.accelerator._dataloaders.clear()
        loader = DataLoader(
            self.rows, 2, sampler=Epochs(self.rows), collate_fn=self.batch_of, generator=torch.Generator()
        )
        self.loader = self.accelerator.prepare(loader)

    def batch_of(self, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen += [row["row"] for row in rows]
        return torch.stack([row["latents"] for row in rows]), torch.stack([row["hidden"] for row in rows])

    def watch(self, pretrained: Any, probes: Any = None, **overrides: Any) -> Any:
        """Without probes they are picked."""
        from memwatch import MemWatch

        overrides.setdefault("output_dir", str((self.folder or Path("memwatch")) / "memwatch"))
        return MemWatch(self.accelerator, self.unet, pretrained, probes=probes, ema=self.ema, **overrides)
