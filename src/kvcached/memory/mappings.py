"""What a backend has reserved, created and mapped where.

Every mistake that the contract in ``memory/base.py`` names is found here, in plain Python, before
the operating system or the driver is asked: so a mistake changes nothing, on any backend.

Three steps make a change: ``*_plan`` validates and changes nothing, the backend then does the real
work, and ``add_*``/``drop_*`` records it. The backend's lock is held around the plain-Python steps.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

from kvcached.errors import InvalidInput
from kvcached.memory.base import Handle, Made, Mapped, Place, Reservation

MAKING = object()
"""What the backend calls a handle while it is being made."""
_new_tuple = tuple.__new__  # a NamedTuple's own takes twice as long


class Spans:
    """Disjoint half-open spans ``[start, end)`` of page indices, sorted."""

    __slots__ = ("ends", "starts")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []

    def __len__(self) -> int:
        return len(self.starts)

    def is_free(self, start: int, end: int) -> bool:
        """Whether no span overlaps ``[start, end)``."""
        starts = self.starts
        i = bisect_right(starts, start)
        if i and self.ends[i - 1] > start:
            return False
        return i == len(starts) or starts[i] >= end

    def add(self, start: int, end: int) -> None:
        """Add ``[start, end)``, which is free."""
        i = bisect_left(self.starts, start)
        self.starts.insert(i, start)
        self.ends.insert(i, end)

    def remove(self, start: int) -> None:
        """Remove the span that begins at ``start``."""
        i = bisect_left(self.starts, start)
        del self.starts[i], self.ends[i]

    def check(self) -> None:
        """Assert that the spans are sorted, not empty and disjoint."""
        for i, (start, end) in enumerate(zip(self.starts, self.ends, strict=True)):
            assert 0 <= start < end, "I5: an empty span"
            assert i == 0 or self.ends[i - 1] <= start, "I5: two spans overlap"


def joined(places: Sequence[Place]) -> list[Place]:
    """The same pages in as few places as possible, in address order."""
    runs: list[Place] = []
    for first, count in sorted(places):
        if runs and sum(runs[-1]) == first:
            runs[-1] = (runs[-1][0], runs[-1][1] + count)
        else:
            runs.append((first, count))
    return runs


class RangeState:
    """One open reservation: its mappings by first page index."""

    __slots__ = ("handles", "num_pages", "reservation", "spans")

    def __init__(self, reservation: Reservation, num_pages: int) -> None:
        self.reservation = reservation
        self.num_pages = num_pages
        self.handles: dict[int, HandleState] = {}
        self.spans = Spans()

    def is_free(self, page_index: int, num_pages: int) -> bool:
        """Whether these pages exist, and nothing is mapped there."""
        end = page_index + num_pages
        return page_index >= 0 and end <= self.num_pages and self.spans.is_free(page_index, end)


class HandleState:
    """One live handle, the number of places where it is mapped, and what the backend calls it."""

    __slots__ = ("handle", "mapped", "native")

    def __init__(self, handle: Handle, native: Any = None, mapped: int = 0) -> None:
        self.handle = handle
        self.mapped = mapped
        self.native = native


def _cannot_map(rng: RangeState, page_index: int, num_pages: int) -> InvalidInput:
    end, address = page_index + num_pages, rng.reservation.address
    what = f"cannot map pages {page_index}..{end - 1} of the reservation at {address:#x}"
    if page_index < 0 or end > rng.num_pages:
        return InvalidInput(f"{what}: it has pages 0..{rng.num_pages - 1}")
    return InvalidInput(f"{what}: some of them are mapped already", hint="Unmap them first.")


def _still_mapped(handle: Handle, times: int) -> InvalidInput:
    return InvalidInput(
        f"cannot release handle {handle.key}: it is still mapped {times} times",
        hint="Unmap it everywhere first.",
    )


class Mappings:
    """The books of one backend: reservations, handles, and which handle is mapped where."""

    def __init__(self, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.ranges: dict[int, RangeState] = {}
        self.handles: dict[int, HandleState] = {}
        self.handle_bytes = 0
        self._last_key = 0

    # --- validation: raise InvalidInput, change nothing ---------------------------------------

    def reserve_plan(self, nbytes: int) -> None:
        """Check the size of a reservation."""
        if isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes <= 0:
            raise InvalidInput(f"cannot reserve {nbytes!r} bytes: the size must be an int > 0")
        if nbytes % self.page_bytes:
            raise InvalidInput(
                f"cannot reserve {nbytes} bytes: not a multiple of the page of {self.page_bytes}",
                hint="Round the size up to whole pages.",
            )

    def create_plan(self, num_pages: int) -> None:
        """Check the size of a handle."""
        if type(num_pages) is not int or num_pages <= 0:
            raise InvalidInput(f"cannot create {num_pages!r} pages: the count must be an int > 0")

    def map_plan(
        self, reservation: Reservation, page_index: int, handle: Handle
    ) -> tuple[RangeState, HandleState]:
        """Check that ``handle`` can be mapped at ``page_index``."""
        rng, state = self._range(reservation), self._handle(handle)
        if not rng.is_free(page_index, handle.num_pages):
            raise _cannot_map(rng, page_index, handle.num_pages)
        return rng, state

    def unback_plan(
        self, reservation: Reservation, mapped: Sequence[Mapped]
    ) -> tuple[RangeState, list[HandleState]]:
        """Check that these handles are mapped there, each once, and nowhere else."""
        rng, alive, states = self._range(reservation), self.handles, []
        for page_index, handle in mapped:
            state = rng.handles.get(page_index)
            if state is None or alive.get(handle.key) is not state or state.handle != handle:
                self.unmap_plan(reservation, page_index, handle)  # which says what is wrong
            elif state.mapped > 1:
                raise _still_mapped(handle, state.mapped)
            else:
                states.append(state)
        if len(states) > 1 and len({page_index for page_index, _ in mapped}) < len(states):
            raise InvalidInput("cannot release a handle twice: it is listed twice")
        return rng, states

    def unmap_plan(
        self, reservation: Reservation, page_index: int, handle: Handle
    ) -> tuple[RangeState, HandleState]:
        """Check that exactly ``handle`` is mapped at exactly ``page_index``."""
        rng, state = self._range(reservation), self._handle(handle)
        if rng.handles.get(page_index) is not state:
            raise InvalidInput(
                f"cannot unmap handle {handle.key} at page {page_index} of the reservation at "
                f"{reservation.address:#x}: it is not mapped there"
            )
        return rng, state

    def release_plan(self, handle: Handle) -> HandleState:
        """Check that ``handle`` is alive and mapped nowhere."""
        state = self._handle(handle)
        if state.mapped:
            raise _still_mapped(handle, state.mapped)
        return state

    def close_plan(self, reservation: Reservation) -> RangeState:
        """Check that ``reservation`` is open and holds no mapping."""
        rng = self._range(reservation)
        if rng.handles:
            raise InvalidInput(
                f"cannot close the reservation at {reservation.address:#x}: "
                f"{len(rng.handles)} handles are still mapped in it",
                hint="Unmap them first.",
            )
        return rng

    def shutdown_plan(self) -> None:
        """Check that nothing is open."""
        if self.handles or self.ranges:
            raise InvalidInput(
                f"cannot shut the backend down: {len(self.handles)} handles "
                f"({self.handle_bytes} bytes) and {len(self.ranges)} reservations are open",
                hint="Release the handles and close the reservations first.",
            )

    def _range(self, reservation: Reservation) -> RangeState:
        rng = self.ranges.get(reservation.address)
        if rng is None or rng.reservation.nbytes != reservation.nbytes:
            raise InvalidInput(
                f"no reservation of {reservation.nbytes} bytes is open at {reservation.address:#x}",
                hint="It was closed before, or belongs to another backend.",
            )
        return rng

    def _handle(self, handle: Handle) -> HandleState:
        state = self.handles.get(handle.key)
        if state is None or state.handle.num_pages != handle.num_pages:
            raise InvalidInput(
                f"handle {handle.key} of {handle.num_pages} pages does not exist",
                hint="It was released before, or belongs to another backend.",
            )
        return state

    # --- records: after the real work succeeded -----------------------------------------------

    def add_range(self, address: int, nbytes: int) -> RangeState:
        """Record a new reservation."""
        assert address not in self.ranges, "I5: an address was reserved twice"
        rng = RangeState(Reservation(address, nbytes), nbytes // self.page_bytes)
        self.keep_range(rng)
        return rng

    def keep_range(self, rng: RangeState) -> None:
        """Put a reservation (back) into the books."""
        self.ranges[rng.reservation.address] = rng

    def drop_range(self, rng: RangeState) -> None:
        """Record that a reservation was closed."""
        del self.ranges[rng.reservation.address]

    def add_handle(self, num_pages: int, native: Any = None) -> HandleState:
        """Record a new handle under a key that is never used again."""
        key = self._last_key = self._last_key + 1
        state = self.handles[key] = HandleState(Handle(key, num_pages), native)
        self.handle_bytes += num_pages * self.page_bytes
        return state

    def drop_handle(self, state: HandleState) -> None:
        """Take a handle out of the books."""
        del self.handles[state.handle.key]
        self.handle_bytes -= state.handle.num_pages * self.page_bytes

    def add_map(self, rng: RangeState, page_index: int, state: HandleState) -> None:
        """Record a mapping."""
        rng.spans.add(page_index, page_index + state.handle.num_pages)
        rng.handles[page_index] = state
        state.mapped += 1

    def add_backed(
        self, reservation: Reservation, places: Sequence[Place]
    ) -> tuple[RangeState, list[Handle], list[HandleState]]:
        """Check and record new handles, mapped at ``places``: before they are, in one step.

        Written out, since this runs at each growth. ``drop_backed`` if it comes to nothing; else
        each state gets its ``native``.
        """
        rng = self.ranges.get(reservation.address)
        if rng is None or rng.reservation is not reservation:
            rng = self._range(reservation)
        handles: list[Handle] = []
        states: list[HandleState] = []
        starts, ends = rng.spans.starts, rng.spans.ends
        for page_index, num_pages in places:
            end, i = page_index + num_pages, bisect_right(starts, page_index)
            inside = type(num_pages) is int and 0 <= page_index < end <= rng.num_pages
            free = (i == 0 or ends[i - 1] <= page_index) and (i == len(starts) or starts[i] >= end)
            if not (inside and free):
                self.drop_backed(rng, places[: len(states)], states)
                self.create_plan(num_pages)
                raise _cannot_map(rng, page_index, num_pages)
            starts.insert(i, page_index)
            ends.insert(i, end)
            self._last_key = key = self._last_key + 1
            handle = _new_tuple(Handle, (key, num_pages))
            state = self.handles[key] = rng.handles[page_index] = HandleState(handle, MAKING, 1)
            self.handle_bytes += num_pages * self.page_bytes
            handles.append(handle)
            states.append(state)
        return rng, handles, states

    def add_made(self, reservation: Reservation, made: Sequence[Made]) -> list[Handle]:
        """Check and record handles that were made and mapped, each where the one before ends."""
        rng, (first, end) = self._range(reservation), (made[0][0], made[0][0])
        for page_index, num_pages, _ in made:
            if page_index != end or num_pages <= 0:
                raise InvalidInput(f"pages {page_index}.. do not begin where page {end} does")
            end += num_pages
        if not rng.is_free(first, end - first):
            raise _cannot_map(rng, first, end - first)
        i, key, handles = bisect_right(rng.spans.starts, first), self._last_key, []
        rng.spans.starts[i:i] = [page_index for page_index, _, _ in made]
        rng.spans.ends[i:i] = [page_index + num_pages for page_index, num_pages, _ in made]
        for page_index, num_pages, native in made:
            key += 1
            handles.append(_new_tuple(Handle, (key, num_pages)))
            self.handles[key] = rng.handles[page_index] = HandleState(handles[-1], native, 1)
        self._last_key = key
        self.handle_bytes += (end - first) * self.page_bytes
        return handles

    def drop_backed(
        self, rng: RangeState, places: Sequence[tuple[int, object]], states: Sequence[HandleState]
    ) -> None:
        """Take handles that are mapped at ``places``, and nowhere else, out of the books."""
        starts, ends = rng.spans.starts, rng.spans.ends
        for (page_index, _), state in zip(places, states):  # noqa: B905 (there may be more states)
            i = bisect_left(starts, page_index)
            del starts[i], ends[i], rng.handles[page_index], self.handles[state.handle.key]
            state.mapped = 0
            self.handle_bytes -= state.handle.num_pages * self.page_bytes

    def drop_map(self, rng: RangeState, page_index: int, state: HandleState) -> None:
        """Record that a mapping is gone."""
        rng.spans.remove(page_index)
        del rng.handles[page_index]
        state.mapped -= 1

    def check(self) -> None:
        """Assert that the books agree with themselves (I4, I5)."""
        pages = sum(state.handle.num_pages for state in self.handles.values())
        assert pages * self.page_bytes == self.handle_bytes, "I4: handle bytes miscounted"
        counts = dict.fromkeys(self.handles, 0)
        for rng in self.ranges.values():
            rng.spans.check()
            assert len(rng.spans) == len(rng.handles), "I5: spans and mappings differ"
            for page_index, state in rng.handles.items():
                assert page_index + state.handle.num_pages <= rng.num_pages, "I5: outside"
                assert state.handle.key in counts, "I4: a released handle is still mapped"
                counts[state.handle.key] += 1
        for key, state in self.handles.items():
            assert counts[key] == state.mapped, "I4: mappings of a handle miscounted"
