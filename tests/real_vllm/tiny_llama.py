"""The bench's tiny Llama with seeded weights, and a byte tokenizer, so that servers take text."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

ENGINES = Path(__file__).parents[2] / "bench" / "vllm_engines"


def bench_module(name):
    """A module of the bench: what it measures with, tests compare with."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ENGINES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder):
    """Write the model's folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    bench_module("models").make("tiny", folder, max_position_embeddings=2048, torch_dtype="float32")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "</s>", *alphabet]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>",
                "eos_token": "</s>", "model_max_length": 2048}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
