"""The caches of real models, for tests and benches. From the models' public configurations."""

from __future__ import annotations

from dataclasses import replace

from kvcached.layout import CacheSpec

# Layers that keep a KV cache, KV heads, head dimension.
_MODELS = {
    "Llama-3.2-1B": (16, 8, 64),
    "Llama-3.1-8B": (32, 8, 128),
    "Llama-3.1-70B": (80, 8, 128),
    "Qwen2.5-0.5B": (24, 2, 64),
    "Qwen2.5-7B": (28, 4, 128),
    "Qwen3-0.6B": (28, 8, 128),
    "Qwen3-4B": (36, 8, 128),
    "Qwen3-30B-A3B": (48, 4, 128),
    "Gemma-3-4B": (34, 4, 256),
    "Mistral-7B": (32, 8, 128),
    "gpt-oss-20b": (24, 8, 64),
    "SmolLM2-135M": (30, 3, 64),
}
# kv_lora_rank 512 and qk_rope_head_dim 64, one latent vector per token.
_MLA = {"DeepSeek-V3": (61, 512, 64)}


def model_specs(*, dtype: str = "bfloat16", block_size: int = 16) -> dict[str, CacheSpec]:
    """The ``CacheSpec`` of each model by name."""
    specs = {name: CacheSpec(*numbers) for name, numbers in _MODELS.items()}
    for name, (layers, rank, rope) in _MLA.items():
        specs[name] = CacheSpec(layers, 1, rank + rope, head_dim_v=0, mla_value_dim=rank)
    return {n: replace(s, dtype=dtype, block_size=block_size) for n, s in specs.items()}
