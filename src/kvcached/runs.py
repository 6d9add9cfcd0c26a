"""``Extent``: a run of pages that is backed; ``FreeRuns``: those that are free, found by size.

Boundary tags (Knuth, TAOCP 1, 2.5) over dictionaries give O(1) coalescing; size classes by power
of two with lazily cleaned heaps give the lowest address among the runs of a class. A buddy system
was tried and rejected: it rounds runs to powers of two, so an extent of odd size does not end next
to the following one and the block between them is lost (docs/adr/0003).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcached.memory.base import Handle

Run = tuple[int, int]
"""``(first page, number of pages)``."""


@dataclass(slots=True)
class Extent:
    """A run of pages and its handles, one a plane. ``id`` starts at 1 and is reused."""

    id: int
    first: int
    pages: int
    handles: tuple[Handle, ...] = ()


class FreeRuns:
    """Disjoint, coalesced, half-open runs ``[first, first + count)`` of free indices."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._count_at: dict[int, int] = {}  # first index -> length
        self._first_of_end: dict[int, int] = {}  # end index -> first index
        self._classes: list[list[int]] = [[] for _ in range(max(1, total.bit_length()) + 1)]
        self._filled = 0  # bit i: class i may have a run; most have none, and growth asks often
        self._insert(0, total)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """All runs as ``(first, count)``, in address order."""
        return iter(sorted(self._count_at.items()))

    @property
    def free(self) -> int:
        """Number of free indices."""
        return sum(self._count_at.values())

    def candidates(self, count: int) -> Iterator[tuple[int, int]]:
        """Runs worth trying for ``count`` indices: best fits first, then ever smaller ones.

        The caller must not change the runs while it iterates.
        """
        start = count.bit_length()  # every run of class > start-1 ... fits; class start may
        most = len(self._classes)
        for cls in (*range(start, most), *range(min(start, most) - 1, 0, -1)):
            if self._classes[cls]:  # most are empty
                yield from self._in_class(cls)

    def best(self, count: int) -> tuple[int, int] | None:
        """The first of ``candidates``, if it may hold ``count`` indices: it nearly always does."""
        start = count.bit_length()
        while above := self._filled >> start:
            cls = start + (above & -above).bit_length() - 1
            heap = self._classes[cls]
            while heap:
                first = heap[0]
                found = self._count_at.get(first, 0)
                if found.bit_length() == cls:
                    return first, found
                heapq.heappop(heap)
            self._filled ^= 1 << cls
        return None

    def take(self, first: int, count: int) -> None:
        """Remove ``[first, first + count)``, which lies in the run that starts at or before it."""
        end, found = first + count, self._count_at.get(first, 0)
        if found > count:  # from the start of a run, nearly always: what is left stays in place
            run_end = first + found
            del self._count_at[first]
            left = self._count_at[end] = found - count
            self._first_of_end[run_end] = end
            heap = self._classes[left.bit_length()]
            if heap and heap[0] == first:  # and so the list stays as it was
                heapq.heapreplace(heap, end)
            else:
                self._note(end, left)
            return
        run_first = first if found else self._run_before(first)
        run_end = run_first + self._count_at[run_first]
        assert end <= run_end, "FreeRuns: taking what is not free"
        if first > run_first:
            self._insert(run_first, first - run_first)
        else:
            del self._count_at[run_first]
        if end < run_end:
            self._insert(end, run_end - end)
        else:
            del self._first_of_end[run_end]

    def give(self, first: int, count: int) -> None:
        """Add ``[first, first + count)`` and join it with its neighbours."""
        left = self._first_of_end.get(first)
        if left is not None:
            self._remove(left)
            first, count = left, count + first - left
        right = self._count_at.get(first + count)
        if right is not None:
            self._remove(first + count)
            count += right
        self._insert(first, count)

    def check(self) -> None:
        """Runs are inside the range, disjoint, coalesced and findable."""
        end = -1
        for first, count in self:
            assert count > 0 and first > end, "FreeRuns: overlapping or touching runs"
            end = first + count
            assert end <= self.total, "FreeRuns: run outside the range"
            assert self._first_of_end[end] == first, "FreeRuns: boundary tag lost"
            cls = count.bit_length()
            assert first in self._classes[cls], "FreeRuns: run not findable"
            assert self._filled >> cls & 1, "FreeRuns: a class with a run counts as empty"
        assert len(self._first_of_end) == len(self._count_at), "FreeRuns: stale boundary tag"

    def _run_before(self, index: int) -> int:
        """First index of the run that holds ``index`` (linear: only splits of a run need it)."""
        for first, count in self._count_at.items():
            if first <= index < first + count:
                return first
        raise AssertionError("FreeRuns: taking what is not free")

    def _in_class(self, cls: int) -> Iterator[tuple[int, int]]:
        heap = self._classes[cls]
        while heap and not self._is_live(heap[0], cls):
            heapq.heappop(heap)
        for first in dict.fromkeys(heap):  # the lowest is first; the rest in heap order
            if self._is_live(first, cls):
                yield first, self._count_at[first]

    def _is_live(self, first: int, cls: int) -> bool:
        return self._count_at.get(first, 0).bit_length() == cls

    def _insert(self, first: int, count: int) -> None:
        if count:
            self._count_at[first] = count
            self._first_of_end[first + count] = first
            self._note(first, count)

    def _note(self, first: int, count: int) -> None:
        """List a run by its size; what else its class lists may not be there any more."""
        cls = count.bit_length()
        heap = self._classes[cls]
        if len(heap) > 64 + 2 * len(self._count_at):  # stale entries must not pile up
            heap[:] = sorted({f for f in heap if self._is_live(f, cls)})
        heapq.heappush(heap, first)
        self._filled |= 1 << cls

    def _remove(self, first: int) -> None:
        del self._first_of_end[first + self._count_at.pop(first)]
