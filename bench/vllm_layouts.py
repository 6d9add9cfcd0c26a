"""Layouts, models and ranks: tokens of stock beside elastic vLLM, a row of ``gpu_vllm.py``."""

from __future__ import annotations

import importlib.util
import os
import statistics
from typing import Any

from vllm_run import GIB, SMALL, Recorded, add, compared_at_once, in_turns, require, share

EXACT = {"VLLM_BATCH_INVARIANT": "1"}
"""For vLLM: what a request gets does not depend on which others share its batch, which is a matter
of time. With gpt-oss it also means one tile of experts for all batches: else each size of batch
has one of its own, which is compiled while the engine serves."""
TRITON = {"attention_backend": "TRITON_ATTN", "env": EXACT}
"""Its kernels keep to that. Those of FLASH_ATTN do not: with them stock differs from itself."""
ALIKE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""The engine in the process that asks: it has all requests before its first step, so that batches
are alike in all runs. For FLASHINFER, which vLLM does not know as one that does not depend on
them."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "blocks of 64": {"shape": "small", "block_size": 64, **TRITON},
    "blocks of 256": {"shape": "small", "block_size": 256, **TRITON},
    "fp8 cache": {"shape": "small", "kv_cache_dtype": "fp8", **TRITON},
    "windows beside full attention (Gemma-3)": {"shape": "gemma3"},
    "windows, sinks, experts (gpt-oss)": {"shape": "gpt-oss", **TRITON},
    "windows alone (Mistral)": {"shape": "mistral"},
    "MLA (DeepSeek-V2)": {"shape": "deepseek", "attention_backend": "TRITON_MLA", "env": EXACT},
    "FLASHINFER": {"shape": "small", "attention_backend": "FLASHINFER",
                   "enable_flashinfer_autotune": False, "env": ALIKE},
    "drafts by n-grams": {
        "shape": "small",
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 4,
            "prompt_lookup_max": 3,
        },
        **TRITON,
    },
    "TP=2": {"shape": "small", "tensor_parallel_size": 2, **TRITON},
    "PP=2": {"shape": "small", "pipeline_parallel_size": 2, **TRITON},
    "stages of 3 and 5 layers": {
        "shape": "small",
        "pipeline_parallel_size": 2,
        **TRITON,
        "env": EXACT | {"VLLM_PP_LAYER_PARTITION": "3,5"},
    },
}  # fmt: skip
"""What is compared beside the shapes of the other parts; models are small, with seeded weights."""


QUICK = {"max_model_len": 1024, "kv_cache_memory_bytes": GIB,
         "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY",
                                "cudagraph_capture_sizes": [1, 4, 8, 24]}}  # fmt: skip
"""Of their engines: decodes in graphs, but nothing compiled, which takes most of a start."""


def possible(changes: dict[str, Any]) -> bool:
    """Whether what a layout needs is here: enough devices, FlashInfer."""
    import torch

    ranks = changes.get("tensor_parallel_size", 1) * changes.get("pipeline_parallel_size", 1)
    if changes.get("attention_backend") == "FLASHINFER" and not importlib.util.find_spec(
        "flashinfer"
    ):
        return False
    return ranks <= torch.cuda.device_count()


def layouts() -> None:
    """Greedy tokens of stock and elastic engines over other layouts, models and ranks."""
    shown: dict[str, str] = {}
    again: dict[str, str | None] = {}
    failed: dict[str, str] = {}
    for label, changes in LAYOUTS.items():
        chosen = os.environ.get("LAYOUTS")
        if chosen and not any(word in label for word in chosen.split(",")):
            continue
        if not Recorded.folder and not possible(changes):
            continue
        own = {k: v for k, v in changes.items() if k not in {"shape", "env"}}
        name = "layout_" + "".join(c if c.isalnum() else "_" for c in label)
        try:
            shown[label], again[label] = compared_at_once(
                name, shape=changes["shape"], phases="4,24,8", prompt=500, output=96, settle=0,
                seconds=120, engine=SMALL | QUICK | own, env=changes.get("env"),
            )  # fmt: skip
        except RuntimeError as error:
            failed[label] = str(error)[-600:]
    add("layouts_identical", min(map(share, shown.values()), default=0.0), "share", 1.0,
        repeats=36, requests=shown, stock_again=again, failed=failed)  # fmt: skip


ORDERED = {"dtype": "bfloat16", "max_model_len": 4096, "max_num_seqs": 96,
           "gpu_memory_utilization": 0.22, "kv_cache_memory_bytes": 8 * GIB,
           "enable_prefix_caching": False,
           "compilation_config": {"cudagraph_capture_sizes": [1, 8, 16, 32, 64, 96]}}  # fmt: skip
"""Of engines whose caches lie in different orders: all four fit on one device."""


def order() -> None:
    """Throughput by the order of layers (L) and blocks (B) in memory; stock and elastic, in turns.

    For vLLM from 0.29 on. Stock takes LBNHC by itself, elastic BLNHC. Without a prefix cache, and
    idle while the others run: an elastic engine begins each phase without memory.
    """
    modes = {f"{mode}, {layout}": {"elastic": mode == "elastic",
                                   "env": {"VLLM_KV_CACHE_LAYOUT": layout}}
             for layout in ("LBNHC", "BLNHC") for mode in ("stock", "elastic")}  # fmt: skip
    names = {mode: "order_" + mode.replace(", ", "_") for mode in modes}
    runs = in_turns(
        {names[mode]: options for mode, options in modes.items()}, 400,
        os.environ.get("PHASES", "192,192,192,192,192,192,192"), settle=0, shape="llama-3.2-3b",
        engine=ORDERED,
    )  # fmt: skip
    rates = {mode: [phase["requests_per_s"] for phase in require(runs[name])["phases"][1:]]
             for mode, name in names.items()}  # fmt: skip
    medians = {mode: statistics.median(values) for mode, values in rates.items()}
    add("throughput_ratio_order", medians["elastic, BLNHC"] / medians["stock, LBNHC"], "x", None,
        repeats=len(rates["stock, LBNHC"]), requests_per_s=rates,
        peers={f"{mode}, requests/s": rate for mode, rate in medians.items()})  # fmt: skip
