"""Attention problems for ``kernels.py``: caches, block tables, queries, a float64 answer.

Caches are elastic: one sequence of a ``KVCache`` takes all blocks, which are dealt out at random
to the sequences of the problem. Inputs come several times over, each with blocks of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from kernel_timing import rotations

from kvcached import CacheSpec, Config, KVCache, kernels
from kvcached.broker.budget import LocalBudget
from kvcached.kernels import quant

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STORED = {"bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8,
          "int4": torch.uint8}  # fmt: skip
SAMPLED = 16
"""Query tokens, spread over the batch, whose results are compared."""


@dataclass(frozen=True)
class Shape:
    """One attention call. ``queries`` tokens of each sequence ask (one number: of all)."""

    lens: tuple[int, ...]
    q_heads: int
    kv_heads: int
    dim: int
    queries: int | tuple[int, ...] = 1
    dim_v: int = 0
    block_size: int = 16
    place: str = "random"  # or "strided", "contiguous": consecutive slots, no table
    causal: bool = True
    sinks: bool = False
    tree: bool = False
    stored: str = "bfloat16"
    mla: bool = False  # the values are the first dim_v of the keys

    @property
    def value_dim(self) -> int:
        """Of the values and the results."""
        return self.dim_v or self.dim

    @property
    def counts(self) -> tuple[int, ...]:
        """Query tokens of each sequence."""
        return self.queries if isinstance(self.queries, tuple) else (self.queries,) * len(self.lens)

    @property
    def kv_bytes(self) -> float:
        """Bytes of keys, values and scales."""
        size = {"bfloat16": 2, "fp8": 1, "int8": 1, "int4": 0.5}[self.stored]
        row = (self.dim + (0 if self.mla else self.value_dim)) * size
        row += 8 if self.stored.startswith("int") else 0
        return sum(self.lens) * self.kv_heads * row

    @property
    def nbytes(self) -> float:
        """Bytes that must be moved: keys, values, scales, queries, results."""
        return self.kv_bytes + 2 * sum(self.counts) * self.q_heads * (self.dim + self.value_dim)

    @property
    def flops(self) -> float:
        """Multiplications and additions of both products."""
        pairs = 0.0
        for length, count in zip(self.lens, self.counts, strict=True):
            pairs += count * length - (count * (count - 1) / 2 if self.causal else 0)
        return 2 * pairs * self.q_heads * (self.dim + self.value_dim)

    def small(self) -> Shape:
        """A tiny one of the same kind."""
        lens = tuple(max(3, n // 200) for n in self.lens[:2])
        counts = tuple(min(c, n, 5) for c, n in zip(self.counts, lens, strict=False))
        equal = len(set(counts)) == 1
        changed = {"lens": lens, "queries": counts[0] if equal else counts}
        return Shape(**{**self.__dict__, **changed})


def int32(values: Any) -> torch.Tensor:
    """On the device."""
    return torch.as_tensor(values, dtype=torch.int32).to(DEVICE)


def open_cache(shape: Shape, tokens: int) -> KVCache:
    """An elastic cache of one layer for so many tokens."""
    dtype = {"bfloat16": "bfloat16"}.get(shape.stored, "int8")
    pack = 2 if shape.stored == "int4" else 1
    values = {"head_dim_v": 0, "mla_value_dim": shape.value_dim} if shape.mla else {
        "head_dim_v": shape.value_dim // pack}  # fmt: skip
    spec = CacheSpec(
        1, shape.kv_heads, shape.dim // pack, dtype, block_size=shape.block_size,
        layout="per_layer" if shape.place == "contiguous" else "cross_layer", **values,
    )  # fmt: skip
    most = (tokens // shape.block_size + 2) * shape.block_size
    budget = most * spec.token_bytes + (1 << 30)
    return KVCache(spec, device=DEVICE, max_tokens=most, budget=LocalBudget(budget),
                   config=Config(broker=False), name="bench")  # fmt: skip


@dataclass
class Problem:
    """A shape with its inputs, ``copies`` times. Close it."""

    shape: Shape
    copies: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = self.shape
        self.copies = self.copies or rotations(shape.nbytes)
        size = shape.block_size
        self.blocks = [math.ceil(n / size) for n in shape.lens]
        total = sum(self.blocks) * self.copies
        self.cache = open_cache(shape, total * size)
        sequence = self.cache.new_sequence()
        # All blocks there are: so none is left out between those that are used.
        self.cache.extend(sequence, (self.cache.geometry.num_blocks - 1) * size)
        ids = torch.tensor(sequence.block_ids, dtype=torch.int32).sort().values[:total]
        self.k, self.v = (part.view(STORED[shape.stored]) for part in self.cache.layer(0))
        generator = torch.Generator().manual_seed(0)
        self.fill(ids)
        if shape.place == "random":
            ids = ids[torch.randperm(len(ids), generator=generator)]
        else:
            assert int(ids[-1] - ids[0]) == len(ids) - 1, "the blocks are not consecutive"
        self.tables, self.starts = [], []
        for part in ids.split(sum(self.blocks)):
            table = torch.zeros(len(self.blocks), max(self.blocks), dtype=torch.int32)
            for row, own in zip(table, part.split(self.blocks), strict=True):
                row[: len(own)] = own
            self.tables.append(table.to(DEVICE))
            self.starts.append((table[:, 0] * size).to(DEVICE))
        self.queries(generator)

    def queries(self, generator: torch.Generator) -> None:
        """Query tokens, their places, room for results, sinks, masks and scales."""
        shape, counts = self.shape, self.shape.counts
        rows, self.max_q = sum(counts), max(counts)
        self.q = [torch.randn(rows, shape.q_heads, shape.dim, generator=generator).bfloat16()
                  .to(DEVICE) for _ in range(self.copies)]  # fmt: skip
        self.out = [torch.empty(rows, shape.q_heads, shape.value_dim, device=DEVICE,
                                dtype=torch.bfloat16) for _ in range(self.copies)]  # fmt: skip
        self.lens = int32(shape.lens)
        self.cu_q = int32([0, *counts]).cumsum(0, dtype=torch.int32)
        if len(set(counts)) > 1:
            self.options["cu_seqlens_q"] = self.cu_q
        self.options |= {"max_seqlen_q": self.max_q, "causal": shape.causal}
        self.sinks = torch.randn(shape.q_heads, generator=generator).to(DEVICE)
        if shape.sinks:
            self.options["sinks"] = self.sinks
        if shape.tree:  # a heap: token j's parent is (j - 1) // 2
            seen = [1]
            for j in range(1, self.max_q):
                seen.append(seen[(j - 1) // 2] | 1 << j)
            self.seen = seen
            masks = torch.tensor(seen * len(counts), dtype=torch.int64)
            self.options |= {"custom_mask": masks.to(DEVICE)}
        if shape.stored != "bfloat16":
            form = self.k.shape[:3] if shape.stored.startswith("int") else (shape.kv_heads,)
            self.options |= {name: 0.01 + 0.02 * torch.rand(form, device=DEVICE)
                             for name in ("k_descale", "v_descale")}  # fmt: skip
        if shape.mla and shape.stored != "bfloat16":  # values are the front of the keys
            self.options["v_descale"] = self.options["k_descale"]

    def fill(self, ids: torch.Tensor) -> None:
        """Random rows in all blocks that are there, run by run."""
        cuts = torch.nonzero(ids.diff() != 1).flatten() + 1
        step = max(1, (1 << 29) // (self.k[0].numel() * 4))
        torch.manual_seed(0)
        for run in ids.tensor_split(cuts):
            for part in run.split(step):
                first, last = int(part[0]), int(part[-1]) + 1
                for pool in (self.k,) if self.shape.mla else (self.k, self.v):
                    self.fill_rows(pool[first:last])

    def fill_rows(self, rows: torch.Tensor) -> None:
        """Normal numbers, or stored ones as a quantiser would leave them."""
        if self.shape.stored == "int4":
            low, high = torch.randint(1, 16, (2, *rows.shape), device=DEVICE, dtype=torch.uint8)
            rows.copy_(low | (high << 4))
        elif self.shape.stored == "bfloat16":
            rows.copy_(torch.randn(rows.shape, device=DEVICE, dtype=torch.bfloat16))
        else:
            spread = 100.0 if self.shape.stored == "fp8" else 40.0
            numbers = torch.randn(rows.shape, device=DEVICE) * spread
            rows.copy_(numbers.clamp(-127, 127).to(rows.dtype))

    def place(self, copy: int) -> dict[str, Any]:
        """Where the sequences lie."""
        if self.shape.place == "random":
            return {"page_table": self.tables[copy]}
        return {"cache_start": self.starts[copy]}

    def rows(self, copy: int, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a sequence, dequantised, float64 ``[L, Hkv, D]``."""
        ids = self.tables[copy][seq, : self.blocks[seq]].long()
        length, found = self.shape.lens[seq], []
        for pool, name in ((self.k, "k_descale"), (self.v, "v_descale")):
            part = pool[ids].flatten(0, 1)[:length]
            if self.shape.stored == "bfloat16":
                found.append(part.double())
                continue
            scale = self.options[name]
            if scale.dim() == 3:
                scale = scale[ids].flatten(0, 1)[:length]
            found.append(quant.dequantize(part, scale, torch.float32).double())
        return found[0], found[1]

    def contiguous(self, copy: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all sequences one after another, for kernels without pages."""
        starts = int32([0, *self.shape.lens]).cumsum(0, dtype=torch.int32)
        outs = [torch.empty(sum(self.shape.lens), *pool.shape[2:], dtype=pool.dtype, device=DEVICE)
                for pool in (self.k, self.v)]  # fmt: skip
        kernels.gather_kv(self.k, self.v, self.tables[copy], starts, *outs)
        return outs[0], outs[1]

    def errors(
        self, out: torch.Tensor, copy: int = 0, scale: float | None = None
    ) -> dict[str, float]:
        """Of some rows of ``out [T, Hq, Dv]``, how far they are from the float64 answer.

        ``error`` is the largest difference, a matter of luck with few roundings; ``error_rms``, the
        root of the mean square, tells who rounds more.
        """
        shape, counts, worst = self.shape, self.shape.counts, 0.0
        squares, numbers = 0.0, 0
        seqs = sorted({0, len(counts) - 1, len(counts) // 2, shape.lens.index(max(shape.lens))})
        firsts = [sum(counts[:i]) for i in range(len(counts))]
        for seq in seqs:
            k, v = self.rows(copy, seq)
            every = max(1, counts[seq] * len(seqs) // SAMPLED)
            for token in {*range(0, counts[seq], every), counts[seq] - 1}:
                row = firsts[seq] + token
                wanted = self.answer(self.q[copy][row], k, v, token, counts[seq], scale)
                off = out[row].double() - wanted
                worst = max(worst, float(off.abs().max()))
                squares, numbers = squares + float(off.square().sum()), numbers + off.numel()
        return {"error": worst, "error_rms": math.sqrt(squares / numbers)}

    def answer(self, q: Any, k: Any, v: Any, token: int, count: int, scale: Any) -> torch.Tensor:
        """Attention of one query token in float64: ``[Hq, Dv]``."""
        shape, length = self.shape, len(k)
        group = shape.q_heads // shape.kv_heads
        grouped = q.double().view(shape.kv_heads, group, shape.dim)
        scores = torch.einsum("hgd,lhd->hgl", grouped, k) * (scale or shape.dim**-0.5)
        first = length - count
        if shape.tree:
            hidden = [first + j for j in range(count) if not self.seen[token] >> j & 1]
            scores[..., hidden] = -torch.inf
        elif shape.causal:
            scores[..., first + token + 1 :] = -torch.inf
        top = scores.amax(-1, keepdim=True)
        weights = torch.exp(scores - top)
        total = weights.sum(-1, keepdim=True)
        if shape.sinks:
            total = total + torch.exp(self.sinks.double().view(*top.shape) - top)
        return torch.einsum("hgl,lhd->hgd", weights / total, v).reshape(shape.q_heads, -1)

    def close(self) -> None:
        """Give the memory back."""
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        self.cache.close()
        self.k = self.v = None
        self.q, self.out, self.tables = [], [], []
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
