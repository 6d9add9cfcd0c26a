"""How large the KV cache of a vLLM worker is: address space first, and what may be backed of it.

vLLM sizes its cache by the memory that is free, once, and insists that nobody else takes or gives
any meanwhile. Here it is told the size of the address space instead, so it neither measures nor
demands; how much may be backed is the budget's matter (``Facts.limit_bytes``).
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from kvcached.config import engine_config, format_size
from kvcached.engines.vllm import allocation, layouts
from kvcached.engines.vllm.region import Facts
from kvcached.errors import EngineUnsupported
from kvcached.hostinfo import total_bytes
from kvcached.layout import cdiv

_log = logging.getLogger("vllm.kvcached")
_TOKEN = 1 << 20
"""What vLLM is told to take for its cache while it starts: next to nothing."""
_ADDRESSES = 2
"""Address space, at most, in multiples of the device's memory: room for all that can be backed."""
_MOST_BLOCKS = 1 << 18
"""vLLM keeps an object a block; beyond this many, only as much as the device can hold."""
_EXECUTORS = {"mp", "uni"}


@dataclass
class Plan:
    """What was decided for the worker of this process."""

    vllm_config: Any
    user_bytes: int | None
    """``--kv-cache-memory-bytes``, which here is the most that may be backed."""
    strict: bool
    profiling: bool = False
    """vLLM is trying the model out; caches that it makes now are its own."""
    facts: Facts | None = None
    layer_bytes: int = 0
    """Bytes of a block in one layer."""
    by_layer: bool = False
    """Whether each layer has a place of its own: see ``layouts.cuts_by_layer``."""

    @property
    def staged(self) -> bool:
        """Whether other workers have other layers, perhaps more of them or fewer."""
        return int(self.vllm_config.parallel_config.pipeline_parallel_size) > 1


_plan: Plan | None = None
_wrapped = False


def plan() -> Plan | None:
    """The plan of this process's worker; ``None``: it stays as it is."""
    return _plan


def prepare(vllm_config: Any, kind: str, *, strict: bool) -> None:
    """Before a worker is made: decide whether it becomes elastic, and say so to vLLM.

    ``kind`` is ``Survey.allocation``. Raises ``EngineUnsupported`` if ``strict``.
    """
    global _plan
    _plan = None
    why = unsupported_config(vllm_config)
    if why:
        _refuse(why, strict=strict)
        return
    _wrap(kind)
    cache = vllm_config.cache_config
    _plan = Plan(vllm_config, cache.kv_cache_memory_bytes, strict)
    cache.kv_cache_memory_bytes = _TOKEN


def unsupported_config(vllm_config: Any) -> str:
    """Which choice of the user is in the way; empty if none."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    executor = parallel.distributed_executor_backend
    cache_dtype = str(getattr(cache, "cache_dtype", ""))
    reasons = {
        f"workers started by {executor!r}": executor not in _EXECUTORS,
        "more than one machine": getattr(parallel, "nnodes", 1) > 1,
        # A replica with nothing to do computes along, over block tables that name blocks which may
        # be gone. Replicas of other models are engines of their own, and told that they are one.
        "data parallelism of experts": getattr(parallel, "data_parallel_size", 1) > 1,
        "decode context parallelism": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "a KV connector": vllm_config.kv_transfer_config is not None,
        "KV offloading": bool(getattr(cache, "kv_offloading_size", None)),
        "encoder-decoder models": bool(vllm_config.model_config.is_encoder_decoder),
        "sleep mode with an fp8 cache": cache_dtype.startswith("fp8")
        and bool(getattr(vllm_config.model_config, "enable_sleep_mode", False)),
        "scales per token and head": cache_dtype.endswith("per_token_head"),  # filled in all blocks
        "a watermark": bool(getattr(vllm_config.scheduler_config, "watermark", 0)),
    }
    return ", ".join(reason for reason, holds in reasons.items() if holds)


def unsupported_specs(specs: dict[str, Any]) -> str:
    """Which layers of a model are in the way; empty if none. ``specs``: by layer, vLLM's own."""
    if not specs:
        return "a model without KV cache"
    kinds = {type(spec).__name__ for spec in specs.values() if not hasattr(spec, "num_kv_heads")}
    if kinds:
        return f"layers of the kind {', '.join(sorted(kinds))}"
    sizes = {spec.page_size_bytes for spec in specs.values()}
    return (
        f"layers with blocks of different sizes ({sorted(sizes)} bytes)" if len(sizes) > 1 else ""
    )


def address_bytes(vllm_config: Any, specs: dict[str, Any], device_bytes: int, tokens: int) -> int:
    """Bytes of address space: for ``tokens``, or 0: for all that could ever be in use.

    At least one request of full length, whose last block may be full in part, and the null block;
    otherwise no more than what could be backed of it, twice. And as much as the device can hold,
    even if fewer requests are allowed, since the rest can be cached prefixes.
    """
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    token_bytes = sum(cdiv(s.page_size_bytes, s.block_size) for s in specs.values())
    block_bytes = sum(s.page_size_bytes for s in specs.values())
    least = (model.max_model_len + 2 * max(s.block_size for s in specs.values())) * token_bytes
    if tokens:
        return int(max(least, tokens * token_bytes))
    wanted = model.max_model_len * scheduler.max_num_seqs * token_bytes
    many = _MOST_BLOCKS * block_bytes
    room = min(_ADDRESSES * device_bytes, max(device_bytes, many))
    return int(max(least, min(wanted, room), min(device_bytes, many)))


# --- what is replaced in a worker ----------------------------------------------------------------


