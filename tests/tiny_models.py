"""Tiny random models and a byte tokenizer: what the engine tests run in milliseconds a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import kvcached.engines.transformers  # registers the attention function

SIZES = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    # large, so that the gaps between logits are far above rounding
    "initializer_range": 0.4,
    "bos_token_id": 257,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant: {% endif %}"
)


def make_model(kind: str = "llama", attention: str = "sdpa", **changes: Any) -> Any:
    """A random model of an architecture; the same weights for the same arguments."""
    config = AutoConfig.for_model(kind, **{**SIZES, **changes})
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, dtype=torch.float32
    )
    return model.eval()


def make_pair(kind: str = "llama", stock: str = "sdpa", **changes: Any) -> tuple[Any, Any]:
    """The same model with a stock attention and with ours."""
    return make_model(kind, stock, **changes), make_model(kind, "kvcached", **changes)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, an end of text and a start token; with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|start|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>",
        bos_token="<|start|>", padding_side="left", chat_template=TEMPLATE,
    )  # fmt: skip


def save_directory(path: Path, **changes: Any) -> Path:
    """A Hugging Face directory with a tiny Llama and its tokenizer."""
    make_model(**changes).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def padded(lengths: list[int], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """A left-padded batch of random prompts."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.full((len(lengths), width), SIZES["pad_token_id"])
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(0, 256, (length,), generator=generator)
        mask[row, width - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


__all__ = ["kvcached", "make_model", "make_pair", "make_tokenizer", "padded", "save_directory"]
