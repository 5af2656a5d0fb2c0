"""Left out: rows of the training set that the guarded dataloader gives no more, or never gave."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any


class LeftOut:
    """Which rows are left out, and from where on.

    A row that is dropped while training runs is left out from a position in the sampler's current pass on. A resumed
    run goes through that pass again, so that it leaves out the same rows at the same positions.

    Attributes:
        held_out: rows that are never trained on: the controls.
        since: by dropped row, the position in the current pass from which it is left out.
        position: how many rows the sampler has gone through in the current pass.
    """

    def __init__(self, held_out: Collection[int] = ()) -> None:
        self.held_out = frozenset(held_out)
        self.since: dict[int, int] = {}
        self.position = 0
        self._goes_on = False  # the next pass is one that a checkpoint was taken in

    def __contains__(self, row: object) -> bool:
        return row in self.held_out or row in self.since

    def skips(self, row: int, position: int) -> bool:
        """Whether a row is left out at this position of the current pass."""
        return row in self.held_out or (row in self.since and position >= self.since[row])

    def drop(self, rows: Collection[int], position: int) -> list[int]:
        """Leave out ``rows`` from ``position`` of the current pass on. Returns those that are new."""
        new = [row for row in rows if row not in self]
        self.since |= dict.fromkeys(new, position)
        return new

    def begin_pass(self) -> None:
        """The sampler starts again: what was dropped during the last pass is left out of this one altogether."""
        self.position = 0
        if not self._goes_on:
            self.since = dict.fromkeys(self.since, 0)
        self._goes_on = False

    def state_dict(self, *, at_end: bool) -> dict[str, Any]:
        """Plain values.

        Args:
            at_end: whether the current pass has given its last batch, so that a resumed run begins with the next one.
        """
        since = dict.fromkeys(self.since, 0) if at_end else self.since
        return {"dropped": sorted(since.items())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``: the next pass is the one that it was taken in."""
        self.since = {int(row): int(position) for row, position in state.get("dropped", ())}
        self._goes_on = True


class LeavingOut:
    """A sampler without the rows that are left out. Everything else is the wrapped sampler's own.

    Args:
        sampler: gives indices of a dataloader's data set.
        left_out: the rows, shared by all samplers of a run.
        row_of: the row of the training set that an index stands for.
    """

    def __init__(self, sampler: Any, left_out: LeftOut, row_of: Callable[[int], int]) -> None:
        self.sampler, self.left_out, self.row_of = sampler, left_out, row_of

    def __iter__(self) -> Iterator[int]:
        self.left_out.begin_pass()
        for position, index in enumerate(self.sampler):
            self.left_out.position = position + 1
            if not self.left_out.skips(self.row_of(int(index)), position):
                yield index

    def __len__(self) -> int:
        """Indices of a pass in which nothing more is dropped."""
        indices = range(len(self.sampler))
        if not self.left_out.held_out and not self.left_out.since:
            return len(indices)
        return sum(not self.left_out.skips(self.row_of(index), 0) for index in indices)

    def __getattr__(self, name: str) -> Any:
        if name == "sampler":  # not set yet: unpickling or copying
            raise AttributeError(name)
        return getattr(self.sampler, name)


def leave_out(dataloader: Any, left_out: LeftOut, source: Any, row_of: Callable[[int], int] = int) -> bool:
    """Let a dataloader leave out rows of the training set ``source``. Returns whether it can.

    It can where its data set is ``source``, another view of the same ``datasets.Dataset``, or a ``Subset`` of it, and
    where a sampler chooses the rows. A second call for the same sampler changes nothing.

    Args:
        row_of: the row that an index of ``source`` stands for, where it gives its rows several times over.
    """
    found = rows_by_index(getattr(dataloader, "dataset", None), source, row_of)
    holder = holder_of_sampler(dataloader)
    if found is None or holder is None:
        return False
    if not isinstance(holder.sampler, LeavingOut):
        holder.sampler = LeavingOut(holder.sampler, left_out, found)
    return True


def rows_by_index(dataset: Any, source: Any, row_of: Callable[[int], int] = int) -> Callable[[int], int] | None:
    """The row of ``source`` that an index of ``dataset`` stands for; ``None`` where that cannot be known.

    A data set whose attribute ``rows`` is the source is taken to give its row i at index i.

    >>> from torch.utils.data import Subset
    >>> rows = ["a", "b", "c"]
    >>> rows_by_index(Subset(rows, [2, 0]), rows)(0)
    2
    """
    if is_same(dataset, source) or (source is not None and getattr(dataset, "rows", None) is source):
        return row_of
    indices, inner = getattr(dataset, "indices", None), getattr(dataset, "dataset", None)
    if indices is None or inner is None:
        return None
    outer = rows_by_index(inner, source, row_of)
    return None if outer is None else lambda index: outer(int(indices[index]))


def is_same(dataset: Any, source: Any) -> bool:
    """Whether two data sets have the same rows in the same order: one object, or two views of one ``Dataset``."""
    if dataset is source:
        return dataset is not None
    tables = [getattr(getattr(each, "data", None), "table", None) for each in (dataset, source)]
    indices = [getattr(each, "_indices", None) for each in (dataset, source)]
    return tables[0] is not None and tables[0] is tables[1] and indices == [None, None]


def holder_of_sampler(dataloader: Any) -> Any:
    """The batch sampler that holds the sampler of single rows, below what accelerate puts round it; or ``None``."""
    holder = getattr(dataloader, "batch_sampler", None)
    while (inner := getattr(holder, "batch_sampler", None)) is not None:
        holder = inner
    return holder if hasattr(holder, "sampler") and hasattr(holder, "batch_size") else None
