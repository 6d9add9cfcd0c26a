"""Attention over the elastic cache and movement of its blocks, on CPU (Numba) and GPU (Triton).

Importing this package loads neither torch, Numba nor Triton: names are looked up at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcached.kernels import reference
    from kvcached.kernels.append import reshape_and_cache
    from kvcached.kernels.attention import attn_with_kvcache
    from kvcached.kernels.merge import merge_state, merge_states
    from kvcached.kernels.mla import mla_with_kvcache
    from kvcached.kernels.move import copy_pages, gather_kv, gather_pages, scatter_pages
    from kvcached.kernels.view import KVView

_HOMES = {
    "attn_with_kvcache": "attention",
    "reshape_and_cache": "append",
    "merge_state": "merge",
    "merge_states": "merge",
    "mla_with_kvcache": "mla",
    "copy_pages": "move",
    "gather_kv": "move",
    "gather_pages": "move",
    "scatter_pages": "move",
    "KVView": "view",
}
__all__ = [
    "KVView",
    "attn_with_kvcache",
    "copy_pages",
    "gather_kv",
    "gather_pages",
    "merge_state",
    "merge_states",
    "mla_with_kvcache",
    "reference",
    "reshape_and_cache",
    "scatter_pages",
]


def __getattr__(name: str) -> Any:
    if name == "reference":
        return importlib.import_module(f"{__name__}.reference")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
