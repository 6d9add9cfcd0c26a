"""``SequenceStore``: sequences over a block pool; extend, fork, copy on write, publish."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcached.blocks import BlockPool
from kvcached.errors import InvalidInput, KvcachedError, OwnershipError
from kvcached.layout import cdiv
from kvcached.memory.base import Fence
from kvcached.prefix import Key, PrefixIndex, child_key, root_key
from kvcached.sequence import Sequence

if TYPE_CHECKING:
    from numpy.typing import NDArray


class SequenceStore:
    """The live sequences of one cache. Callers hold the cache's lock.

    Parameters
    ----------
    blocks:
        Where blocks come from.
    prefixes:
        Names full blocks; ``None`` turns prefix caching off.
    block_size:
        Tokens per block.
    contents:
        What keys of prefixes begin with (``contents_key``).
    """

    def __init__(
        self, blocks: BlockPool, prefixes: PrefixIndex | None, block_size: int, contents: Key
    ) -> None:
        from kvcached import _scan  # numba is imported at the first hot call

        self._slots: Any = _scan.slots
        self._blocks, self._prefixes, self._block_size = blocks, prefixes, block_size
        self._contents = contents
        self._live: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._live)

    def new(self, tokens: NDArray[np.int64], salt: str) -> Sequence:
        """See ``KVCache.new_sequence``."""
        sequence = Sequence(tokens, root_key(salt, self._contents))
        if self._prefixes is not None and len(tokens):
            ids, sequence.keys = self._prefixes.match(tokens, sequence.root)
            sequence.append_blocks(ids)
            sequence.num_tokens = sequence.num_cached_tokens = len(ids) * self._block_size
        self._live[id(sequence)] = sequence
        return sequence

    def extend(
        self, sequence: Sequence, count: int, known: NDArray[np.int64] | None
    ) -> NDArray[np.int32]:
        """See ``KVCache.extend``."""
        self.require(sequence)
        self._blocks.pages.require_usable()
        first = sequence.num_tokens
        self._back(sequence, first + count)
        if known is not None:
            sequence.learn(first, known)
        sequence.num_tokens = first + count
        if self._prefixes is not None:
            self._publish(sequence, self._prefixes)
        slots = np.empty(count, np.int32)
        self._slots(sequence.table, first, self._block_size, slots)
        return slots

    def fork(self, sequence: Sequence) -> Sequence:
        """See ``KVCache.fork``."""
        self.require(sequence)
        self._blocks.share(sequence.table)
        other = sequence.copy()
        self._live[id(other)] = other
        return other

    def free(self, sequence: Sequence, fence: Fence | None, *, discard: bool) -> None:
        """See ``KVCache.free``. The end of a prefix is evicted before its beginning."""
        self.require(sequence)
        if discard and self._prefixes is not None:
            self._prefixes.withdraw(sequence.published)
        self._blocks.free(np.ascontiguousarray(sequence.table[::-1]), fence)
        del self._live[id(sequence)]
        sequence.alive = False
        sequence.num_blocks = 0

    def require(self, sequence: Sequence) -> None:
        """Raise unless ``sequence`` is alive and of this cache."""
        if not isinstance(sequence, Sequence):
            raise InvalidInput(f"{sequence!r} is not a Sequence of this cache")
        if self._live.get(id(sequence)) is not sequence:
            what = "belongs to another cache" if sequence.alive else "was freed before"
            raise OwnershipError(f"{sequence!r} cannot be used: it {what}")

    def check(self) -> None:
        """Every reference on a block is held by a sequence (I2)."""
        held = np.zeros(self._blocks.geometry.num_blocks, np.int64)
        for sequence in self._live.values():
            np.add.at(held, sequence.table, 1)
            blocks = cdiv(sequence.num_tokens, self._block_size)
            assert sequence.num_blocks == blocks, "Sequence: blocks and tokens disagree"
        assert held[0] == 0, "I2: a sequence holds the null block"
        held[0] = 1
        refs = self._blocks.blk[:, self._blocks.hot.REFS]
        assert (held == refs).all(), "I2: references and holders disagree"

    def _back(self, sequence: Sequence, total: int) -> None:
        """Blocks for ``total`` tokens, the last of which no other sequence holds."""
        missing = cdiv(total, self._block_size) - sequence.num_blocks
        copy = self._writes_shared(sequence, total)
        if missing + copy <= 0:
            return
        held = sequence.num_tokens, sequence.num_blocks
        before = set(self._blocks.pages.extents) if copy else set[int]()
        ids = self._blocks.alloc(missing + copy)  # may let other threads in
        same = sequence.alive and held == (sequence.num_tokens, sequence.num_blocks)
        if not same or self._writes_shared(sequence, total) > copy:
            self._blocks.free(ids)
            raise OwnershipError(
                f"{sequence!r} was changed by another thread while it was extended"
            )
        if copy:
            try:
                self._blocks.copy(int(sequence.table[-1]), int(ids[0]))
            except BaseException:  # blocks and what backs them go back, whatever it was (I6)
                self._blocks.free(ids)
                with suppress(KvcachedError):  # then they stay, as spares
                    self._blocks.drop_spares(keep=before)
                raise
            self._blocks.free(sequence.table[-1:].copy())
            sequence.table[-1] = ids[0]
        sequence.append_blocks(ids[copy:])

    def _writes_shared(self, sequence: Sequence, total: int) -> bool:
        """Whether extending to ``total`` tokens writes into a block that others hold too."""
        partial = sequence.num_tokens % self._block_size and total > sequence.num_tokens
        return bool(partial) and self._blocks.refs(int(sequence.table[-1])) > 1

    def _publish(self, sequence: Sequence, prefixes: PrefixIndex) -> None:
        """Name the full blocks whose tokens are all known."""
        size, keys, tokens = self._block_size, sequence.keys, sequence.known_tokens
        sequence.published = []
        for index in range(len(keys), min(sequence.num_tokens, len(tokens)) // size):
            parent = keys[-1] if keys else sequence.root
            keys.append(child_key(parent, tokens[index * size : (index + 1) * size]))
            block = int(sequence.table[index])
            if prefixes.publish(block, keys[-1]):
                sequence.published.append(block)
