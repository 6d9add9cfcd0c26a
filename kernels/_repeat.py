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

from kvcached.kernels._launch import stream_of

if TYPE_CHECKING:
    from kvcached.kernels._launch import Handle
    from kvcached.kernels.checks import AttentionCall
    from kvcached.kernels.decode import Launch

MOST_KNOWN = 1 << 14
"""Calls remembered: layers times batch sizes of a large model. Then all are forgotten."""


def _described(x: Any) -> Any:
    return None if x is None else (x.dtype, x.shape, x.stride(), x.get_device())


def _cache_key(x: torch.Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.dtype, x.shape, x.stride(), x.get_device()


def _key(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call is known by. Spelled out, since this is most of what a launch costs."""
    q, _, _, table, starts, lens, cu, mask, sinks, slopes, k_scale, v_scale, out = tensors
    place = starts if table is None else table
    if cu is mask is sinks is slopes is k_scale is v_scale is None:
        others = None
    else:
        others = tuple(map(_described, (cu, mask, sinks, slopes, k_scale, v_scale)))
    return (
        options, q.data_ptr() & 15, table is None, starts is None, others,
        q.dtype, q.shape, q.stride(), q.get_device(),
        place.dtype, place.shape, place.stride(), place.get_device(),
        lens.dtype, lens.shape, lens.stride(), lens.get_device(),
        None if out is None
        else (out.data_ptr() & 15, out.dtype, out.shape, out.stride(), out.get_device()),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Call:
    run: Handle
    keys: weakref.ref[torch.Tensor]
    values: weakref.ref[torch.Tensor]
    grid: tuple[int, ...]
    addresses: tuple[int, int]
    work: tuple[int, ...]
    tail: tuple[Any, ...]
    shape: tuple[int, ...]
    kept: Any
    """Owner of the memory at ``work``: the stream's own may be replaced by a larger one."""


class Known:
    """The calls that a plan, or a stream without one, has seen, each with its launch.

    ``tensors`` are those of ``attn_with_kvcache``: q, caches of K and V, table, starts, then the
    others in the order of the kernel, and the output; ``options`` is all else that it is given.
    ``rows`` (tokens x heads, at most) have an LSE that nobody reads, and one buffer serves them
    all; without a number each call gets its own, and caches are known by address.
    """

    def __init__(self, rows: int | None, device: torch.device) -> None:
        self._calls: dict[Any, _Call] = {}
        self._device = device
        self._index = device.index
        self._unread = None
        if rows is not None:
            self._unread = torch.empty(rows, dtype=torch.float32, device=device)

    def _key(self, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Any, ...]:
        _, keys, values, *_ = tensors
        if self._unread is None:
            return _cache_key(keys), _cache_key(values), _key(tensors, options)
        return id(keys), id(values), _key(tensors, options)

    def clear(self) -> None:
        """Forget all calls."""
        self._calls.clear()

    def learn(
        self, tensors: tuple[Any, ...], options: tuple[Any, ...], call: AttentionCall, made: Launch
    ) -> None:
        """Remember the launch of ``call``, unless the checks made other tensors of those given."""
        used = (call.table, call.starts, call.lens, call.q_starts, call.masks, call.sinks,
                call.slopes, call.k_scale, call.v_scale)  # fmt: skip
        if made.handle is None or any(a is not b for a, b in zip(used, tensors[3:-1], strict=True)):
            return
        if len(self._calls) >= MOST_KNOWN:
            self._calls.clear()
        self._calls[self._key(tensors, options)] = _Call(
            made.handle, weakref.ref(tensors[1]), weakref.ref(tensors[2]), made.grid,
            (call.kv.k_ptr, call.kv.v_ptr), made.work.addresses, made.tail,
            tuple(call.out.shape), made.work,
        )  # fmt: skip

    def launch(
        self, tensors: tuple[Any, ...], options: tuple[Any, ...], *, with_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(out, LSE) of a call that is known, queued on the current stream; else ``None``.

        The LSE is only good if it was asked for.
        """
        try:
            found = self._calls.get(self._key(tensors, options))
        except (AttributeError, TypeError):  # no tensors: the checks know better what to say
            return None
        index = self._index
        if found is None or torch.cuda.current_device() != index:
            return None  # the long way sets the device
        q, keys, values, table, starts, lens, cu, mask, sinks, slopes, k_scale, v_scale, out = (
            tensors
        )
        if self._unread is not None and (found.keys() is not keys or found.values() is not values):
            return None  # another tensor got the id of one that is gone
        if out is None:
            out = torch.empty(found.shape, dtype=q.dtype, device=self._device)
        lse = self._unread
        if with_lse or lse is None:
            lse = torch.empty(found.shape[:2], dtype=torch.float32, device=self._device)
        found.run(
            found.grid, stream_of(index), q.data_ptr(), *found.addresses,
            (starts if table is None else table).data_ptr(), lens.data_ptr(),
            0 if cu is None else cu.data_ptr(), 0 if mask is None else mask.data_ptr(),
            0 if sinks is None else sinks.data_ptr(), 0 if slopes is None else slopes.data_ptr(),
            0 if k_scale is None else k_scale.data_ptr(),
            0 if v_scale is None else v_scale.data_ptr(),
            *found.work, out.data_ptr(), lse.data_ptr(), *found.tail,
        )  # fmt: skip
        return out, lse


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
