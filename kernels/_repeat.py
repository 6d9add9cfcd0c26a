"""Calls that were checked once and come again with other tensors of the same shapes.

Checking the arguments of an attention call takes the host longer than the launch. A call that is
known by the shapes, strides, types and alignment of its tensors and by its cache is launched
without checking them again. A plan knows a cache by its very tensors; without one each stream knows
caches by address and shape, since callers may make new views for every call.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from kvcached.kernels import _launch
from kvcached.kernels._bound import Bound

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvcached.kernels._bound import Launch
    from kvcached.kernels.checks import AttentionCall

T = TypeVar("T")
MOST_KNOWN = 1 << 14
"""Calls remembered: layers times batch sizes of a large model. Then all are forgotten."""


def _described(x: Any) -> Any:
    return None if x is None else (x.dtype, x.shape, x.stride(), x.get_device())


def _cache_key(x: torch.Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.dtype, x.shape, x.stride(), x.get_device()


def _key(
    caches: Any, tensors: tuple[Any, ...], options: tuple[Any, ...]
) -> tuple[tuple[Any, ...], list[int]]:
    """What a call is known by, and the addresses of its tensors, in the order of the kernels.

    Spelled out, since this is most of what a launch costs.
    """
    q, _, _, table, starts, lens, cu, mask, sinks, slopes, k_scale, v_scale, out = tensors
    place = starts if table is None else table
    addresses = [q.data_ptr(), place.data_ptr(), lens.data_ptr()]
    together = addresses[0] | addresses[1] | addresses[2]
    others: Any = None
    if not (cu is mask is sinks is slopes is k_scale is v_scale is None):
        more = cu, mask, sinks, slopes, k_scale, v_scale
        others = tuple(map(_described, more))
        for x in more:
            if x is not None:
                addresses.append(x.data_ptr())
                together |= addresses[-1]
    result: Any = None
    if out is not None:
        address = out.data_ptr()
        addresses.append(address)
        together |= address
        result = out.dtype, out.shape, out.stride(), out.get_device()
    if together & 15:  # kernels are compiled for what is a multiple of 16
        others = others, tuple(address & 15 for address in addresses)
    return (
        caches, options, table is None, starts is None, others, result,
        q.dtype, q.shape, q.stride(), q.get_device(),
        place.dtype, place.shape, place.stride(), place.get_device(),
        lens.dtype, lens.shape, lens.stride(), lens.get_device(),
    ), addresses  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Call:
    steps: list[Bound]
    keys: weakref.ref[torch.Tensor]
    values: weakref.ref[torch.Tensor]
    shape: tuple[int, ...]
    rows: int
    """Tokens x heads."""


class Repeats(Generic[T]):
    """What was prepared for calls, by what they are known by.

    With ``twice`` a call is remembered when it comes the second time: prompts of one length may
    never come again.
    """

    def __init__(self, *, twice: bool) -> None:
        self._kept: dict[Any, T] = {}
        self._seen: set[Any] = set()
        self._twice = twice
        self.get = self._kept.get

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
        self._seen.clear()

    def put(self, key: Any, make: Callable[[], T]) -> None:
        """Remember what ``make`` returns, unless the call has to come once more for that."""
        if len(self._kept) + len(self._seen) >= MOST_KNOWN:
            self.clear()
        if self._twice and key not in self._seen:
            self._seen.add(key)
            return
        self._seen.discard(key)
        self._kept[key] = make()


class Known:
    """The calls that a plan, or a stream without one, has seen, each with its launches.

    ``tensors`` are those of ``attn_with_kvcache``: q, caches of K and V, table, starts, then the
    others in the order of the kernel, and the output; ``options`` is all else that it is given.
    Of ``planned`` calls caches are known by tensor, else by address. All calls with an LSE that
    nobody reads write it to one buffer, which has room for ``rows`` (tokens x heads) at first.
    """

    def __init__(self, rows: int, device: torch.device, *, planned: bool) -> None:
        self._calls = Repeats[_Call](twice=not planned)
        self._planned = planned
        self._device = device
        self._index = device.index
        self._rows = 0
        self._unread: list[torch.Tensor] = []
        self._make_unread(rows)

    def _make_unread(self, rows: int) -> None:
        """Room for the LSE of so many rows. Graphs may still write to what was too small."""
        if rows > self._rows:
            self._rows = rows
            self._unread.append(torch.empty(rows, dtype=torch.float32, device=self._device))

    def _caches(self, keys: Any, values: Any) -> Any:
        """What the caches are known by."""
        if self._planned:
            return id(keys), id(values)
        return _cache_key(keys), None if values is keys else _cache_key(values)

    def clear(self) -> None:
        """Forget all calls."""
        self._calls.clear()

    def learn(
        self, tensors: tuple[Any, ...], options: tuple[Any, ...], call: AttentionCall,
        steps: Sequence[Launch],
    ) -> None:  # fmt: skip
        """Remember the launches of ``call`` if other tensors may take the place of those given."""
        given = bindable(call, steps)
        used = (call.table, call.starts, call.lens, call.q_starts, call.masks, call.sinks,
                call.slopes, call.k_scale, call.v_scale)  # fmt: skip
        if given is None or any(a is not b for a, b in zip(used, tensors[3:-1], strict=True)):
            return
        key, _ = _key(self._caches(tensors[1], tensors[2]), tensors, options)
        self._calls.put(key, lambda: _Call(
            [Bound(step, given) for step in steps], weakref.ref(tensors[1]),
            weakref.ref(tensors[2]), tuple(call.out.shape), call.lse.numel(),
        ))  # fmt: skip

    def launch(
        self, tensors: tuple[Any, ...], options: tuple[Any, ...], *, with_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(out, LSE) of a call that is known, queued on the current stream; else ``None``.

        The LSE is only good if it was asked for.
        """
        keys, values, out = tensors[1], tensors[2], tensors[-1]
        try:
            key, addresses = _key(self._caches(keys, values), tensors, options)
            found = self._calls.get(key)
        except (AttributeError, TypeError):  # no tensors: the checks know better what to say
            return None
        index = self._index
        if found is None or _launch.device_here() != index:
            return None  # the long way sets the device
        if self._planned and (found.keys() is not keys or found.values() is not values):
            return None  # another tensor got the id of one that is gone
        if out is None:
            out = torch.empty(found.shape, dtype=tensors[0].dtype, device=self._device)
            addresses.append(out.data_ptr())
        if with_lse:
            lse = torch.empty(found.shape[:2], dtype=torch.float32, device=self._device)
        else:
            if found.rows > self._rows:
                self._make_unread(2 * found.rows)
            lse = self._unread[-1]
        addresses.append(lse.data_ptr())
        stream = _launch.stream_of(index)
        for step in found.steps:
            step(stream, addresses)
        return out, lse


