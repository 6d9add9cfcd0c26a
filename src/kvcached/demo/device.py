"""Where the demo's engines run: on the CPU, or on a GPU that torch sees."""

from __future__ import annotations

from typing import Any

from kvcached.demo.model import require
from kvcached.errors import BackendUnavailable, InvalidInput, UnknownName

_HINT = "`kvcached doctor` says what is missing; --device cpu needs no GPU."


def find_device(name: str) -> str:
    """``"cpu"`` or ``"cuda:N"`` for a ``--device``: one of the two, ``cuda``, or ``auto``.

    Raises ``InvalidInput`` or ``UnknownName`` for other names, ``BackendUnavailable`` or
    ``EngineUnsupported`` if what a GPU needs is missing.
    """
    kind, _, index = name.partition(":")
    if kind not in {"cpu", "cuda", "auto"} or (
        index and not (kind == "cuda" and index.isdecimal())
    ):
        raise InvalidInput(f"--device {name!r} is unknown", hint="Use cpu, cuda, cuda:1 or auto.")
    if kind == "cpu":
        return "cpu"
    require("torch")
    import torch

    chosen = choose(kind, int(index or 0), torch.cuda.device_count())
    if chosen != "cpu":
        _require_gpu_parts()
    return chosen


def choose(kind: str, index: int, gpus: int) -> str:
    """The device, where torch sees ``gpus`` of them."""
    if kind == "auto" and not gpus:
        return "cpu"
    if not gpus:
        raise BackendUnavailable("torch sees no CUDA device", hint=_HINT)
    if index >= gpus:
        raise UnknownName(f"there is no GPU {index}: torch sees {gpus}", hint=_HINT)
    return f"cuda:{index}"


def _require_gpu_parts() -> None:
    """Triton for the kernels, and the driver's bindings: now, not in an engine's last words."""
    from kvcached.memory.cuda import load_driver

    require("triton")
    load_driver()


def describe(device: str) -> dict[str, Any]:
    """What a reader needs to know of a GPU to compare; nothing for the CPU."""
    if device == "cpu":
        return {}
    import torch

    known = torch.cuda.get_device_properties(device)
    return {
        "gpu": known.name,
        "gpu_memory_bytes": known.total_memory,
        "torch": torch.__version__,
    }


def page_bytes(device: str, spec: Any) -> int:
    """Bytes of a page of the backend that a cache on this device gets."""
    from kvcached.config import Config
    from kvcached.resources import make_backend

    backend = make_backend(device, spec, Config())
    try:
        return backend.page_bytes
    finally:
        backend.shutdown()
