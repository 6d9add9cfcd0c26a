"""The KV tensors of a vLLM worker, over reserved addresses in place of allocated memory.

Where the attention kernels take strides, one block holds all layers, so that it can be backed by
itself; else each layer is a plane of its own, and block ``b`` is backed in all planes at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvcached.config import Config, engine_config
from kvcached.engines.vllm.region import Region, publish
from kvcached.errors import EngineUnsupported
from kvcached.layout import Geometry
from kvcached.memory.base import MemoryBackend
from kvcached.memory.views import tensor_from_address
from kvcached.resources import backend_for, begin_budget

if TYPE_CHECKING:
    from kvcached.engines.vllm.sizing import Plan

_PlanOf = Callable[[], "Plan | None"]


def install(kind: str, plan: _PlanOf) -> None:
    """Replace vLLM's allocation, of the kind that ``seams.Survey`` found."""
    if kind == "layout":
        _install_layout(plan)
    else:
        _install_packed(plan)


def _active(plan: _PlanOf) -> Plan | None:
    """The plan, if the cache that is being allocated is the one that it is for."""
    found = plan()
    return found if found is not None and not found.profiling and found.facts else None


# --- from 0.29 on ----------------------------------------------------------------------------


def _install_layout(plan: _PlanOf) -> None:
    utils = import_module("vllm.v1.worker.utils")
    stock = utils.allocate_kv_cache

    @functools.wraps(stock)
    def allocate(config: Any, device: Any, layout: Any, kernel_block_sizes: Any = None) -> Any:
        active = _active(plan)
        if active is None or not config.kv_cache_tensors:
            return stock(config, device, layout, kernel_block_sizes)
        geometry, tensors = place(
            config, lambda block: make_backend(device, _common_bytes(active, block))
        )
        moved = dataclasses.replace(config, kv_cache_tensors=tensors)
        raw = _open(active, *geometry, _warm_blocks(active, config))
        with in_place_of_zeros(raw, tensors[0].size):
            return stock(moved, device, layout, kernel_block_sizes)

    for name in ("vllm.v1.worker.utils", "vllm.v1.worker.gpu_model_runner",
                 "vllm.v1.worker.gpu.attn_utils"):  # fmt: skip
        module = sys.modules.get(name)  # they import it by name: those that come later get ours
        if module is not None and hasattr(module, stock.__name__):
            setattr(module, stock.__name__, allocate)


def place(
    config: Any, backend_for: Callable[[int], MemoryBackend]
) -> tuple[tuple[MemoryBackend, Geometry], list[Any]]:
    """Backend and geometry for vLLM's placement, and that placement with whole pages a plane.

    Raises ``EngineUnsupported`` where blocks are not all of one size.
    """
    tensors, blocks = config.kv_cache_tensors, config.num_blocks
    strides = {tensor.block_stride for tensor in tensors}
    host = any(getattr(tensor, "host_resident", False) for tensor in tensors)
    if len(strides) != 1 or host:
        raise EngineUnsupported(f"KV blocks of different sizes: {sorted(strides)} bytes")
    (block,) = strides
    backend = backend_for(block)
    if any(tensor.block_stride > tensor.layer_stride for tensor in tensors):  # all layers in one
        return (backend, Geometry(block, 1, blocks, backend.page_bytes)), list(tensors)
    plane = block * blocks
    last = max(t.offset + (len(t.layers) - 1) * t.layer_stride for t in tensors) // plane
    geometry = Geometry(block, last + 1, blocks, backend.page_bytes)
    if any(t.offset % plane or (t.layer_stride != plane and len(t.layers) > 1) for t in tensors):
        raise EngineUnsupported("KV layers that do not follow each other")
    moved = [
        dataclasses.replace(tensor, offset=tensor.offset // plane * geometry.plane_bytes,
                            layer_stride=geometry.plane_bytes, size=geometry.reserved_bytes)
        for tensor in tensors
    ]  # fmt: skip
    return (backend, geometry), moved


@contextmanager
def in_place_of_zeros(raw: Any, nbytes: int) -> Iterator[None]:
    """Inside, the first ``torch.zeros`` of ``nbytes`` or more is ``raw``: vLLM's views, over it.

    Raises ``EngineUnsupported`` if nothing asked for it.
    """
    torch, overrides = import_module("torch"), import_module("torch.overrides")
    given: list[Any] = []

    class Zeros(overrides.TorchFunctionMode):  # type: ignore[name-defined]
        def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            whole = func is torch.zeros and isinstance(args[0], int) and args[0] >= nbytes
            if not whole or given:
                return func(*args, **(kwargs or {}))
            given.append(raw[: args[0]])
            return given[0]

    with Zeros():
        yield
    if not given:
        raise EngineUnsupported("this vLLM makes its KV cache by something else than torch.zeros")


