"""Layouts, models and ranks: tokens of stock beside elastic vLLM, a row of ``gpu_vllm.py``."""

from __future__ import annotations

import os
from typing import Any

from vllm_run import GIB, SMALL, Recorded, add, compared_at_once, share

LAYOUTS: dict[str, dict[str, Any]] = {
    "blocks of 64": {"shape": "small", "block_size": 64},
    "blocks of 256": {"shape": "small", "block_size": 256},
    "fp8 cache": {"shape": "small", "kv_cache_dtype": "fp8", "attention_backend": "TRITON_ATTN"},
    "windows beside full attention (Gemma-3)": {"shape": "gemma3"},
    "windows, sinks, experts (gpt-oss)": {"shape": "gpt-oss"},
    "windows alone (Mistral)": {"shape": "mistral"},
    "MLA (DeepSeek-V2)": {"shape": "deepseek"},
    "drafts by n-grams": {
        "shape": "small",
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 4,
            "prompt_lookup_max": 3,
        },
    },
    "TP=2": {"shape": "small", "tensor_parallel_size": 2},
}
"""What is compared beside the shapes of the other parts; models are small, with seeded weights."""


QUICK = {"max_model_len": 1024, "kv_cache_memory_bytes": GIB,
         "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY",
                                "cudagraph_capture_sizes": [1, 4, 8, 24]}}  # fmt: skip
"""Of their engines: decodes in graphs, but nothing compiled, which takes most of a start."""


def layouts() -> None:
    """Greedy tokens of stock and elastic engines over other layouts, models and ranks."""
    import torch

    shown: dict[str, str] = {}
    again: dict[str, str | None] = {}
    failed: dict[str, str] = {}
    for label, changes in LAYOUTS.items():
        chosen = os.environ.get("LAYOUTS")
        if chosen and not any(word in label for word in chosen.split(",")):
            continue
        ranks = changes.get("tensor_parallel_size", 1)
        if not Recorded.folder and ranks > torch.cuda.device_count():
            continue
        arguments = SMALL | QUICK | {k: v for k, v in changes.items() if k != "shape"}
        name = "layout_" + "".join(c if c.isalnum() else "_" for c in label)
        try:
            shown[label], again[label] = compared_at_once(
                name, shape=changes["shape"], phases="4,24,8", prompt=500, output=96, settle=0,
                seconds=120, engine=arguments,
            )  # fmt: skip
        except RuntimeError as error:
            failed[label] = str(error)[-600:]
    add("layouts_identical", min(map(share, shown.values()), default=0.0), "share", 1.0,
        repeats=36, requests=shown, stock_again=again, failed=failed)  # fmt: skip