def bindable(call: AttentionCall, steps: Sequence[Launch]) -> list[torch.Tensor] | None:
    """The tensors of ``call`` that others may replace, as the kernels take them.

    ``None`` if the launches do not take all of them as they are, or one of them as two arguments.
    """
    places = call.starts if call.table is None else call.table
    given = [x for x in (call.q, places, call.lens, call.q_starts, call.masks, call.sinks,
                         call.slopes, call.k_scale, call.v_scale, call.out, call.lse)
             if x is not None]  # fmt: skip
    ids = {id(x) for x in given}
    taken = {id(x) for step in steps for x in step.arguments}
    fits = len(ids) == len(given) and ids <= taken
    return given if fits and all(step.handle is not None for step in steps) else None


_streams: dict[tuple[int, int], Known] = {}


def known_here(index: int) -> Known | None:
    """Calls without a plan on the current stream of device ``index``; ``None`` during a capture.

    Parts of one stream's calls share its workspace; a captured graph must have its own.
    """
    if _launch.capturing():
        return None
    stream = _launch.stream_of(index)
    known = _streams.get((index, stream))
    if known is None:
        known = _streams[index, stream] = Known(0, torch.device("cuda", index), planned=False)
    return known


class KnownAppends:
    """Calls of ``reshape_and_cache``: key, value, slots, caches and scales, as ``tensors``.

    Caches and scales are known by address. Nothing is shared, so one serves all streams.
    """

    def __init__(self) -> None:
        self._calls = Repeats[list[Bound]](twice=True)

    def learn(self, tensors: tuple[Any, ...], kind: str, steps: Sequence[Launch]) -> None:
        """Remember the launches of a call with these tensors."""
        given = tensors[:3]
        if all(step.handle is not None for step in steps) and len(set(map(id, given))) == 3:
            key, _ = _append_key(tensors, kind)
            self._calls.put(key, lambda: [Bound(step, given) for step in steps])

    def launch(self, tensors: tuple[Any, ...], kind: str) -> bool:
        """Queue a call that is known on the current stream; whether it is."""
        try:
            key, addresses = _append_key(tensors, kind)
            steps = self._calls.get(key)
        except (AttributeError, TypeError):  # no tensors: the checks know better what to say
            return False
        index = tensors[3].get_device()
        if steps is None or _launch.device_here() != index:
            return False  # the long way sets the device
        stream = _launch.stream_of(index)
        for step in steps:
            step(stream, addresses)
        return True


def _append_key(
    tensors: tuple[Any, ...], kind: str
) -> tuple[tuple[Any, ...], tuple[int, int, int]]:
    """What a call is known by, and the addresses of the tensors that may be others."""
    key, value, slots, keys, values, k_scale, v_scale = tensors
    a, b, c = addresses = key.data_ptr(), value.data_ptr(), slots.data_ptr()
    scales = None
    if k_scale is not None or v_scale is not None:
        scales = _cache_key(k_scale), _cache_key(v_scale)
    return (
        kind, scales, a & 15, b & 15, c & 15,
        key.dtype, key.shape, key.stride(), key.get_device(),
        value.dtype, value.shape, value.stride(), value.get_device(),
        slots.dtype, slots.shape, slots.stride(), slots.get_device(),
        keys.data_ptr(), keys.dtype, keys.shape, keys.stride(), keys.get_device(),
        values.data_ptr(), values.dtype, values.shape, values.stride(), values.get_device(),
    ), addresses  # fmt: skip