# --- to 0.28 ------------------------------------------------------------------------------------


def _install_packed(plan: _PlanOf) -> None:
    runner = import_module("vllm.v1.worker.gpu_model_runner").GPUModelRunner
    attn_utils: Any = import_module("vllm.v1.worker.gpu.attn_utils")
    stock_v1, stock_v2 = runner._allocate_kv_cache_tensors, attn_utils._allocate_kv_cache  # noqa: SLF001

    @functools.wraps(stock_v1)
    def allocate_v1(self: Any, config: Any) -> Any:
        active = _active(plan)
        return stock_v1(self, config) if active is None else _packed(active, config, self.device)

    @functools.wraps(stock_v2)
    def allocate_v2(config: Any, shared_layers: Any, device: Any) -> Any:
        active = _active(plan)
        if active is None:
            return stock_v2(config, shared_layers, device)
        return _packed(active, config, device)

    runner._allocate_kv_cache_tensors = allocate_v1  # noqa: SLF001 - the seam
    attn_utils._allocate_kv_cache = allocate_v2  # noqa: SLF001


def _packed(plan: Plan, config: Any, device: Any) -> dict[str, Any]:
    """The raw tensor of each layer: one for all, which vLLM cuts, or a plane for each."""
    tensors, blocks = config.kv_cache_tensors, config.num_blocks
    pages = {tensor.size // blocks for tensor in tensors}
    if len(pages) != 1 or any(tensor.block_stride for tensor in tensors):
        raise EngineUnsupported(f"KV blocks of different sizes: {sorted(pages)} bytes")
    (page,) = pages
    planes, block = (len(tensors), page) if plan.by_layer else (1, page * len(tensors))
    backend = make_backend(device, _common_bytes(plan, block))
    geometry = Geometry(block, planes, blocks, backend.page_bytes)
    raw = _open(plan, backend, geometry, _warm_blocks(plan, config))
    if not plan.by_layer:
        for index, tensor in enumerate(tensors):  # by these vLLM cuts
            tensor.offset, tensor.block_stride, tensor.size = index * page, block, blocks * block
    step = geometry.plane_bytes if plan.by_layer else 0
    return {name: raw[index * step : index * step + tensor.size]
            for index, tensor in enumerate(tensors) for name in tensor.shared_by}  # fmt: skip


# --- common ----------------------------------------------------------------------------------


def _common_bytes(plan: Plan, block_bytes: int) -> int:
    """What blocks are made of in all stages alike, so that all have pages of one size."""
    return math.gcd(block_bytes, plan.layer_bytes) if plan.staged else block_bytes


def make_backend(device: Any, block_bytes: int) -> MemoryBackend:
    """Physical memory of a torch device."""
    name = str(device.type)
    if name != "cpu":
        torch = import_module("torch")
        name += f":{torch.cuda.current_device() if device.index is None else device.index}"
    return backend_for(name, block_bytes, Config.from_env())


def _open(plan: Plan, backend: MemoryBackend, geometry: Geometry, warm: int) -> Any:
    """Reserve, back the first ``warm`` blocks, tell the scheduler; the whole range as int8."""
    assert plan.facts is not None, "sized before it is allocated"
    begin_budget(backend, engine_config())  # which the scheduler joins after vLLM's warm-up
    torch = import_module("torch")
    stream = 0 if backend.device == "cpu" else torch.cuda.current_stream().cuda_stream
    # A step of all stages may be a page of each layer: then the last one ends behind the blocks.
    steps = geometry.num_planes == 1 and plan.staged
    more = geometry.block_bytes // plan.layer_bytes if steps else 0
    region = Region(backend, geometry, plan.facts, stream, more_pages=more)
    region.warm(warm)
    publish(region)
    if plan.vllm_config.parallel_config.distributed_executor_backend == "mp":
        region.serve()
    flat = tensor_from_address(region.reservation.address, geometry.reserved_bytes, backend.device)
    return flat.as_subclass(torch.Tensor).view(torch.int8)


def _warm_blocks(plan: Plan, config: Any) -> int:
    """Blocks that vLLM's warm-up may touch before its scheduler exists: ids from 0 on."""
    scheduler = plan.vllm_config.scheduler_config
    sizes = [group.kv_cache_spec.block_size for group in config.kv_cache_groups]
    a_request = sum(2 + scheduler.max_num_batched_tokens // size for size in sizes)
    return int(1 + 4 * len(sizes) * scheduler.max_num_seqs + a_request)
