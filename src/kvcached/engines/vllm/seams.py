"""What of vLLM is replaced or relied on, and whether this vLLM has it, without importing it.

The check reads vLLM's source: so it can come before the first replacement, in any process, and in
a test against a wheel that cannot be imported here.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

_TESTED = ((0, 24), (0, 33))
"""The oldest and the newest release that this was tried with."""


@dataclass(frozen=True, slots=True)
class Seam:
    """One function or class of vLLM that we replace, wrap or call.

    ``parameters`` must all be among its own; for a class, ``methods`` likewise.
    """

    module: str
    path: str
    parameters: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.module}.{self.path}"


_CORE, _WORKER = "vllm.v1.core", "vllm.v1.worker"
SCHEDULER = (
    Seam(f"{_CORE}.block_pool", "FreeKVCacheBlockQueue"),
    Seam(f"{_CORE}.kv_cache_utils", "FreeKVCacheBlockQueue",
         methods=("popleft", "popleft_n", "remove", "append", "append_n", "prepend_n",
                  "get_all_free_blocks")),
    Seam(f"{_CORE}.block_pool", "BlockPool.__init__", ("num_gpu_blocks",)),
    Seam(f"{_CORE}.block_pool", "BlockPool.reset_prefix_cache"),
    Seam(f"{_CORE}.block_pool", "BlockPool.get_usage"),
    Seam(f"{_CORE}.block_pool", "BlockPool._maybe_evict_cached_block", ("block",)),
    Seam(f"{_CORE}.kv_cache_coordinator", "KVCacheCoordinator.get_num_blocks_to_allocate",
         ("request_id",)),
    Seam(f"{_CORE}.sched.scheduler", "Scheduler.schedule"),
    Seam(f"{_CORE}.sched.scheduler", "Scheduler.update_from_output"),
    Seam(f"{_CORE}.sched.scheduler", "Scheduler.finish_requests"),
)  # fmt: skip
"""Where the scheduler is: the free-block queue, and when a step begins and ends."""
WORKER = (
    Seam(f"{_WORKER}.worker_base", "resolve_obj_by_qualname"),
    Seam(f"{_WORKER}.worker_base", "WorkerBase.__init__", ("vllm_config",)),
    Seam(f"{_WORKER}.gpu_worker", "Worker.determine_available_memory"),
    Seam(f"{_WORKER}.gpu_worker", "Worker.get_kv_cache_spec"),
    Seam(f"{_WORKER}.gpu_worker", "request_memory", ("init_snapshot", "cache_config")),
)
"""Where a worker is: how large the cache is."""
LAYOUT_ALLOCATION = (
    Seam(f"{_WORKER}.utils", "allocate_kv_cache",
         ("kv_cache_config", "device", "layout", "kernel_block_sizes")),
    Seam("vllm.v1.kv_cache_interface", "create_kv_cache_views",
         ("raw", "spec", "num_blocks", "layout", "kv_cache_tensor", "kernel_block_size")),
)  # fmt: skip
"""From 0.32 on (at the latest): one function allocates for all runners."""
PACKED_ALLOCATION = (
    Seam(f"{_WORKER}.gpu_model_runner", "GPUModelRunner._allocate_kv_cache_tensors",
         ("kv_cache_config",)),
    Seam(f"{_WORKER}.gpu.attn_utils", "_allocate_kv_cache",
         ("kv_cache_config", "shared_layers", "device")),
)  # fmt: skip
"""In 0.24: each runner allocates, and knows blocks that hold all layers."""


class Survey(NamedTuple):
    """What a vLLM has: ``allocation`` is ``"layout"``, ``"packed"`` or empty."""

    version: str
    missing: tuple[Seam, ...]
    allocation: str
    untested: bool

    @property
    def problem(self) -> str:
        """Why this vLLM cannot be made elastic; empty if it can."""
        if self.missing:
            return f"vLLM {self.version} has no {', '.join(map(str, self.missing))} as we know it"
        if not self.allocation:
            return f"vLLM {self.version} allocates its KV cache in a way that is not known"
        return ""


Source = Callable[[str], str | None]
"""From the name of a module to its source text, or ``None``."""


def survey(version: str, source: Source | None = None) -> Survey:
    """Look at all seams. ``source`` finds a module's text; default: where Python finds it."""
    look = _Reader(installed_source if source is None else source)
    missing = tuple(seam for seam in (*SCHEDULER, *WORKER) if not look.has(seam))
    kinds = {"layout": LAYOUT_ALLOCATION, "packed": PACKED_ALLOCATION}
    allocation = next((k for k, seams in kinds.items() if all(map(look.has, seams))), "")
    number = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    return Survey(version, missing, allocation, not _TESTED[0] <= number <= _TESTED[1])


def installed_source(module: str) -> str | None:
    """The source of a module of this environment, not imported (its packages are)."""
    try:
        spec = find_spec(module)
    except ImportError:
        return None
    if spec is None or spec.origin is None:
        return None
    with open(spec.origin, encoding="utf-8") as file:
        return file.read()


class _Reader:
    """Finds seams in source text; each module is parsed once."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._trees: dict[str, ast.Module | None] = {}

    def has(self, seam: Seam) -> bool:
        """Whether the seam is there, with all parameters and methods that it needs."""
        node: ast.AST | None = self._tree(seam.module)
        for name in seam.path.split("."):
            node = _child(node, name)
        if node is None:
            return False
        if isinstance(node, ast.FunctionDef):
            return set(seam.parameters) <= _parameters(node)
        return all(_child(node, name) is not None for name in seam.methods)

    def _tree(self, module: str) -> ast.Module | None:
        if module not in self._trees:
            text = self._source(module)
            self._trees[module] = None if text is None else ast.parse(text)
        return self._trees[module]


def _child(node: ast.AST | None, name: str) -> ast.AST | None:
    """What ``name`` is in a module or class: a definition, or an import of it."""
    for item in getattr(node, "body", ()):
        if isinstance(item, ast.FunctionDef | ast.ClassDef) and item.name == name:
            return item
        if isinstance(item, ast.ImportFrom) and any(
            (alias.asname or alias.name) == name for alias in item.names
        ):
            return item
    return None


def _parameters(function: ast.FunctionDef) -> set[str]:
    a = function.args
    return {arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)}
