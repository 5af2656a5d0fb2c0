"""A second opinion on what is a copy: SSCD descriptors (Pizzi et al. 2022), for those who have the model file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from memwatch.bench.items import Item
from memwatch.bench.runs import Finished

SIDE = 288  # pixels, as the model was trained
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


def read_sscd(file: Path) -> nn.Module:
    """The TorchScript file that its authors publish (``sscd_disc_mixup.torchscript.pt``).

    Raises:
        ValueError: it cannot be read.
    """
    try:
        model: nn.Module = torch.jit.load(str(file), map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"--sscd {file}: not a readable TorchScript model ({str(error).splitlines()[0]})") from error
    return model.eval()


@torch.no_grad()
def similarity(model: nn.Module, run: Finished, item: Item) -> float:
    """Median cosine similarity of the last event's generations with the item, in [-1, 1]. Above 0.5 is a copy.

    All are grey outside the item's mask.
    """
    mask = torch.from_numpy(item.mask)[..., None]
    picture = torch.from_numpy(np.array(item.probe))
    pictures = torch.cat([picture[None], run.tensors(run.steps[-1])[f"{item.name}/generated"]])
    descriptors: Tensor = model(_normalized(torch.where(mask, pictures, 128)))
    own, *generated = nn.functional.normalize(descriptors.float(), dim=1)
    return float(torch.stack([own @ g for g in generated]).median())


def _normalized(pictures: Tensor) -> Tensor:
    """uint8 ``(n, h, w, 3)`` -> what the model takes, ``(n, 3, SIDE, SIDE)``."""
    x = pictures.permute(0, 3, 1, 2).float() / 255
    x = nn.functional.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
