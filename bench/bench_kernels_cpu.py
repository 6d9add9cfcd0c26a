"""Attention on CPU over a paged cache, against torch SDPA on gathered, contiguous K and V.

The two are called in turn, so that a busy machine slows both.

SDPA gets what it likes best: K and V gathered beforehand (not timed), heads not repeated
(``enable_gqa``). Ours reads the blocks where they lie, in random order. Each row is
ours, its ``peers`` hold SDPA's median and ours over SDPA's.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from typing import Any

import torch
from common import measure, row, write
from torch.nn.functional import scaled_dot_product_attention

from kvcached.kernels import attn_with_kvcache, reshape_and_cache

BLOCK_SIZE = 16
SHAPES = {  # batch, tokens, query tokens, query heads, KV heads, head dim
    "decode B8 L1024 9/3/64": (8, 1024, 1, 9, 3, 64),
    "decode B8 L1024 32/8/128": (8, 1024, 1, 32, 8, 128),
    "decode B1 L4096 32/8/128": (1, 4096, 1, 32, 8, 128),
    "prefill T512 9/3/64": (1, 512, 512, 9, 3, 64),
    "prefill T512 32/8/128": (1, 512, 512, 32, 8, 128),
    "chunk 128 at 1024 9/3/64": (1, 1024, 128, 9, 3, 64),
}
FIRST_CALL = """
import time, torch
start = time.perf_counter()
from kvcached.kernels import attn_with_kvcache
cache, index = torch.zeros(2, 16, 1, 64).bfloat16(), torch.ones(1, dtype=torch.int32)
attn_with_kvcache(cache[0, :1], cache, cache, cache_seqlens=index, page_table=index[None])
print(time.perf_counter() - start)
"""


def problem(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, Any, float]:
    """Two functions, ours and SDPA, that compute the same, and by how much they differ."""
    batch, tokens, queries, q_heads, kv_heads, dim = shape
    blocks = tokens // BLOCK_SIZE
    cache = torch.randn(2, batch * blocks, BLOCK_SIZE, kv_heads, dim).to(dtype)
    table = torch.randperm(batch * blocks).view(batch, blocks).int()
    lens = torch.full((batch,), tokens, dtype=torch.int32)
    q = torch.randn(batch * queries, q_heads, dim).to(dtype)
    k, v = (x[table.long()].reshape(batch, tokens, kv_heads, dim).transpose(1, 2).contiguous()
            for x in cache)  # fmt: skip
    heads_first = q.view(batch, queries, q_heads, dim).transpose(1, 2)
    mask = None
    if 1 < queries < tokens:  # SDPA aligns is_causal top-left, which is another question
        mask = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)

    def ours() -> torch.Tensor:
        return attn_with_kvcache(q, cache[0], cache[1], cache_seqlens=lens, page_table=table,
                                 max_seqlen_q=queries)  # fmt: skip

    def sdpa() -> torch.Tensor:
        return scaled_dot_product_attention(heads_first, k, v, attn_mask=mask, enable_gqa=True,
                                            is_causal=queries == tokens)  # fmt: skip

    same = ours().view(batch, queries, q_heads, dim).transpose(1, 2)
    return ours, sdpa, float((same - sdpa()).abs().max())


def attention_rows(threads: int) -> list[dict[str, Any]]:
    """All shapes and dtypes at ``threads`` threads."""
    torch.set_num_threads(threads)
    rows = []
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            ours, sdpa, error = problem(shape, dtype)
            repeats = 15 if "32/8" in name else 40
            short = str(dtype).removeprefix("torch.")
            pairs = [(measure(ours, repeats=1, warm_up=0), measure(sdpa, repeats=1, warm_up=0))
                     for _ in range(repeats)]  # fmt: skip
            line = row(f"{name} {short}, threads {threads}", [x for (x,), _ in pairs], unit="us")
            peer = row("", [y for _, (y,) in pairs], unit="us")["median"]
            ratio = round(line["median"] / peer, 3)
            rows.append(line | {"peers": {"torch_sdpa_gathered": peer, "ours_over_sdpa": ratio},
                                "max_difference": error})  # fmt: skip
    return rows


def append_rows() -> list[dict[str, Any]]:
    """One decode step of 8 sequences and a prefill of 512 tokens."""
    rows, cache = [], torch.zeros(2, 1024, BLOCK_SIZE, 3, 64).bfloat16()
    for tokens in (8, 512):
        key = torch.randn(tokens, 3, 64).bfloat16()
        slots = torch.randperm(1024 * BLOCK_SIZE)[:tokens].int()
        samples = measure(lambda k=key, s=slots: reshape_and_cache(k, k, cache[0], cache[1], s),
                          repeats=50)  # fmt: skip
        rows.append(row(f"append {tokens} tokens 3/64 bfloat16", samples, unit="us"))
    return rows


def first_call_rows() -> list[dict[str, Any]]:
    """First call in a new process: with an empty, then with a filled disk cache of Numba."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, repeats in (("compiles", 1), ("loads from disk", 5)):
            samples = [
                float(subprocess.run([sys.executable, "-c", FIRST_CALL], text=True, check=True,
                                     capture_output=True, env={"NUMBA_CACHE_DIR": folder}).stdout)
                for _ in range(repeats)
            ]  # fmt: skip
            rows.append(row(f"first call, {name} (with imports but torch's)", samples, unit="s"))
    return rows


def main() -> None:
    """Measure and write ``kernels_cpu.json``."""
    torch.manual_seed(0)
    rows = [*attention_rows(1), *attention_rows(2), *append_rows(), *first_call_rows()]
    write("kernels_cpu", "CPU kernels", rows)
    for line in rows:
        if "peers" in line:
            print(f"{line['case']:<50} {line['peers']['ours_over_sdpa']:>7} x SDPA")


if __name__ == "__main__":
    main()
