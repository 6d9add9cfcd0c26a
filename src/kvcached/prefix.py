"""``PrefixIndex``: from the tokens of a prefix to the blocks that hold their keys and values.

The key of a full block is a hash of its parent's key and its own tokens, so a key stands for the
whole prefix up to its end (the scheme of vLLM's automatic prefix caching). Keys are 256-bit
BLAKE2b, so that no choice of tokens can make two prefixes collide. The chain begins with what the
contents of a block depend on beside the tokens (model, shape, dtype: ``contents_key``), and with
the ``salt``, which separates tenants who must not learn from each other's cache hits.

The index names blocks; ``BlockPool`` keeps the reference counts and the LRU order. A named block
without references is cached; eviction tells the index through ``on_evict``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import astuple, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcached.blocks import BlockPool
from kvcached.errors import InvalidInput
from kvcached.layout import CacheSpec

if TYPE_CHECKING:
    from kvcached.blocks import Ids

Key = bytes


def contents_key(spec: CacheSpec, model: str = "") -> Key:
    """What the same tokens in blocks of equal contents have in common: the model and the spec."""
    if not isinstance(model, str):
        raise InvalidInput(f"model is {model!r}, but must be a string")
    # a head_dim_v that is left out and one that says the same are one shape
    shape = astuple(replace(spec, head_dim_v=spec.value_dim))
    text = json.dumps([model, *shape])
    return blake2b(text.encode(), digest_size=32, person=b"kvcached-blocks").digest()


def root_key(salt: str = "", contents: Key = b"") -> Key:
    """The key that stands for the empty prefix of blocks with these ``contents``."""
    if not isinstance(salt, str):
        raise InvalidInput(f"salt is {salt!r}, but must be a string")
    return blake2b(
        salt.encode("utf-8", "surrogatepass"), digest_size=32, person=b"kvcached-prefix",
        key=contents,  # apart from the salt, so that no salt can name another model
    ).digest()  # fmt: skip


def child_key(parent: Key, tokens: Any) -> Key:
    """The key of a block: ``tokens`` is int64 ``[block_size]``, contiguous."""
    return blake2b(parent + tokens.tobytes(), digest_size=32).digest()


class PrefixIndex:
    """Full blocks by the hash of the prefix that they end.

    Parameters
    ----------
    blocks:
        The pool whose blocks are named; the index becomes its eviction listener.
    block_size:
        Tokens per block.
    """

    def __init__(self, blocks: BlockPool, block_size: int) -> None:
        self._blocks, self._block_size = blocks, block_size
        self._block_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}
        self.hits = self.queries = 0  # in blocks
        blocks.on_evict = self._forget

    def __len__(self) -> int:
        """Number of blocks that a prefix names."""
        return len(self._block_of)

    def match(self, tokens: Any, parent: Key) -> tuple[Ids, list[Key]]:
        """The longest cached prefix of ``tokens`` (int64 ``[n]``) in whole blocks.

        Returns its blocks, int32 ``[m]``, a reference taken on each (I2), and their keys. At least
        one token is left over: the model needs one to compute the next token's logits.
        """
        ids: list[int] = []
        keys: list[Key] = []
        for start in range(0, len(tokens) - self._block_size, self._block_size):
            self.queries += 1
            parent = child_key(parent, tokens[start : start + self._block_size])
            block = self._block_of.get(parent)
            if block is None:
                break
            ids.append(block)
            keys.append(parent)
        self.hits += len(ids)
        blocks = np.asarray(ids, np.int32)
        self._blocks.acquire(blocks)
        return blocks, keys

    def publish(self, block: int, key: Key) -> bool:
        """Name a block in use; False if another block already has this key."""
        if self._block_of.setdefault(key, block) != block:
            return False
        self._key_of[block] = key
        self._blocks.keep(block, named=True)
        return True

    def withdraw(self, blocks: Iterable[int]) -> None:
        """Take the name from blocks in use: their contents are not what their key says."""
        for block in blocks:
            key = self._key_of.pop(block, None)
            if key is not None:
                del self._block_of[key]
                self._blocks.keep(block, named=False)

    def check(self) -> None:
        """The two maps mirror each other, and named blocks are in use, cached or quarantined."""
        assert {b: k for k, b in self._block_of.items()} == self._key_of, "PrefixIndex: maps differ"
        hot = self._blocks.hot
        for block in self._key_of:
            state = int(self._blocks.blk[block, hot.STATE])
            assert state in {hot.USED, hot.CACHED, hot.QUARANTINED}, (
                "I3: a named block has no memory"
            )
            assert self._blocks.blk[block, hot.KEEP], "PrefixIndex: a named block would be dropped"
        kept = int((self._blocks.blk[:, hot.KEEP] > 0).sum())
        assert kept == len(self._key_of), "PrefixIndex: a block is kept without a name"

    def _forget(self, ids: Ids) -> None:
        for block in ids.tolist():
            del self._block_of[self._key_of.pop(block)]
