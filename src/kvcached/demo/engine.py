"""A plain continuous-batching loop over a transformers model, with our cache and attention.

Each step extends the running requests by one token, admits waiting ones as long as memory and the
batch allow, and runs all of them in one packed forward pass; greedy. Out of memory preempts the
youngest request, which is computed again later (vLLM's "recompute").

A step ends when its tokens are on the host. On a GPU that read comes after all kernels of the step
on the one stream, so between two steps none runs: blocks are freed without a fence, and memory may
be unmapped or moved. During a step a peer's reclaim takes only memory that no block in use needs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvcached.config import format_size
from kvcached.errors import InvalidInput
from kvcached.layout import cdiv

if TYPE_CHECKING:
    import numpy as np

    from kvcached.cache import KVCache

RETRY_SECONDS = 0.05
"""After a refusal, when to try again to admit; asking takes a round trip to the broker."""


@dataclass(slots=True)
class Task:
    """One request on its way: ``tokens`` is the prompt and what was generated so far."""

    id: int
    tokens: list[int]
    max_new_tokens: int
    prompt_length: int = field(init=False)
    sequence: Any = None
    preemptions: int = 0
    queued: bool = False

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    @property
    def generated(self) -> list[int]:
        """The tokens generated so far."""
        return self.tokens[self.prompt_length :]


@dataclass(frozen=True, slots=True)
class _Work:
    """Part of a step: the tokens of one task that are computed now, and their slots."""

    task: Task
    tokens: list[int]
    slots: np.ndarray


def shared_page(block_bytes: int, page_bytes: int) -> int:
    """Bytes of a page that a block may share with others, as on a GPU; 0 if it has its own."""
    return page_bytes if block_bytes % page_bytes else 0


class Engine:
    """Continuous batching over one model and one ``KVCache``.

    Parameters
    ----------
    model:
        A causal language model loaded with ``attn_implementation="kvcached"``.
    cache:
        Stays the caller's.
    max_batch:
        Most requests that run at once.
    step_tokens:
        No further request is admitted to a step that computes this many, so that steps stay short.
    on_first, on_done:
        Called with a task when it has its first token, and when it is finished.
    """

    def __init__(
        self, model: Any, cache: KVCache, *, max_batch: int = 16, step_tokens: int = 128,
        on_first: Callable[[Task], None] | None = None,
        on_done: Callable[[Task], None] | None = None,
    ) -> None:  # fmt: skip
        from kvcached.engines.transformers import PackedCache

        self.model, self.cache = model, cache
        self.max_batch, self.step_tokens = max_batch, step_tokens
        self.waiting: deque[Task] = deque()
        self.running: list[Task] = []
        self._retry_at = 0.0
        self._paged = PackedCache(model.config, cache)
        self._on_first = on_first or (lambda _: None)
        self._on_done = on_done or (lambda _: None)
        stop = model.generation_config.eos_token_id
        self._stop = set(stop if isinstance(stop, list) else [stop])

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.waiting or self.running)

    def submit(self, task: Task) -> None:
        """Queue a request. Raises ``InvalidInput`` if it could never fit."""
        spec, most = self.cache.spec, self.cache.stats().limit_bytes
        blocks = cdiv(len(task.tokens) + task.max_new_tokens, spec.block_size) + 1
        needed = blocks * spec.block_bytes + 2 * shared_page(
            spec.block_bytes, self.cache.backend.page_bytes
        )
        if needed > most:
            raise InvalidInput(
                f"a request of {len(task.tokens)} + {task.max_new_tokens} tokens needs "
                f"{format_size(needed)}, but the engine may hold {format_size(most)}",
                hint="Give the demo a larger --budget.",
            )
        self.waiting.append(task)

    def step(self) -> bool:
        """Compute one token for everything that can run; whether anything did."""
        with self.cache.idle():  # no kernel runs: extents may be split for a peer that asks
            work = self._schedule()
        if work:
            for item, token in zip(work, self._forward(work), strict=True):
                self._advance(item.task, token)
        return bool(work)

    def _schedule(self) -> list[_Work]:
        """What this step computes, with its slots.

        Running ones first: what is admitted in this step is never preempted in it, so no block
        becomes matchable as a prefix before its keys and values are computed.
        """
        self.obey_limit()
        running = len(self.running)
        work = self._extend_running()
        if len(work) == running:  # none was preempted, so there may be room for more
            work += self._admit(self.step_tokens - len(work))
        return work

    def obey_limit(self) -> None:
        """Give back until what is backed fits the limit; preempts if it must."""
        while (over := self._bytes_over_limit()) > 0:
            self.cache.evict_prefixes(over)
            if self._bytes_over_limit() > 0:
                self.cache.trim()  # splits extents too; no pass is running
            if self._bytes_over_limit() <= 0 or not self.running:
                return
            self._preempt(self.running[-1])

    def _bytes_over_limit(self) -> int:
        stats = self.cache.stats()
        over: int = stats.backed_bytes - stats.limit_bytes
        return over

    def _extend_running(self) -> list[_Work]:
        work: list[_Work] = []
        for task in list(self.running):
            while task.sequence is not None:
                try:
                    slots = self.cache.extend(task.sequence, task.tokens[-1:])
                except MemoryError:
                    # the youngest has not been extended in this step yet: the loop goes by age
                    self._preempt(self.running[-1])
                    continue
                work.append(_Work(task, task.tokens[-1:], slots))
                break
        return work

    def _preempt(self, task: Task) -> None:
        """Free a running task's blocks; it waits at the head of the queue to be recomputed."""
        self.running.remove(task)
        self.cache.free(task.sequence)
        task.sequence = None
        task.preemptions += 1
        self.waiting.appendleft(task)

    def _admit(self, tokens_left: int) -> list[_Work]:
        work: list[_Work] = []
        if time.monotonic() < self._retry_at:
            return work
        while self.waiting and len(self.running) < self.max_batch and tokens_left > 0:
            task = self.waiting[0]
            sequence = self.cache.new_sequence(task.tokens)
            tokens = task.tokens[sequence.num_cached_tokens :]
            try:
                slots = self.cache.extend(sequence, tokens)
            except MemoryError:
                self.cache.free(sequence)
                task.queued = True
                self._retry_at = time.monotonic() + RETRY_SECONDS
                break
            task.sequence = sequence
            self.running.append(self.waiting.popleft())
            work.append(_Work(task, tokens, slots))
            tokens_left -= len(tokens)
        return work

    def _forward(self, work: list[_Work]) -> list[int]:
        """One packed pass; the likeliest next token of each."""
        import torch

        from kvcached.engines.transformers import PackedBatch, cache_argument

        ids = [token for item in work for token in item.tokens]
        positions: list[int] = []
        last: list[int] = []
        for item in work:
            end = item.task.sequence.num_tokens
            positions += range(end - len(item.tokens), end)
            last.append(len(positions) - 1)
        pairs = [(item.task.sequence, item.slots) for item in work]
        self._paged.batch = PackedBatch.of(self.cache, pairs)
        place = self.cache.backend.device
        # These copies wait for the device, which has nothing to do: the last step is over.
        inputs = torch.tensor([[ids], [positions]], device=place)
        with torch.inference_mode():
            logits = self.model(
                input_ids=inputs[0], position_ids=inputs[1], use_cache=True,
                logits_to_keep=torch.tensor(last, device=place),
                **{cache_argument(self.model): self._paged},
            ).logits  # fmt: skip
        # Waits for all kernels of the step; whoever frees or moves blocks later relies on it.
        tokens: list[int] = logits[0].argmax(-1).tolist()
        return tokens

    def _advance(self, task: Task, token: int) -> None:
        task.tokens.append(token)
        count = len(task.tokens) - task.prompt_length
        if count == 1:
            self._on_first(task)
        if count >= task.max_new_tokens or token in self._stop:
            self._retry_at = 0.0  # memory comes free
            self.running.remove(task)
            self.cache.free(task.sequence)
            task.sequence = None
            self._on_done(task)

    def abort(self) -> None:
        """Forget all requests and free their blocks."""
        for task in self.running:
            self.cache.free(task.sequence)
        self.running.clear()
        self.waiting.clear()

    def check(self) -> None:
        """A task runs if and only if it has a sequence that holds all but its last token."""
        for task in self.waiting:
            assert task.sequence is None, f"request {task.id} waits, but has a sequence"
        for task in self.running:
            held = task.sequence.num_tokens
            assert held == len(task.tokens) - 1, f"request {task.id} holds {held} tokens"
