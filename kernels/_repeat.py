"""Calls that were checked once and come again with other tensors of the same shapes.

Checking the arguments of an attention call takes the host longer than the launch. A call that is
known by the shapes, strides, types and alignment of its tensors and by its cache is launched
without checking them again. A plan knows a cache by its very tensors; without one each stream knows
caches by address and shape, since callers may make new views for every call.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvcached.kernels._bound import Bound
from kvcached.kernels._launch import stream_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvcached.kernels._bound import Launch
    from kvcached.kernels.checks import AttentionCall

MOST_KNOWN = 1 << 14
"""Calls remembered: layers times batch sizes of a large model. Then all are forgotten."""


def _described(x: Any) -> Any:
    return None if x is None else (x.dtype, x.shape, x.stride(), x.get_device())


def _cache_key(x: torch.Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.dtype, x.shape, x.stride(), x.get_device()


def _key(
    tensors: tuple[Any, ...], options: tuple[Any, ...], addresses: list[int]
) -> tuple[Any, ...]:
    """What a call is known by. Spelled out, since this is most of what a launch costs."""
    q, _, _, table, starts, lens, cu, mask, sinks, slopes, k_scale, v_scale, out = tensors
    place = starts if table is None else table
    if cu is mask is sinks is slopes is k_scale is v_scale is None:
        others = None
    else:
        others = tuple(map(_described, (cu, mask, sinks, slopes, k_scale, v_scale)))
    together = 0
    for address in addresses:
        together |= address
    return (
        options, table is None, starts is None, others,
        # Kernels are compiled for what is a multiple of 16.
        tuple(address & 15 for address in addresses) if together & 15 else None,
        q.dtype, q.shape, q.stride(), q.get_device(),
        place.dtype, place.shape, place.stride(), place.get_device(),
        lens.dtype, lens.shape, lens.stride(), lens.get_device(),
        None if out is None else (out.dtype, out.shape, out.stride(), out.get_device()),
    )  # fmt: skip


def _addresses(tensors: tuple[Any, ...]) -> list[int]:
    """Of the tensors that may be others at each call, in the order of the kernels, but the ends."""
    q, _, _, table, starts, lens, *others, _ = tensors
    found = [q.data_ptr(), (starts if table is None else table).data_ptr(), lens.data_ptr()]
    found += [x.data_ptr() for x in others if x is not None]
    return found


@dataclass(frozen=True, slots=True)
class _Call:
    steps: list[Bound]
    keys: weakref.ref[torch.Tensor]
    values: weakref.ref[torch.Tensor]
    shape: tuple[int, ...]


class Known:
    """The calls that a plan, or a stream without one, has seen, each with its launches.

    ``tensors`` are those of ``attn_with_kvcache``: q, caches of K and V, table, starts, then the
    others in the order of the kernel, and the output; ``options`` is all else that it is given.
    ``rows`` (tokens x heads, at most) have an LSE that nobody reads, and one buffer serves them
    all; without a number each call gets its own, and caches are known by address.
    """

    def __init__(self, rows: int | None, device: torch.device) -> None:
        self._calls: dict[Any, _Call] = {}
        self._seen: set[Any] = set()
        self._device = device
        self._index = device.index
        self._unread = None
        if rows is not None:
            self._unread = torch.empty(rows, dtype=torch.float32, device=device)

    def _key(
        self, tensors: tuple[Any, ...], options: tuple[Any, ...], addresses: list[int]
    ) -> tuple[Any, ...]:
        _, keys, values, *_ = tensors
        if self._unread is None:
            caches = _cache_key(keys), None if values is keys else _cache_key(values)
            return caches, _key(tensors, options, addresses)
        return id(keys), id(values), _key(tensors, options, addresses)

    def clear(self) -> None:
        """Forget all calls."""
        self._calls.clear()
        self._seen.clear()

    def learn(
        self, tensors: tuple[Any, ...], options: tuple[Any, ...], call: AttentionCall,
        steps: Sequence[Launch],
    ) -> None:  # fmt: skip
        """Remember the launches of ``call`` if other tensors may take the place of those given.

        Without a plan, what is seen once may never come again (prompts of just that length), and is
        only remembered the second time.
        """
        given = bindable(call, steps)
        used = (call.table, call.starts, call.lens, call.q_starts, call.masks, call.sinks,
                call.slopes, call.k_scale, call.v_scale)  # fmt: skip
        if given is None or any(a is not b for a, b in zip(used, tensors[3:-1], strict=True)):
            return
        addresses = _addresses(tensors)
        if tensors[-1] is not None:
            addresses.append(call.out.data_ptr())
        key = self._key(tensors, options, addresses)
        if len(self._calls) + len(self._seen) >= MOST_KNOWN:
            self.clear()
        if self._unread is None and key not in self._seen:
            self._seen.add(key)
            return
        self._seen.discard(key)
        self._calls[key] = _Call(
            [Bound(step, given) for step in steps], weakref.ref(tensors[1]),
            weakref.ref(tensors[2]), tuple(call.out.shape),
        )  # fmt: skip

    def launch(
        self, tensors: tuple[Any, ...], options: tuple[Any, ...], *, with_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(out, LSE) of a call that is known, queued on the current stream; else ``None``.

        The LSE is only good if it was asked for.
        """
        out = tensors[-1]
        try:
            addresses = _addresses(tensors)
            if out is not None:
                addresses.append(out.data_ptr())
            found = self._calls.get(self._key(tensors, options, addresses))
        except (AttributeError, TypeError):  # no tensors: the checks know better what to say
            return None
        index = self._index
        if found is None or torch.cuda.current_device() != index:
            return None  # the long way sets the device
        q, keys, values, *_ = tensors
        if self._unread is not None and (found.keys() is not keys or found.values() is not values):
            return None  # another tensor got the id of one that is gone
        if out is None:
            out = torch.empty(found.shape, dtype=q.dtype, device=self._device)
            addresses.append(out.data_ptr())
        lse = self._unread
        if with_lse or lse is None:
            lse = torch.empty(found.shape[:2], dtype=torch.float32, device=self._device)
        addresses.append(lse.data_ptr())
        stream = stream_of(index)
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
    if torch.cuda.is_current_stream_capturing():
        return None
    stream = stream_of(index)
    known = _streams.get((index, stream))
    if known is None:
        known = _streams[index, stream] = Known(None, torch.device("cuda", index))
    return known
