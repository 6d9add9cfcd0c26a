"""What is replaced where vLLM's scheduler is: the free-block queue, and around each step."""

from __future__ import annotations

import functools
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

from kvcached.config import engine_config
from kvcached.engines.vllm.attach import attach
from kvcached.engines.vllm.queue import ElasticQueue
from kvcached.engines.vllm.tenant import EngineBlocks
from kvcached.layout import cdiv


def install() -> None:
    """Replace; modules of vLLM are imported here."""
    from vllm.v1.core import block_pool, kv_cache_coordinator
    from vllm.v1.core.sched import scheduler

    stock = block_pool.FreeKVCacheBlockQueue

    def make_queue(blocks: list[Any]) -> Any:
        tenant = attach(len(blocks))
        return stock(blocks) if tenant is None else ElasticQueue(blocks, tenant)

    block_pool.FreeKVCacheBlockQueue = make_queue
    _wrap_pool(block_pool.BlockPool)
    _wrap_admission(kv_cache_coordinator.KVCacheCoordinator)
    _wrap_scheduler(scheduler.Scheduler)
    if engine_config().sleep == "keep":
        from vllm.v1.engine import core

        _wrap_sleep(core.EngineCore)


def _wrap_pool(pool: Any) -> None:
    init, reset, usage = pool.__init__, pool.reset_prefix_cache, pool.get_usage

    @functools.wraps(init)
    def elastic_init(self: Any, *args: Any, **more: Any) -> None:
        init(self, *args, **more)
        if isinstance(self.free_block_queue, ElasticQueue):
            self.free_block_queue.bind(self)

    @functools.wraps(reset)
    def elastic_reset(self: Any) -> bool:
        queue = self.free_block_queue
        if not isinstance(queue, ElasticQueue):
            return bool(reset(self))
        if queue.tenant.keeps_prefixes:
            queue.tenant.shed()
            return True
        with queue.tenant.updating(step=False), queue.as_if_all_were_free():
            done = bool(reset(self))
        if done:
            queue.tenant.forget()
        return done

    @functools.wraps(usage)
    def elastic_usage(self: Any) -> float:
        queue = self.free_block_queue
        if not isinstance(queue, ElasticQueue):
            return float(usage(self))
        used = queue.tenant.num_used
        return used / max(1, used + queue.num_free_blocks)

    pool.__init__, pool.reset_prefix_cache, pool.get_usage = (
        elastic_init, elastic_reset, elastic_usage
    )  # fmt: skip


def _wrap_admission(coordinator: Any) -> None:
    """Have ready what vLLM asks for: it counts what a request needs, compares, and takes it.

    What cannot be had is answered with more than there can be: vLLM's own way of saying "not now".
    """
    needed = coordinator.get_num_blocks_to_allocate

    @functools.wraps(needed)
    def elastic_needed(self: Any, *args: Any, **more: Any) -> int:
        count: int = needed(self, *args, **more)
        queue = self.block_pool.free_block_queue
        if not count or type(queue) is not ElasticQueue:
            return count
        tenant, running = queue.tenant, _runs(self, args, more)
        if (tenant.lets_in or running) and tenant.secure(count, running=running):
            return count
        return int(self.block_pool.num_gpu_blocks) + 1

    coordinator.get_num_blocks_to_allocate = elastic_needed


def _runs(coordinator: Any, args: tuple[Any, ...], more: dict[str, Any]) -> bool:
    """Whether the request that is asked for holds blocks already."""
    request = more["request_id"] if "request_id" in more else args[0]
    managers = coordinator.single_type_managers
    return any(manager.req_to_blocks.get(request) for manager in managers)


def _expected(scheduler: Any) -> int:
    """Blocks that this pass may take for waiting requests: an estimate, from above.

    Only where they wait in order: vLLM's other queues are sorted to be looked at.
    """
    try:
        waiting, size = scheduler.waiting, scheduler.block_size
        room = scheduler.max_num_running_reqs - len(scheduler.running)
        most, blocks = scheduler.max_num_scheduled_tokens, 0
        if room <= 0 or not isinstance(waiting, deque):
            return 0
        for request in islice(waiting, room):
            tokens = min(most, request.num_tokens - request.num_computed_tokens)
            blocks, most = blocks + cdiv(tokens, size), most - tokens
            if most <= 0:
                break
    except AttributeError:  # a release without one of these does without: nothing depends on it
        return 0
    return blocks


def _wrap_scheduler(scheduler: Any) -> None:
    schedule, update = scheduler.schedule, scheduler.update_from_output
    finish = scheduler.finish_requests

    @functools.wraps(schedule)
    def elastic_schedule(self: Any, *args: Any, **more: Any) -> Any:
        tenant = tenant_of(self)
        with nullcontext() if tenant is None else tenant.scheduling(_expected(self)):
            return schedule(self, *args, **more)

    @functools.wraps(update)
    def elastic_update(self: Any, *args: Any, **more: Any) -> Any:
        with _updating(self, step=True):
            return update(self, *args, **more)

    @functools.wraps(finish)
    def elastic_finish(self: Any, *args: Any, **more: Any) -> Any:
        with _updating(self, step=False):
            return finish(self, *args, **more)

    shutdown = scheduler.shutdown

    @functools.wraps(shutdown)
    def elastic_shutdown(self: Any, *args: Any, **more: Any) -> Any:
        try:
            return shutdown(self, *args, **more)
        finally:
            tenant = tenant_of(self)
            if tenant is not None:
                tenant.close()

    scheduler.shutdown = elastic_shutdown
    scheduler.schedule, scheduler.update_from_output = elastic_schedule, elastic_update
    scheduler.finish_requests = elastic_finish


def _wrap_sleep(core: Any) -> None:
    """Fall asleep at level 1, to wake with the same weights, without forgetting the prefixes.

    vLLM pauses its scheduler, perhaps waits, and then resets all caches: that reset is told from
    others by coming from ``sleep``.
    """
    sleep, wake, reset = core.sleep, core.wake_up, core._reset_caches  # noqa: SLF001 - the seams

    @functools.wraps(sleep)
    def elastic_sleep(self: Any, level: int = 1, *args: Any, **more: Any) -> Any:
        self.kvcached_keeps = level == 1
        return sleep(self, level, *args, **more)

    @functools.wraps(wake)
    def elastic_wake(self: Any, *args: Any, **more: Any) -> Any:
        self.kvcached_keeps = False
        return wake(self, *args, **more)

    @functools.wraps(reset)
    def elastic_reset(self: Any, *args: Any, **more: Any) -> Any:
        tenant = tenant_of(self.scheduler)
        if tenant is None or not getattr(self, "kvcached_keeps", False):
            return reset(self, *args, **more)
        self.kvcached_keeps, tenant.keeps_prefixes = False, True
        try:
            return reset(self, *args, **more)
        finally:
            tenant.keeps_prefixes = False

    core.sleep, core.wake_up, core._reset_caches = (  # noqa: SLF001
        elastic_sleep, elastic_wake, elastic_reset
    )  # fmt: skip


def tenant_of(scheduler: Any) -> EngineBlocks | None:
    """The elastic blocks of a vLLM scheduler, if it has any."""
    queue = scheduler.kv_cache_manager.block_pool.free_block_queue
    return queue.tenant if isinstance(queue, ElasticQueue) else None


def _updating(scheduler: Any, *, step: bool) -> AbstractContextManager[None]:
    tenant = tenant_of(scheduler)
    return nullcontext() if tenant is None else tenant.updating(step=step)
