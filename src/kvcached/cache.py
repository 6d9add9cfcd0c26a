"""``KVCache``: what an engine of your own holds. Sequences, block tables, slots and tensor views.

Memory, budget and life cycle are those of ``ElasticBlocks`` (``elastic.py``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence as ListLike
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcached.arguments import check_arguments, check_terms
from kvcached.broker.budget import Budget
from kvcached.config import Config, parse_size
from kvcached.elastic import ElasticBlocks
from kvcached.errors import InvalidInput
from kvcached.layout import CacheSpec, Geometry, cdiv
from kvcached.memory.base import Fence, MemoryBackend
from kvcached.prefix import PrefixIndex, contents_key
from kvcached.resources import make_backend, make_budget
from kvcached.sequence import Sequence, read_tokens, token_array
from kvcached.sequences import SequenceStore

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["CacheSpec", "KVCache", "Sequence"]


class KVCache(ElasticBlocks):
    """An elastic KV cache for one model on one device.

    Construction reserves addresses and backs one block, nothing else.

    Parameters
    ----------
    spec:
        What a block holds.
    device:
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or a GPU's UUID (``"GPU-..."``).
    name:
        How other processes see this tenant; default ``pid-<pid>``.
    max_tokens:
        Address space, in tokens. Costs nothing until used; may exceed the device's memory.
    limit:
        Most physical memory (``"256MiB"``, ``"40%"`` of the budget, bytes); default: the budget.
    floor, weight:
        Memory that is never reclaimed for others, and the share of what lies above all floors. They
        mean something between processes only: a ``budget`` that is given has its own.
    prefix_caching:
        Keep freed blocks whose tokens are known until their memory is needed.
    model:
        What the model is called, with its revision: part of each prefix's key, as ``spec`` is.
    budget, backend:
        Use these instead of the broker and the device's own backend. The caller closes a backend
        that it gives; a budget belongs to one cache and is closed with it.
    config:
        Settings; default: the environment.

    Raises
    ------
    InvalidInput, BackendUnavailable, BudgetExceeded, OutOfPages, BrokerUnavailable, NameTaken
    """

    def __init__(
        self,
        spec: CacheSpec,
        *,
        device: str = "cpu",
        name: str | None = None,
        max_tokens: int = 1 << 20,
        limit: int | str | None = None,
        floor: int | str = 0,
        weight: float = 1.0,
        prefix_caching: bool = True,
        model: str = "",
        budget: Budget | None = None,
        backend: MemoryBackend | None = None,
        config: Config | None = None,
    ) -> None:
        check_arguments(
            spec, device, name, max_tokens, budget=budget, backend=backend, config=config
        )
        check_terms(limit, floor, weight, budget_given=budget is not None)
        settings = config if config is not None else Config.from_env()
        self.spec, self.prefix_caching = spec, prefix_caching
        self._contents = contents_key(spec, model)
        self._views: Any = None
        terms = {"limit": limit, "floor": floor, "weight": weight}
        called = name if name is not None else f"pid-{os.getpid()}"
        owns_backend = backend is None
        memory = make_backend(device, spec, settings) if backend is None else backend
        try:
            super().__init__(
                Geometry.of(spec, page_bytes=memory.page_bytes,
                            num_blocks=cdiv(max_tokens, spec.block_size) + 1),  # the null block
                backend=memory,
                budget=_budget_of(called, memory, settings, budget, terms),
                name=called, config=settings, owns_backend=owns_backend,
            )  # fmt: skip
        except BaseException:  # whatever went wrong, what we made does not stay behind
            if owns_backend:
                memory.shutdown()
            raise

    def _prepare(self) -> None:
        size = self.spec.block_size
        self._prefixes = PrefixIndex(self._blocks, size)
        named = self._prefixes if self.prefix_caching else None
        self._store = SequenceStore(self._blocks, named, size, self._contents)

    # --- sequences -----------------------------------------------------------------------------

    def new_sequence(self, token_ids: Any = (), *, salt: str = "") -> Sequence:
        """Begin a sequence; what is cached of the prefix ``token_ids`` is shared, not recomputed.

        ``num_cached_tokens`` tokens then have slots already (whole blocks, never the last token);
        pass the others to ``extend``. ``salt`` separates prefixes that must not be shared.
        """
        tokens = token_array(token_ids)
        with self._entered():
            return self._store.new(tokens, salt)

    def extend(self, sequence: Sequence, tokens: Any) -> NDArray[np.int32]:
        """Give the next tokens slots: int32 ``[n]``; backs what is missing. All or nothing.

        ``tokens`` is a count, or the token ids, which is what makes full blocks matchable by
        later sequences: at once, so run the forward pass that fills these slots before, or in the
        same batch as, one that reads them. A last block shared with a fork is copied first.

        Raises ``BudgetExceeded`` or ``OutOfPages`` (both ``MemoryError``).
        """
        count, known = read_tokens(tokens)
        with self._entered():
            return self._store.extend(sequence, count, known)

    def fork(self, sequence: Sequence) -> Sequence:
        """A second sequence with the same tokens; blocks are shared until one of them writes."""
        with self._entered():
            return self._store.fork(sequence)

    def free(
        self, sequence: Sequence, *, fence: Fence | None = None, discard: bool = False
    ) -> None:
        """End a sequence. Blocks that nothing else holds become cached prefixes, or free.

        ``fence``: kernels may read the blocks until it has passed. ``discard``: the slots of the
        newest ``extend`` were never filled (the forward pass failed), so do not cache them.
        """
        if fence is not None and not callable(getattr(fence, "passed", None)):
            raise InvalidInput(f"{fence!r} is not a fence", hint="A fence has a method passed().")
        with self._entered():
            self._store.free(sequence, fence, discard=discard)
        self._caretaker.wake()

    # --- what kernels read -----------------------------------------------------------------------

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, ``[num_blocks, block_size, num_kv_heads, head_dim]`` each.

        Strided views over the whole address space, made without a copy. Touch only blocks in use:
        the rest may have no memory behind it (a fault). Invalid after ``close``.
        """
        known = isinstance(index, int) and not isinstance(index, bool)
        if not known or not 0 <= index < self.spec.num_layers:
            raise InvalidInput(f"layer {index!r} does not exist: the cache has "
                               f"{self.spec.num_layers}")  # fmt: skip
        with self._entered():
            if self._views is None:
                from kvcached.memory.views import layer_views  # torch, only when tensors are wanted

                base = self._blocks.pages.address_of(0)
                self._views = [layer_views(self.spec, self.geometry, base, self.backend.device, i)
                               for i in range(self.spec.num_layers)]  # fmt: skip
            views: tuple[Tensor, Tensor] = self._views[index]
            return views

    def block_tables(self, sequences: ListLike[Sequence]) -> NDArray[np.int32]:
        """Block tables int32 ``[len(sequences), most blocks]``, padded with the null block (0)."""
        if isinstance(sequences, Sequence):
            raise InvalidInput("block_tables takes a list of sequences", hint="Use [sequence].")
        with self._lock:
            self._require_open()
            for sequence in sequences:
                self._store.require(sequence)
            width = max((s.num_blocks for s in sequences), default=0)
            tables = np.zeros((len(sequences), max(1, width)), np.int32)
            for row, sequence in zip(tables, sequences, strict=True):
                row[: sequence.num_blocks] = sequence.table
            return tables

    @property
    def num_free_tokens_hint(self) -> int:
        """Tokens that could be taken without reclaim from others: a hint, others may be faster."""
        return self.num_free_blocks_hint * self.spec.block_size

    # --- what the parent asks --------------------------------------------------------------------

    def _num_sequences(self) -> int:
        return len(self._store)

    def _check_contents(self) -> None:
        self._prefixes.check()
        self._store.check()

    def close(self) -> None:
        """See ``ElasticBlocks.close``; the views go too."""
        self._views = None
        super().close()

    def __repr__(self) -> str:
        from kvcached.display import line

        return line(self)

    def _repr_html_(self) -> str:
        from kvcached.display import page_map_html

        return page_map_html(self)


def _budget_of(
    name: str, backend: MemoryBackend, config: Config, given: Budget | None, terms: dict[str, Any]
) -> Budget:
    """The budget that was given, with the limit that was asked for; or the device's own."""
    if given is None:
        return make_budget(name, backend, config, **terms)
    try:
        if terms["limit"] is not None:
            given.set_limit(parse_size(terms["limit"], total=given.limit_bytes))
    except BaseException:  # it belongs to the cache that was to be
        given.close()
        raise
    return given
