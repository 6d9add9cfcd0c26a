"""Replacing the seams of vLLM (``seams.py``), all or none, and once a process."""

from __future__ import annotations

import functools
import gc
import logging
import os
import subprocess
import sys
import threading
from importlib import import_module
from typing import Any

from kvcached.engines.vllm import gauges, seams, sizing, steps
from kvcached.errors import EngineUnsupported

_log = logging.getLogger("vllm.kvcached")
_installed = False
_LOOPS = ("_calls", "_hot", "_scan", "_bound")
"""Modules with what Numba compiles for a page pool."""
_LONGEST_LOAD_S = 60.0
_NEVER = 1 << 30
_ATTENTION = "kvcached.engines.vllm.attention.KvcachedAttentionBackend"


def install(*, strict: bool) -> bool:
    """Make this process's vLLM elastic; whether that could be done. ``strict``: or raise."""
    global _installed
    if _installed:
        return True
    _log_as_vllm_does()
    found = seams.survey(seams.installed_version() or "unknown")
    if found.problem:
        if strict:
            raise EngineUnsupported(found.problem, hint="Unset KVCACHED=strict to run without.")
        _log.warning("not elastic: %s", found.problem)
        return False
    if found.untested:
        _log.warning("vLLM %s was never tried with kvcached; all that is replaced is there",
                     found.version)  # fmt: skip
    _replace(found.allocation, strict=strict)
    _offer_attention()
    gauges.register()
    _installed = True
    return True


def _offer_attention() -> None:
    """Our kernels are ``--attention-backend CUSTOM``, unless another plug-in has taken that."""
    registry: Any = import_module(seams.REGISTRY)
    custom = registry.AttentionBackendEnum.CUSTOM
    if not custom.is_overridden():
        registry.register_backend(custom, _ATTENTION)


def _attend_on_cpu(vllm_config: Any) -> None:
    """On the CPU vLLM has one backend whatever is chosen: if that is ours, it takes its place."""
    backends: Any = import_module(seams.REGISTRY)
    kinds, chosen = backends.AttentionBackendEnum, vllm_config.attention_config.backend
    if chosen is kinds.CUSTOM and kinds.CUSTOM.get_path() == _ATTENTION:
        backends.register_backend(kinds.CPU_ATTN, _ATTENTION)


def _log_as_vllm_does() -> None:
    """What the rest of kvcached says appears where vLLM's own messages do, as what is said here."""
    ours = logging.getLogger("kvcached")
    if not ours.handlers:
        ours.setLevel(logging.DEBUG)  # vLLM's level decides
        ours.addHandler(_ToVllm())
        ours.propagate = False


class _ToVllm(logging.Handler):
    """Hands over to vLLM's logger as it is by then: some processes configure it after plug-ins."""

    def emit(self, record: logging.LogRecord) -> None:
        theirs = logging.getLogger("vllm")
        if theirs.isEnabledFor(record.levelno):
            theirs.handle(record)


def _replace(allocation: str, *, strict: bool) -> None:
    """The scheduler's seams now; a worker's when vLLM looks its class up, in its own process."""
    base: Any = import_module("vllm.v1.worker.worker_base")
    steps.install()
    resolve = base.resolve_obj_by_qualname

    @functools.wraps(resolve)
    def elastic_resolve(name: str) -> Any:
        found = resolve(name)
        if isinstance(found, type) and issubclass(found, base.WorkerBase):
            _wrap_worker(found, allocation, strict=strict)
        return found

    base.resolve_obj_by_qualname = elastic_resolve


def _wrap_worker(worker: Any, allocation: str, *, strict: bool) -> None:
    """Decide before a worker is made, since some demand memory already then. Once a class."""
    if "elastic" in vars(worker):
        return
    worker.elastic, init = True, worker.__init__

    @functools.wraps(init)
    def elastic_init(self: Any, vllm_config: Any, *args: Any, **more: Any) -> None:
        _attend_on_cpu(vllm_config)
        compile_ahead()
        sizing.prepare(vllm_config, allocation, strict=strict)
        init(self, vllm_config, *args, **more)

    worker.__init__ = elastic_init


def _load(*names: str) -> None:
    """Import modules without a search of vLLM's heap for garbage, as so many new objects bring.

    By the threshold of such searches: vLLM switches the collector as a whole off and on.
    """
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, _NEVER)
    try:
        for name in names:
            import_module(name)
    except Exception:  # noqa: BLE001 - whoever needs it says why it can't be had
        _log.debug("not loaded ahead", exc_info=True)
    finally:
        gc.set_threshold(young, middle, old)


@functools.cache
def compile_ahead() -> threading.Thread:
    """Have the loops over blocks in this process by the time that the model is loaded; the loader.

    On a machine where they never ran their compilation takes seconds: a process of its own leaves
    them in Numba's cache. Numba itself takes a second to import, which a thread then does where
    vLLM would otherwise wait for it once its model is loaded. The thread holds locks of imports
    that no fork may find held, so whoever forks waits for its end.
    """
    names = [f"kvcached.{loops}" for loops in _LOOPS]
    child = subprocess.Popen(  # noqa: S603 - modules of ours
        [sys.executable, "-c", f"import {', '.join(names)}"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def load() -> None:
        _load("numba")  # at once, while vLLM makes its process group
        if child.wait() == 0:  # else whoever needs them says why they can't be had
            _load(*names, "numpy.ma")  # the latter by Numba, at the first call

    loader = threading.Thread(target=load, name="kvcached-loads", daemon=True)
    os.register_at_fork(before=lambda: loader.join(_LONGEST_LOAD_S))
    loader.start()
    return loader