def _wrap(kind: str) -> None:
    """Replace the seams of this process's workers; once."""
    global _wrapped
    if _wrapped:
        return
    _wrapped = True
    gpu = import_module("vllm.v1.worker.gpu_worker")
    _wrap_request(gpu)
    _wrap_determine(gpu.Worker, kind)
    _wrap_sleep(gpu.Worker)
    platform = import_module("vllm.platforms").current_platform
    if platform.is_cpu():
        _wrap_determine(import_module("vllm.v1.worker.cpu_worker").CPUWorker, kind)
    if kind == "layout":
        layouts.wrap(_stays_as_it_lies)
    allocation.install(kind, plan)


def _wrap_request(gpu: Any) -> None:
    request = gpu.request_memory

    @functools.wraps(request)
    def elastic_request(snapshot: Any, *args: Any, **more: Any) -> int:
        try:
            return int(request(snapshot, *args, **more))
        except ValueError as error:
            if _plan is None:
                raise
            _log.info("neighbours hold memory of this device, which is no reason not to start: %s",
                      error)  # fmt: skip
            return int(snapshot.free_memory)

    gpu.request_memory = elastic_request


def _wrap_determine(worker: Any, kind: str) -> None:
    determine = worker.determine_available_memory

    @functools.wraps(determine)
    def elastic_determine(self: Any) -> int:
        plan = _plan
        if plan is None:
            return int(determine(self))
        specs = self.get_kv_cache_spec()
        why = _agreed(unsupported_specs(specs), self.rank, plan)
        if why:
            _give_up(plan, why)
            return int(determine(self))
        plan.by_layer = layouts.cuts_by_layer(kind, plan.vllm_config)
        plan.profiling = True
        try:
            determine(self)
        finally:
            plan.profiling = False
        return _decide(self, plan, specs)

    worker.determine_available_memory = elastic_determine


def _agreed(why: str, rank: int, plan: Plan) -> str:
    """What is in the way in any pipeline stage, since all share one scheduler: elastic or not.

    Called by all workers at once.
    """
    if not plan.staged:
        return why
    world = import_module("vllm.distributed.parallel_state").get_world_group()
    found = [world.broadcast_object(why if source == rank else None, src=source)
             for source in range(plan.vllm_config.parallel_config.world_size)]  # fmt: skip
    return ", ".join(sorted({reason for reason in found if reason}))


def _stays_as_it_lies(worker: Any) -> bool:
    """Whether vLLM's own choice of a layout is left alone, in all workers alike."""
    if _plan is None:
        return True
    specs = worker.get_kv_cache_spec()
    refused = unsupported_specs(specs)
    why = _agreed(refused or layouts.why_kept(specs, worker.vllm_config), worker.rank, _plan)
    if why and not refused:  # that is said when it is refused
        _log.info("memory comes and goes by vLLM's own KV cache layout: %s", why)
    return bool(why)


def _wrap_sleep(worker: Any) -> None:
    """What sleep gives may go to a neighbour at once, and vLLM insists that memory got free."""
    sleep = worker.sleep

    @functools.wraps(sleep)
    def elastic_sleep(self: Any, *args: Any, **more: Any) -> Any:
        try:
            return sleep(self, *args, **more)
        except AssertionError as error:
            if _plan is None or "after sleeping" not in str(error):
                raise
            _log.info("a neighbour took memory while this engine fell asleep")

    worker.sleep = elastic_sleep


def _decide(worker: Any, plan: Plan, specs: dict[str, Any]) -> int:
    """The bytes of address space; also notes what the scheduler must know."""
    config = plan.vllm_config
    device_bytes, limit = _device_bytes(worker, plan)
    nbytes = address_bytes(config, specs, device_bytes, engine_config().max_tokens)
    served = getattr(config.model_config, "served_model_name", None) or config.model_config.model
    plan.layer_bytes = int(next(iter(specs.values())).page_size_bytes)
    plan.facts = Facts(
        rank=worker.rank,
        world_size=config.parallel_config.world_size,
        model=str(served[0] if isinstance(served, list) else served),
        engine=f"vLLM {import_module('vllm').__version__}",
        limit_bytes=limit,
        request_bytes=address_bytes(config, specs, 0, 1),
        runs_on=config.speculative_config is not None
        or getattr(config.model_config, "runner_type", "") == "pooling",
        replica=getattr(config.parallel_config, "data_parallel_index", 0),
    )
    _log.info("%s of addresses for the KV cache", format_size(nbytes))
    return nbytes


def _device_bytes(worker: Any, plan: Plan) -> tuple[int, int]:
    """The device's memory, and the most that vLLM's own settings allow the cache; 0: no rule.

    ``gpu_memory_utilization`` keeps its meaning: weights, activations and cache together stay
    below that share of the device.
    """
    cache = plan.vllm_config.cache_config
    if worker.device.type == "cpu":
        return total_bytes(), plan.user_bytes or 0
    torch = import_module("torch")
    _, total = torch.cuda.mem_get_info(worker.device)
    share = int(total * cache.gpu_memory_utilization) - torch.cuda.memory_reserved(worker.device)
    return total, plan.user_bytes or max(_TOKEN, share)


def _give_up(plan: Plan, why: str) -> None:
    """Back to what vLLM does by itself, with the user's own size."""
    global _plan
    _plan = None
    plan.vllm_config.cache_config.kv_cache_memory_bytes = plan.user_bytes
    _refuse(why, strict=plan.strict)


def _refuse(why: str, *, strict: bool) -> None:
    if strict:
        raise EngineUnsupported(
            f"this vLLM cannot be made elastic: {why}", hint="Unset KVCACHED=strict to run without."
        )
    _log.warning("not elastic: %s is not supported; vLLM runs as it always does", why)
