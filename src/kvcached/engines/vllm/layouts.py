"""In which order layers and blocks lie in vLLM's cache.

Where a block's layers lie in one place, memory comes and goes by the block, with few driver calls;
else by a page of each layer, which holds many blocks. So that is chosen where kernels take it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any


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


def split_blocks(specs: dict[str, Any], vllm_config: Any) -> str:
    """Whether kernels know smaller blocks only, so that vLLM would cut ours, which it cannot do.

    Empty if not. ``specs``: by layer, vLLM's own.
    """
    base, utils = map(import_module, ("vllm.v1.worker.worker_base", "vllm.v1.worker.utils"))
    kernels = base.get_current_attn_backends(vllm_config)
    for size in {spec.block_size for spec in specs.values()}:
        try:
            if utils.select_common_block_size(size, kernels) != size:
                return "blocks that are split"
        except ValueError:  # in some pairs of kernels and layers there is none; vLLM will say so
            return "no common size of blocks"
    return ""


def wrap(stays: Callable[[Any], str]) -> None:
    """Ask for our order of layouts, of all workers but those of which ``stays`` gives a reason.

    ``VLLM_KV_CACHE_LAYOUT`` goes before either.
    """
    base = import_module("vllm.v1.worker.worker_base").WorkerBase
    supported = base.get_supported_kv_cache_layouts

    @functools.wraps(supported)
    def elastic_supported(self: Any) -> list[str]:
        names = list(supported(self))
        return names if stays(self) else all_layers_together(names)

    base.get_supported_kv_cache_layouts = elastic_supported
