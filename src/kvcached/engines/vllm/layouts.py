"""In which order layers and blocks lie in vLLM's cache.

Where a block's layers lie in one place, memory comes and goes by the block, with few driver calls;
else by a page of each layer, which holds many blocks. So that is chosen where kernels take it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

_TRIED_MLA = {"TRITON_MLA"}
"""Kernels for MLA that were seen to read blocks of which each holds all layers."""


def cuts_by_layer(kind: str, vllm_config: Any) -> bool:
    """Whether each layer needs a place of its own, since blocks that hold all cannot be cut.

    Up to 0.25 vLLM cuts layers out of such blocks as if tokens came before heads, and turns them
    nevertheless where heads should come first (``_reshape_attention_kv_cache``): kernels would read
    heads as tokens. FlashInfer on Blackwell asks for that order, all on the CPU do, and the
    environment may. Where no attention backend has asked vLLM before (TRITON_MLA does not), it
    looks into its configuration.
    """
    if kind != "packed":
        return False
    with import_module("vllm.config").set_current_vllm_config(vllm_config):
        layout = import_module("vllm.v1.attention.backends.utils").get_kv_cache_layout()
    return layout not in {None, "NHD"}


def all_layers_together(names: list[str]) -> list[str]:
    """The names of vLLM's layouts, most preferred first, in our order.

    A name is the order of layers (L), blocks (B) and what is inside of a block in memory. First
    comes the one that begins with blocks and else is as vLLM's first, if kernels take it.
    """
    ours = "BL" + names[0].replace("L", "").replace("B", "")
    return [ours, *(name for name in names if name != ours)] if ours in names else names


def why_kept(specs: dict[str, Any], vllm_config: Any) -> str:
    """What speaks against another order than vLLM's own; empty if nothing does.

    Kernels that know smaller blocks only read parts of ours, which must follow each other then.
    ``specs``: by layer, vLLM's own.
    """
    try:
        with import_module("vllm.config").set_current_vllm_config(vllm_config):
            base = import_module("vllm.v1.worker.worker_base")
            kernels = base.get_current_attn_backends(vllm_config)
            untried = {kernel.get_name() for kernel in kernels if _may_need_rows(kernel)}
            split = any(_kernel_block(kernels, spec) != spec.block_size for spec in specs.values())
    except Exception as error:  # noqa: BLE001 - other stages wait for ours; vLLM will meet it again
        return f"{type(error).__name__}: {error}"
    if untried:
        return f"{', '.join(sorted(untried))} was not tried with another"
    return "kernels read blocks in parts" if split else ""


def _may_need_rows(kernel: Any) -> bool:
    """Whether these kernels may read blocks as if they followed each other, whatever they declare.

    To declare nothing is to take any order, says vLLM, but CPU_MLA and AMX_MLA do and take one.
    """
    declares = kernel.supported_kv_cache_layouts() is not None
    return kernel.is_mla() and not declares and kernel.get_name() not in _TRIED_MLA


def _kernel_block(kernels: list[Any], spec: Any) -> int:
    """Tokens of a block as these kernels see it. Raises ``ValueError`` if they share no size."""
    select = import_module("vllm.v1.worker.utils").select_common_block_size
    asks = "kv_cache_specs" in inspect.signature(select).parameters  # from 0.32 on
    more = {"kv_cache_specs": [spec] * len(kernels)} if asks else {}
    return int(select(spec.block_size, kernels, **more))


def wrap(stays: Callable[[Any], bool]) -> None:
    """Ask for our order of layouts, of all workers but those of which ``stays`` is true.

    ``VLLM_KV_CACHE_LAYOUT`` goes before either. A vLLM whose workers are not asked keeps its own.
    """
    base = import_module("vllm.v1.worker.worker_base").WorkerBase
    supported = getattr(base, "get_supported_kv_cache_layouts", None)
    if supported is None:
        return

    @functools.wraps(supported)
    def elastic_supported(self: Any) -> list[str]:
        kept = stays(self)  # first, since all stages talk about it, and what follows may raise
        names = list(supported(self))
        return names if kept else all_layers_together(names)

    base.get_supported_kv_cache_layouts = elastic_supported
