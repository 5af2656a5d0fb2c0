"""The prompts, seeds and masks of Webster 2023.

The paper is *A Reproducible Extraction of Training Images from Diffusion Models* (arXiv 2305.08694). Its hub data set
is ``fraisdufour/templates-verbs``; a folder of the same layout does as well. It holds

* a parquet file of memorized prompts, whose name starts with the model's (``sdv1``, ``sdv2``). Its columns are
  ``caption``; ``overfit_type`` (TV template, MV matching verbatim, RV retrieved verbatim, N none); and ``gen_seeds``,
  pairs of a seed and a row of the templates' table, -1 for verbatim;
* ``templates/metadata.parquet``, the templates' table. Its column ``mask_file`` is a path inside the folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from PIL import Image

REPOSITORY = "fraisdufour/templates-verbs"
SIZE = 256  # pixels; masks are compared at this size
COLUMNS = {"caption", "overfit_type", "gen_seeds"}
KINDS = {"TV": "template", "MV": "verbatim", "RV": "verbatim"}


@dataclass(frozen=True)
class Case:
    """One image to generate.

    Attributes:
        name: unique, and usable as a file name.
        mask: bool ``(256, 256)``, true where memorized; ``None`` for a prompt that is not memorized.
    """

    name: str
    prompt: str
    seed: int
    mask: np.ndarray | None


def download() -> Path:
    """Download the data set from the hub, again only when it has changed.

    Raises:
        ValueError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        patterns = ["*.parquet", "*.txt", "templates/**"]
        return Path(snapshot_download(REPOSITORY, repo_type="dataset", allow_patterns=patterns))
    except (OSError, HfHubHTTPError) as error:
        remedy = "a folder of it can be passed as --data_dir"
        raise ValueError(f"hub data set {REPOSITORY} cannot be loaded; {remedy}: {error}") from error


def memorized(folder: Path, model: str, max_seeds: int = 4) -> tuple[list[Case], list[str]]:
    """Read the template and verbatim cases, and a message for each that had to be left out.

    Args:
        model: ``sdv1`` or ``sdv2``.
        max_seeds: cases per prompt.

    Raises:
        ValueError: the folder does not have this layout.
    """
    rows, templates = read(ground_truth(folder, model)), read(folder / "templates" / "metadata.parquet")
    cases, problems = [], []
    for number, row in enumerate(rows):
        kind = KINDS.get(row["overfit_type"])
        if kind is None:
            continue
        for pair in (row["gen_seeds"] or [])[:max_seeds]:
            seed, template = pair if isinstance(pair, list) else (pair, -1)
            name = f"{kind}-{number:04d}-seed-{seed:02d}"
            try:
                whole = np.ones((SIZE, SIZE), dtype=bool)
                mask = whole if kind == "verbatim" else template_mask(folder, templates, template)
                cases.append(Case(name, row["caption"], int(seed), mask))
            except (ValueError, OSError) as error:
                problems.append(f"{name}: {error}")
    if not cases:
        raise ValueError("; ".join([f"{folder}: no memorized prompt with seeds for {model}", *problems]))
    return cases, problems


def non_memorized(file: Path) -> list[Case]:
    """Read a text file of one prompt per line; every case has seed 0.

    Raises:
        ValueError: the file is missing or empty.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such file; it should hold prompts that are not memorized, one per line")
    prompts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{file}: holds no prompt")
    return [Case(f"non-memorized-{number:04d}", prompt, 0, None) for number, prompt in enumerate(prompts)]


def ground_truth(folder: Path, model: str) -> Path:
    """The parquet file of ``model`` that has been matched, that is, one with ``gen_seeds``.

    Raises:
        ValueError: there is none.
    """
    found = sorted(folder.glob("*.parquet"))
    for file in found:
        if file.name.startswith(model) and set(pyarrow.parquet.read_schema(file).names) >= COLUMNS:
            return file
    names = ", ".join(file.name for file in found) or "none"
    wanted = f"{model}*.parquet with caption, overfit_type and gen_seeds"
    raise ValueError(f"{folder}: no {wanted}; parquet files there: {names}")


def read(file: Path) -> list[dict[str, Any]]:
    """Read the rows of a parquet file.

    Raises:
        ValueError: the file is missing or broken.
    """
    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(file).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{file}: not a readable parquet file: {error}") from error
    return rows


def template_mask(folder: Path, templates: list[dict[str, Any]], row: int) -> np.ndarray:
    """The mask of a template, bool ``(256, 256)``, resized to the nearest pixel.

    Raises:
        ValueError: there is no such template.
        OSError: its file is missing, or no image.
    """
    if not 0 <= row < len(templates):
        raise ValueError(f"template {row} is not in a table of {len(templates)}")
    named = Path(templates[row]["mask_file"])
    file = folder / named if (folder / named).is_file() else folder / "templates" / named.name
    with Image.open(file) as picture:
        mask: np.ndarray = np.asarray(picture.convert("L").resize((SIZE, SIZE), Image.Resampling.NEAREST)) > 127
    return mask
