"""Calls that were checked once and come again with other tensors of the same shapes.

Checking the arguments of an attention call takes the host longer than the launch. With a plan, a
call that is known by the shapes, strides, types and alignment of its tensors, and by the very
tensors of its cache, is launched without checking them again.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton

if TYPE_CHECKING:
    from kvcached.kernels.checks import AttentionCall
    from kvcached.kernels.decode import Launch

MOST_KNOWN = 1 << 14
"""Calls remembered: layers times batch sizes of a large model. Then all are forgotten."""


def _described(x: Any) -> Any:
    return None if x is None else (x.dtype, x.shape, x.stride(), x.get_device())


def _key(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Any, ...]:
    q, keys, values, *others = tensors
    return id(keys), id(values), options, q.data_ptr() & 15, _described(q), *map(_described, others)


@dataclass(frozen=True, slots=True)
class _Call:
    made: Launch
    keys: weakref.ref[torch.Tensor]
    values: weakref.ref[torch.Tensor]
    addresses: tuple[int, int]
    shape: tuple[int, ...]


class Known:
    """The calls that a plan has seen, each with its launch.

    ``tensors`` are those of ``attn_with_kvcache``: q, caches of K and V, table, starts, then the
    others in the order of the kernel, and the output; ``options`` is all else that it is given.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._calls: dict[Any, _Call] = {}
        self._device = device
        self._unread = torch.empty(rows, dtype=torch.float32, device=device)
        self._stream: Any = None

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
        self._stream = triton.runtime.driver.active.get_current_stream
        self._calls[_key(tensors, options)] = _Call(
            made, weakref.ref(tensors[1]), weakref.ref(tensors[2]),
            (call.kv.k_ptr, call.kv.v_ptr), tuple(call.out.shape),
        )  # fmt: skip

    def launch(
        self, tensors: tuple[Any, ...], options: tuple[Any, ...], *, with_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(out, LSE) of a call that is known, queued on the current stream; else ``None``.

        The LSE is only good if it was asked for.
        """
        try:
            found = self._calls.get(_key(tensors, options))
        except (AttributeError, TypeError):  # no tensors: the checks know better what to say
            return None
        if found is None or torch.cuda.current_device() != self._device.index:
            return None  # the long way sets the device
        if found.keys() is not tensors[1] or found.values() is not tensors[2]:
            return None  # another tensor got the id of one that is gone
        q, _, _, table, starts, *others, out = tensors
        if out is None:
            out = torch.empty(found.shape, dtype=q.dtype, device=self._device)
        lse = self._unread
        if with_lse:
            lse = torch.empty(found.shape[:2], dtype=torch.float32, device=self._device)
        addresses = [
            q.data_ptr(),
            *found.addresses,
            (starts if table is None else table).data_ptr(),
        ]
        addresses += [0 if x is None else x.data_ptr() for x in others]
        found.made(addresses, out.data_ptr(), lse.data_ptr(), self._stream(self._device.index))
        return out, lse
