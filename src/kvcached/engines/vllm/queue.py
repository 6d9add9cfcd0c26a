"""``ElasticQueue``: takes the place of the free-block queue in vLLM's own ``BlockPool``.

vLLM keeps blocks, reference counts and hashes; this queue says which blocks there are. Blocks that
carry a hash are cached: they go last, and with ``_maybe_evict_cached_block`` when they do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from kvcached.engines.vllm.tenant import EngineBlocks


class ElasticQueue:
    """The methods of vLLM's ``FreeKVCacheBlockQueue`` over the blocks of ``tenant``.

    ``blocks`` are all of vLLM's, by id. Block 0 is the null block, the first that ``popleft``
    returns.
    """

    def __init__(self, blocks: list[Any], tenant: EngineBlocks) -> None:
        self.blocks, self.tenant = blocks, tenant
        self._null_given = False
        self._idle_count: int | None = None

    def bind(self, pool: Any) -> None:
        """``pool`` is the ``BlockPool`` that this queue is part of."""
        blocks = self.blocks

        def evict(ids: Any) -> None:
            for block in ids.tolist():
                pool._maybe_evict_cached_block(blocks[block])  # noqa: SLF001 - vLLM's own way

        self.tenant.on_evict(evict)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that could be had; what is certain is asked for by ``EngineBlocks.secure``."""
        return self.tenant.num_available if self._idle_count is None else self._idle_count

    def popleft(self) -> Any:
        """One block."""
        if not self._null_given:
            self._null_given = True
            return self.blocks[0]
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[Any]:
        """``n`` blocks; raises ``MemoryError`` if they were not secured and cannot be had."""
        if n == 0:
            return []
        blocks = self.blocks
        return [blocks[block] for block in self.tenant.take(n).tolist()]

    def remove(self, block: Any) -> None:
        """A cached block is in use again."""
        self.tenant.acquire(np.array([block.block_id], np.int32))

    def append(self, block: Any) -> None:
        """As ``append_n``, for one."""
        self.append_n([block])

    def append_n(self, blocks: Iterable[Any]) -> None:
        """Blocks without references, those to go first, first."""
        listed = list(blocks)
        if listed:
            ids = np.fromiter((block.block_id for block in listed), np.int32, len(listed))
            named = np.fromiter((block.block_hash is not None for block in listed), np.bool_,
                                len(listed))  # fmt: skip
            self.tenant.give(ids, named)

    def prepend_n(self, blocks: Iterable[Any]) -> None:
        """As ``append_n``: which block is used next is the pool's choice."""
        self.append_n(blocks)

    def get_all_free_blocks(self) -> list[Any]:
        """The blocks that are free or cached now."""
        return [self.blocks[block] for block in self.tenant.listed()]

    @contextmanager
    def as_if_all_were_free(self) -> Iterator[None]:
        """Inside, the count is what ``BlockPool.reset_prefix_cache`` expects of an idle engine."""
        self._idle_count = len(self.blocks) - 1 - self.tenant.num_used
        try:
            yield
        finally:
            self._idle_count = None
