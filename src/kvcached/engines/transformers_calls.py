"""``LayerCalls``: what a layer writes and attends, checked for one layer and done for all."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvcached.kernels import attn_with_kvcache, bind, reshape_and_cache

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvcached.engines.transformers_batch import PackedBatch
    from kvcached.kernels import BoundCall

MOST_KEPT = 16
"""Kinds of layers remembered, the last ones: each has memory of its own for parts of sequences."""
_ROUND = 15
"""The bits of an address that kernels are compiled for."""


class LayerCache:
    """The keys and values of one layer in the pages, ``[num_blocks, block_size, Hkv, D]`` each."""

    __slots__ = ("addresses", "keys", "round", "values")

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values
        self.addresses = keys.data_ptr(), values.data_ptr()
        self.round = tuple(address & _ROUND for address in self.addresses)


@dataclass(frozen=True, slots=True)
class _Kind:
    """The two calls of layers that differ in addresses only.

    ``direct``: they take the tensors of a layer as those lie, and so need no more than addresses.
    """

    append: BoundCall
    attention: BoundCall
    shape: tuple[int, ...]
    direct: bool


class LayerCalls:
    """Calls of our kernels by what they are known by: layers of a model differ in addresses only.

    To check a call takes the host many times longer than to make it, and a prompt has a shape that
    may never come again: so it is checked for the first layer of its kind, of which most models
    have one or two. Used by passes of one stream, and only by one if its sequences have unlike
    numbers of query tokens.
    """

    def __init__(self) -> None:
        self._kinds: dict[Hashable, _Kind] = {}

    def run(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: LayerCache,
        batch: PackedBatch, sinks: torch.Tensor | None, features: Mapping[str, Any],
    ) -> torch.Tensor:  # fmt: skip
        """Write ``key`` and ``value`` to the slots of ``batch`` and attend over its block tables.

        ``query [B, Hq, Q, D]``, the others ``[B, Hkv, Q, D]`` and of the same dtype and device as
        ``cache``; ``features`` are arguments of ``attn_with_kvcache``. Returns ``[B, Q, Hq, Dv]``,
        rows of padding are zero.
        """
        q, k, v = query.data_ptr(), key.data_ptr(), value.data_ptr()
        sink = 0 if sinks is None else sinks.data_ptr()
        name = (
            *features.values(), sinks is None, sink & _ROUND, cache.round, batch.block_table.shape,
            query.shape, query.stride(), query.dtype, query.get_device(), q & _ROUND,
            key.shape, key.stride(), k & _ROUND, value.shape, value.stride(), v & _ROUND,
        )  # fmt: skip
        kind = self._kinds.get(name)
        if kind is None:
            kind = self._learn(name, query, key, value, cache, batch, sinks, features)
        if not kind.direct:
            return _packed(kind, query, key, value, cache, batch, sinks)
        out = query.new_empty(kind.shape)
        keys, values = cache.addresses
        kind.append.at([k, v, batch.slot_mapping.data_ptr(), keys, values])
        given = [q, out.data_ptr(), batch.cache_seqlens.data_ptr(), batch.block_table.data_ptr(),
                 keys, values]  # fmt: skip
        if sinks is not None:
            given.append(sink)
        kind.attention.at(given)
        return out

    def _learn(
        self, name: Hashable, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        cache: LayerCache, batch: PackedBatch, sinks: torch.Tensor | None,
        features: Mapping[str, Any],
    ) -> _Kind:  # fmt: skip
        """Check both calls; raises what the functions do."""
        if len(self._kinds) >= MOST_KEPT:
            del self._kinds[next(iter(self._kinds))]
        q, k, v = (_pack(x, batch.rows) for x in (query, key, value))
        append = bind(reshape_and_cache, **_appended(k, v, cache, batch)).release()
        out = q.new_empty(*q.shape[:2], v.shape[2])
        attention = bind(
            attn_with_kvcache, **_attended(q, out, cache, batch, sinks),
            cu_seqlens_q=batch.cu_seqlens_q, max_seqlen_q=batch.max_seqlen_q, **features,
        ).release()  # fmt: skip
        size, heads, length, _ = query.shape
        lie = all(x.data_ptr() == y.data_ptr() for x, y in ((q, query), (k, key), (v, value)))
        direct = batch.rows is None and lie and append.takes_addresses
        kind = _Kind(append, attention, (size, length, heads, v.shape[2]), direct)
        self._kinds[name] = kind
        return kind


def _packed(
    kind: _Kind, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: LayerCache,
    batch: PackedBatch, sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Both calls with the tokens picked out of a padded batch, or packed in other ways."""
    q, k, v = (_pack(x, batch.rows) for x in (query, key, value))
    kind.append(*_appended(k, v, cache, batch).values())
    out = q.new_empty(*q.shape[:2], v.shape[2])
    kind.attention(*_attended(q, out, cache, batch, sinks).values())
    if batch.rows is not None:
        size, _, length, _ = query.shape
        padded = out.new_zeros(size * length, *out.shape[1:])
        padded[batch.rows] = out
        out = padded
    return out.view(kind.shape)


def _appended(
    key: torch.Tensor, value: torch.Tensor, cache: LayerCache, batch: PackedBatch
) -> dict[str, torch.Tensor]:
    """What a bound ``reshape_and_cache`` takes, in its order."""
    return {"key": key, "value": value, "slot_mapping": batch.slot_mapping,
            "k_cache": cache.keys, "v_cache": cache.values}  # fmt: skip


def _attended(
    query: torch.Tensor, out: torch.Tensor, cache: LayerCache, batch: PackedBatch,
    sinks: torch.Tensor | None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """What a bound ``attn_with_kvcache`` takes, in its order."""
    given = {
        "q": query, "out": out, "cache_seqlens": batch.cache_seqlens,
        "page_table": batch.block_table, "k_cache": cache.keys, "v_cache": cache.values,
    }  # fmt: skip
    return given if sinks is None else given | {"sinks": sinks}


def _pack(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """``[B, H, Q, D]`` to ``[T, H, D]``."""
    flat = x.detach().transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])
    return flat if rows is None else flat[rows]
