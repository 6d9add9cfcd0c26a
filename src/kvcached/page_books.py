"""``PageBooks``: which pages are backed, by which extent, and which are free. No backend here.

Growth may be in a journal first (``bump.py``); what is asked here comes after what is in that:
``extents``, ``runs``, ``backed_pages`` and ``epoch`` have it written up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvcached.memory.mappings import joined
from kvcached.runs import Extent, FreeRuns, Run


def _nothing() -> object:
    """Where there is no journal."""


class PageBooks:
    """What ``PagePool`` knows. Callers hold the owner's lock."""

    def __init__(self, num_pages: int) -> None:
        self._num_pages = num_pages
        self.settle: Callable[[], object] = _nothing
        """Write up what a journal has; ``close_journal`` also frees what it has set aside."""
        self.close_journal: Callable[[], object] = _nothing
        self.prepare: Callable[[], object] = _nothing
        """Plan for growth, while nobody waits for that."""
        self._extents: dict[int, Extent] = {}
        self.in_transit: dict[int, Extent] = {}  # addresses taken, but not (any more) in use
        self._runs = FreeRuns(num_pages)
        self._backed_pages = self._epoch = 0
        self._free_ids: list[int] = []
        self._next_id = 1

    @property
    def extents(self) -> dict[int, Extent]:
        """What is backed, by id; not to be changed by others."""
        self.settle()
        return self._extents

    @property
    def runs(self) -> FreeRuns:
        """What is free to be backed."""
        self.close_journal()
        return self._runs

    @property
    def backed_pages(self) -> int:
        """Pages of all extents, of one plane."""
        self.settle()
        return self._backed_pages

    @property
    def epoch(self) -> int:
        """Changes whenever what is backed, or free to be backed, changes."""
        self.settle()
        return self._epoch

    def new_id(self) -> int:
        """An id for an extent to be."""
        if self._free_ids:
            return self._free_ids.pop()
        self._next_id += 1
        return self._next_id - 1

    def admit(self, extents: Sequence[Extent]) -> None:
        """Count extents whose pages have been backed in."""
        for extent in extents:
            del self.in_transit[extent.id]
            self._extents[extent.id] = extent
            self._backed_pages += extent.pages
        self._epoch += 1

    def new_ids(self, count: int) -> list[int]:
        """As ``new_id``, so many."""
        free, first = self._free_ids, self._next_id
        ids = [free.pop() for _ in range(min(count, len(free)))]
        self._next_id += count - len(ids)
        return [*ids, *range(first, self._next_id)]

    def drop_ids(self, ids: Sequence[int]) -> None:
        """Ids that came to nothing."""
        self._free_ids += ids

    def unstage(self, extents: Sequence[Extent]) -> None:
        """Give the addresses of staged or withdrawn extents, which are not backed, back."""
        self._epoch += 1
        for extent in reversed(extents):
            del self.in_transit[extent.id]
            self._free_ids.append(extent.id)
        for first, count in joined([(extent.first, extent.pages) for extent in extents]):
            self.runs.give(first, count)

    def withdraw(self, extent: Extent) -> None:
        """Take an extent out of what is backed; its bytes count until it is unstaged."""
        del self._extents[extent.id]
        self.in_transit[extent.id] = extent
        self._backed_pages -= extent.pages
        self._epoch += 1

    def forget(self, extent: Extent, keep: Sequence[Run]) -> None:
        """Strike an extent that was split; the pages that are not kept are free."""
        del self._extents[extent.id]
        self._free_ids.append(extent.id)
        self._backed_pages -= extent.pages
        start = extent.first
        for first, count in (*keep, (extent.first + extent.pages, 0)):
            if first > start:
                self.runs.give(start, first - start)
            start = first + count

    def check_books(self) -> None:
        """Each page is in one extent, backed or in transit, or free; each id once (I1)."""
        self.runs.check()
        backed = [(e.first, e.pages) for e in self.extents.values()]
        transit = [(e.first, e.pages) for e in self.in_transit.values()]
        end = 0
        for first, count in sorted([*backed, *transit, *self.runs]):
            assert first == end, "I1: a page is both free and backed, or neither"
            end = first + count
        assert end == self._num_pages, "I1: pages lost"
        assert self.backed_pages == sum(count for _, count in backed), "I1: backed pages miscounted"
        ids = [*self.extents, *self.in_transit, *self._free_ids]
        assert len(ids) == len(set(ids)), "PageBooks: extent id used twice"
        assert len(ids) == self._next_id - 1, "PageBooks: extent id lost"

    def forget_all(self) -> None:
        """Nothing is backed any more."""
        self._extents.clear()
        self.in_transit.clear()
        self._free_ids = list(range(1, self._next_id))
        self._runs = FreeRuns(self._num_pages)
        self._backed_pages = 0
        self._epoch += 1
