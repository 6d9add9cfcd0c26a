"""``Sequence``: the tokens of one request and the blocks that hold them. Plain state, no policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvcached.errors import InvalidInput

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NO_TOKENS = np.empty(0, np.int64)
_NO_TOKENS.flags.writeable = False


def token_array(tokens: Any) -> NDArray[np.int64]:
    """Token ids as a contiguous int64 ``[n]``, or ``InvalidInput``."""
    if isinstance(tokens, (str, bytes)):
        raise InvalidInput("token ids must be integers, not text: tokenize first")
    try:
        array = np.asarray(tokens)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, tensors on a device
        raise InvalidInput(
            f"token ids cannot be read as a flat list of integers: {error}"
        ) from error
    if array.size == 0:
        return _NO_TOKENS
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InvalidInput(
            f"token ids must be a flat list of integers, not {array.ndim}-d {array.dtype}"
        )
    return np.ascontiguousarray(array, np.int64)


def read_tokens(tokens: Any) -> tuple[int, NDArray[np.int64] | None]:
    """A count, or token ids, as ``(count, ids)``; ids is ``None`` if only a count was given."""
    if isinstance(tokens, (int, np.integer)) and not isinstance(tokens, (bool, np.bool_)):
        if tokens < 0:
            raise InvalidInput(f"a sequence cannot be extended by {tokens} tokens")
        return int(tokens), None
    known = token_array(tokens)
    return len(known), known


class Sequence:
    """One sequence of a ``KVCache``; made by ``new_sequence`` and ``fork``, ended by ``free``.

    Attributes
    ----------
    num_tokens:
        Tokens that have slots.
    num_cached_tokens:
        How many of them came from a cached prefix.
    """

    __slots__ = ("_known", "_table", "_tokens", "alive", "keys", "num_blocks",
                 "num_cached_tokens", "num_tokens", "published", "root")  # fmt: skip

    def __init__(self, tokens: NDArray[np.int64], root: bytes) -> None:
        self.num_tokens = self.num_cached_tokens = self.num_blocks = 0
        self.alive = True
        self.root = root
        self.keys: list[bytes] = []  # of the leading full blocks whose tokens are known
        self.published: list[int] = []  # blocks that the newest extend named
        self._tokens, self._known = tokens.copy(), len(tokens)
        self._table = np.zeros(8, np.int32)

    def __repr__(self) -> str:
        return (f"Sequence(num_tokens={self.num_tokens}, num_cached_tokens="
                f"{self.num_cached_tokens}, blocks={self.num_blocks})")  # fmt: skip

    @property
    def block_ids(self) -> tuple[int, ...]:
        """The block table: ids in token order."""
        return tuple(self._table[: self.num_blocks].tolist())

    @property
    def table(self) -> NDArray[np.int32]:
        """The block table, int32 ``[num_blocks]``; a view that the next extend may outdate."""
        return self._table[: self.num_blocks]

    @property
    def known_tokens(self) -> NDArray[np.int64]:
        """Leading token ids that are known, int64; those from ``num_tokens`` on are to come."""
        return self._tokens[: self._known]

    def learn(self, first: int, tokens: NDArray[np.int64]) -> None:
        """Token ids from position ``first`` on. Ids after a gap are of no use and are dropped."""
        end = first + len(tokens)
        if first > self._known or np.array_equal(self.known_tokens[first:end], tokens):
            return
        self._known = first + len(tokens)
        if self._known > len(self._tokens):
            grown = np.empty(max(self._known, 2 * len(self._tokens)), np.int64)
            grown[:first] = self._tokens[:first]
            self._tokens = grown
        self._tokens[first : self._known] = tokens

    def append_blocks(self, ids: NDArray[np.int32]) -> None:
        """Add blocks at the end of the table."""
        need = self.num_blocks + len(ids)
        if need > len(self._table):
            table = np.zeros(max(need, 2 * len(self._table)), np.int32)
            table[: self.num_blocks] = self.table
            self._table = table
        self._table[self.num_blocks : need] = ids
        self.num_blocks = need

    def copy(self) -> Sequence:
        """The same tokens and blocks in a table of its own."""
        other = Sequence(self.known_tokens, self.root)
        other.num_tokens, other.num_cached_tokens = self.num_tokens, self.num_tokens
        other.keys = self.keys.copy()
        other.append_blocks(self.table)
        return other
