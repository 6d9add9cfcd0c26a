"""Attention over the elastic cache and movement of its blocks, on CPU (Numba) and GPU (Triton).

Importing this package loads neither torch, Numba nor Triton: names are looked up at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcached.kernels import ops, reference
    from kvcached.kernels.append import concat_and_cache_mla, reshape_and_cache
    from kvcached.kernels.attention import attn_with_kvcache
    from kvcached.kernels.binding import BoundCall, bind
    from kvcached.kernels.cascade import Level, cascade_attention
    from kvcached.kernels.gather import gather_kv
    from kvcached.kernels.merge import merge_state, merge_states
    from kvcached.kernels.mla import mla_with_kvcache
    from kvcached.kernels.mla_plan import MlaPlan, plan_mla
    from kvcached.kernels.move import (
        compact_pages,
        copy_pages,
        gather_pages,
        scatter_pages,
        swap_pages,
    )
    from kvcached.kernels.plan import Plan, plan_attention
    from kvcached.kernels.view import KVView

_HOMES = {
    "attn_with_kvcache": "attention",
    "BoundCall": "binding",
    "bind": "binding",
    "reshape_and_cache": "append",
    "concat_and_cache_mla": "append",
    "Level": "cascade",
    "cascade_attention": "cascade",
    "merge_state": "merge",
    "merge_states": "merge",
    "compact_pages": "move",
    "mla_with_kvcache": "mla",
    "MlaPlan": "mla_plan",
    "plan_mla": "mla_plan",
    "copy_pages": "move",
    "gather_kv": "gather",
    "gather_pages": "move",
    "scatter_pages": "move",
    "Plan": "plan",
    "plan_attention": "plan",
    "swap_pages": "move",
    "KVView": "view",
}
_PLANS = {"plan", "mla_plan"}
"""Modules that need Triton; without it plans are those of ``plan_cpu``."""
__all__ = [
    "BoundCall",
    "KVView",
    "Level",
    "MlaPlan",
    "Plan",
    "attn_with_kvcache",
    "bind",
    "cascade_attention",
    "compact_pages",
    "concat_and_cache_mla",
    "copy_pages",
    "gather_kv",
    "gather_pages",
    "merge_state",
    "merge_states",
    "mla_with_kvcache",
    "ops",
    "plan_attention",
    "plan_mla",
    "reference",
    "reshape_and_cache",
    "scatter_pages",
    "swap_pages",
]


def __getattr__(name: str) -> Any:
    if name in {"ops", "reference"}:
        return importlib.import_module(f"{__name__}.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{home}")
    except ModuleNotFoundError as error:
        if error.name != "triton" or home not in _PLANS:
            raise
        module = importlib.import_module("kvcached.kernels.plan_cpu")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
