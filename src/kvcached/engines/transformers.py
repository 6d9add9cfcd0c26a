"""Hugging Face transformers on elastic pages.

The three-line use::

    from kvcached.engines.transformers import ElasticCache
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="kvcached")
    model.generate(**batch, past_key_values=ElasticCache(model.config))

Importing this module registers the attention function (``transformers_pages.py`` says how the
parts meet). ``PackedCache`` and ``PackedBatch`` are for an engine of one's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from kvcached.engines.transformers_batch import PackedBatch
from kvcached.engines.transformers_calls import LayerCalls
from kvcached.engines.transformers_pages import (
    NAME,
    PackedCache,
    PagedCache,
    cache_argument,
)
from kvcached.errors import ClosedError, EngineUnsupported, InvalidInput

if TYPE_CHECKING:
    from kvcached.cache import KVCache

__all__ = ["NAME", "ElasticCache", "PackedBatch", "PackedCache", "cache_argument"]


class ElasticCache(PagedCache):
    """A transformers ``Cache`` in elastic pages: grows by the block, shares the device's budget.

    Works with ``generate`` (greedy, sampling, beam search; padding takes no slot), batch of any
    size. Call ``reset`` between unrelated calls of ``generate``, ``close`` at the end (or use it
    as a context manager).

    Parameters
    ----------
    config:
        The model's configuration (``model.config``).
    cache:
        A ``KVCache`` to use, which stays the caller's. By default one is made when the first
        tokens come, for their dtype and device, and closed by ``close``.
    max_tokens, limit, device, dtype:
        Of the ``KVCache`` that is made: address space in tokens, most bytes (``None``: what the
        budget allows), and where and as what to keep the tokens (``None``: as the model does; the
        kernels read no other).

    On a GPU, calls that free or fork rows wait for the current stream, so that no kernel still
    writes what is given away. Nothing waits inside of a forward pass but for the attention mask,
    which is read once.

    Raises ``EngineUnsupported`` for models whose layers keep something other than keys and values.
    """

    def __init__(
        self, config: Any, *, cache: KVCache | None = None, max_tokens: int = 1 << 20,
        limit: int | str | None = None, device: str | None = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(config)
        self._owned = cache is None
        self._options: dict[str, Any] = {"max_tokens": max_tokens, "limit": limit}
        self._device, self._dtype = device, dtype
        self._sequences: list[Any] = []
        self._shape = (0, 0)
        self._closed = False
        if cache is not None:
            self._bind(cache)

    @property
    def cache(self) -> KVCache | None:
        """The ``KVCache`` behind it; ``None`` before the first token."""
        return self._cache

    def _start(self, key: torch.Tensor, value: torch.Tensor) -> None:
        if self._closed:
            raise ClosedError("the ElasticCache is closed")
        if self._cache is None:
            self._make(key, value)
        self._shape = (key.shape[0], key.shape[2])

    def _make(self, key: torch.Tensor, value: torch.Tensor) -> None:
        from kvcached.cache import KVCache
        from kvcached.layout import CacheSpec

        spec = CacheSpec(
            len(self.layers), key.shape[1], key.shape[3],
            str(self._dtype or key.dtype), head_dim_v=value.shape[3],
        )  # fmt: skip
        place = _place(self._device, key.device)
        self._bind(KVCache(spec, device=place, prefix_caching=False, **self._options))

    def _plan(self, mask: torch.Tensor | None) -> PackedBatch:
        """Extend every row by its new tokens that are no padding."""
        cache, (size, length) = self._cache, self._shape
        assert cache is not None, "made when the pass began"
        if not self._sequences:
            self._sequences = [cache.new_sequence() for _ in range(size)]
        counts, rows = self._new_tokens(mask, size, length)
        self.columns += length
        work = [(s, cache.extend(s, n)) for s, n in zip(self._sequences, counts, strict=True)]
        if rows is None:
            return PackedBatch.behind_pads(cache, work, length)
        return PackedBatch.of(cache, work, rows)

    def _new_tokens(
        self, mask: torch.Tensor | None, size: int, length: int
    ) -> tuple[list[int], np.ndarray | None]:
        """Tokens to add to each row; their places in the padded batch, unless all are row ends."""
        held = [sequence.num_tokens for sequence in self._sequences]
        if size != len(held):
            raise InvalidInput(
                f"the batch has {size} rows, the cache {len(held)}", hint="Call reset() first."
            )
        if mask is None:
            _check_held([self.columns] * size, held)
            return [length] * size, None
        if mask.dim() != 2:
            raise EngineUnsupported("elastic pages take a 2-dimensional attention mask only")
        if mask.shape[1] != self.columns + length:
            raise InvalidInput(
                f"the attention mask is {mask.shape[1]} tokens long, but the cache was given "
                f"{self.columns} and {length} more come",
                hint="Call reset() between unrelated calls; in a conversation pass all tokens.",
            )
        # From a GPU this is the one wait of a pass, as lengths are kept on the host.
        known = mask.cpu().numpy().astype(np.bool_, copy=False)
        _check_held(np.count_nonzero(known[:, : self.columns], axis=1).tolist(), held)
        new = known[:, self.columns :]
        counts = np.count_nonzero(new, axis=1)
        at_ends = (new == (np.arange(length) >= length - counts[:, None])).all()
        return counts.tolist(), None if at_ends else np.flatnonzero(new)

    # --- the batch changes ---

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row ``i`` becomes a copy-on-write fork of row ``beam_idx[i]`` (beam search)."""
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        self._select([i for i in range(len(self._sequences)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``."""
        self._select(torch.arange(len(self._sequences))[indices.cpu()].tolist())

    def _select(self, indices: list[int]) -> None:
        if not self._sequences:
            return
        cache = self._cache
        assert cache is not None, "there are sequences"
        self._wait_for_kernels()
        old, taken = self._sequences, set[int]()
        new = []
        for index in indices:
            new.append(cache.fork(old[index]) if index in taken else old[index])
            taken.add(index)
        for index, sequence in enumerate(old):
            if index not in taken:
                cache.free(sequence)
        self._sequences = new

    def _wait_for_kernels(self) -> None:
        """On a GPU, wait for the passes that are queued: then blocks can be freed and copied."""
        if self._views and (device := self._views[0].keys.device).type == "cuda":
            torch.cuda.current_stream(device).synchronize()

    # --- life ---

    def reset(self) -> None:
        """Forget all tokens; their blocks are free, the cache can be used again."""
        if self._cache is not None:
            self._wait_for_kernels()
            for sequence in self._sequences:
                self._cache.free(sequence)
        self._sequences, self.columns = [], 0
        self._batch = self._pending = None

    def check(self) -> None:
        """No row holds more tokens than columns were seen; and the invariants of the pages."""
        held = [sequence.num_tokens for sequence in self._sequences]
        assert all(0 <= n <= self.columns for n in held), (
            "a row holds more tokens than it was given"
        )
        if self._cache is not None and not self._closed:
            self._cache.check()

    def close(self) -> None:
        """Forget all tokens and close the ``KVCache``, unless it is the caller's. Idempotent."""
        if self._closed:
            return
        self.reset()
        self._closed = True
        self._views = []
        self._calls = self._lasting = LayerCalls()
        if self._owned and self._cache is not None:
            self._cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_held(seen: list[int], held: list[int]) -> None:
    """``seen``: tokens of each row that the mask has where the cache has ``held``."""
    if seen != held:
        raise InvalidInput(
            f"the attention mask differs from the one before: the rows hold {held} tokens",
            hint="Pass the whole mask each time, or call reset() first.",
        )


def _place(wanted: Any, found: torch.device) -> str:
    """The device of a new cache: that of the keys, which ``wanted`` may name but not change."""
    try:
        asked = found if wanted is None else torch.device(wanted)
    except (RuntimeError, TypeError) as error:
        raise InvalidInput(f"{wanted!r} is not a device", hint="Use 'cpu' or 'cuda:0'.") from error
    if asked.type != found.type or asked.index not in {None, found.index}:
        raise InvalidInput(
            f"the cache was asked to lie on {asked}, but the model computes on {found}",
            hint="Leave out device=, or move the model there first.",
        )
    return str(found)
