"""FlashInfer on the problems of ``kernels.py``: its own wrappers on our own pages.

It is used where ``import flashinfer`` works. It compiles what a problem needs with nvcc, which
takes minutes; a folder of ``--peers`` may hold modules compiled before (``build_flashinfer.py``),
and then nothing else is compiled: a problem without its module says so.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernel_problems import DEVICE, Problem, int32

MODULES = "flashinfer_modules"
WORKSPACE_BYTES = 256 << 20
"""Of partial results, shared by all wrappers of a problem: their calls follow one another."""
Call = Callable[[], torch.Tensor]


@functools.cache
def load(*folders: Path) -> Any:
    """The package, told where the modules are that were compiled before."""
    built = next((path / MODULES for path in folders if (path / MODULES).is_dir()), None)
    if built is not None:
        os.environ["FLASHINFER_DISABLE_JIT"] = "1"
    import flashinfer
    from flashinfer.jit import env

    if built is not None:
        env.FLASHINFER_AOT_DIR = built.resolve()
    return flashinfer


def pages(problem: Problem, copy: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Block tables as it takes them: starts, ids one after another, tokens of the last blocks."""
    blocks, size = problem.blocks, problem.shape.block_size
    starts = int32([0, *blocks]).cumsum(0, dtype=torch.int32)
    last = int32([(n - 1) % size + 1 for n in problem.shape.lens])
    ids = [row[:n] for row, n in zip(problem.tables[copy], blocks, strict=True)]
    return starts, torch.cat(ids), last


def pools(problem: Problem) -> tuple[torch.Tensor, ...]:
    """Keys and values where they are, as plain tensors."""
    return tuple(pool.as_subclass(torch.Tensor) for pool in (problem.k, problem.v))


def decode(problem: Problem, package: Any, backend: str) -> list[Call]:
    """``BatchDecodeWithPagedKVCacheWrapper``, planned for graphs; with tensor cores if grouped."""
    shape, caches = problem.shape, pools(problem)
    grouped = shape.q_heads > shape.kv_heads
    space = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=DEVICE)
    calls: list[Call] = []
    for copy in range(problem.copies):
        starts, ids, last = pages(problem, copy)
        wrapper = package.BatchDecodeWithPagedKVCacheWrapper(
            space, "NHD", use_cuda_graph=True, use_tensor_cores=grouped, backend=backend,
            paged_kv_indptr_buffer=starts.clone(), paged_kv_indices_buffer=ids.clone(),
            paged_kv_last_page_len_buffer=last.clone(),
        )  # fmt: skip
        wrapper.plan(starts, ids, last, shape.q_heads, shape.kv_heads, shape.dim,
                     shape.block_size, q_data_type=torch.bfloat16,
                     kv_data_type=torch.bfloat16)  # fmt: skip
        calls.append(lambda w=wrapper, c=copy: w.run(problem.q[c], caches, out=problem.out[c]))
    return calls


def prefill(problem: Problem, package: Any, backend: str) -> list[Call]:
    """``BatchPrefillWithPagedKVCacheWrapper``; the one with sinks if the problem has them."""
    shape, caches = problem.shape, pools(problem)
    space = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=DEVICE)
    calls: list[Call] = []
    for copy in range(problem.copies):
        if shape.sinks:
            wrapper = package.BatchAttentionWithAttentionSinkWrapper(
                space, "NHD", backend=backend, head_dim_qk=shape.dim, head_dim_vo=shape.value_dim
            )
            more: tuple[Any, ...] = (problem.sinks, shape.dim**-0.5)
        else:
            wrapper = package.BatchPrefillWithPagedKVCacheWrapper(space, "NHD", backend=backend)
            more = ()
        wrapper.plan(problem.cu_q, *pages(problem, copy), shape.q_heads, shape.kv_heads, shape.dim,
                     shape.block_size, head_dim_vo=shape.value_dim,
                     causal=shape.causal and problem.max_q > 1, q_data_type=torch.bfloat16,
                     kv_data_type=torch.bfloat16)  # fmt: skip
        calls.append(lambda w=wrapper, c=copy, more=more: w.run(
            problem.q[c], caches, *more, out=problem.out[c]))  # fmt: skip
    return calls


def latent(problem: Problem, package: Any, backend: str) -> list[Call]:
    """``BatchMLAPagedAttentionWrapper`` on views of the two parts of a latent."""
    shape, dim = problem.shape, problem.shape.value_dim
    latents = problem.k.as_subclass(torch.Tensor).squeeze(2)
    space = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=DEVICE)
    calls: list[Call] = []
    for copy in range(problem.copies):
        starts, ids, _ = pages(problem, copy)
        wrapper = package.mla.BatchMLAPagedAttentionWrapper(space, backend=backend)
        metadata = package.mla.MLAPlanMetadata.csr(problem.cu_q, starts, ids, problem.lens)
        wrapper.plan(metadata=metadata, num_heads=shape.q_heads, head_dim_ckv=dim,
                     head_dim_kpe=shape.dim - dim, page_size=shape.block_size,
                     causal=problem.max_q > 1, sm_scale=shape.dim**-0.5,
                     q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
                     query_layout="split", kv_cache_layout="split")  # fmt: skip
        q = problem.q[copy]
        calls.append(lambda w=wrapper, q=q, c=copy: w.run(
            query=(q[..., :dim], q[..., dim:]), kv_cache=(latents[..., :dim], latents[..., dim:]),
            out=problem.out[c]))  # fmt: skip
    return calls


def flashinfer(problem: Problem, folders: list[Path], backend: str) -> list[Call] | None:
    """Calls of ``backend`` (fa2, fa3), one a copy, or ``None`` if the problem is not its own."""
    shape = problem.shape
    if shape.stored != "bfloat16" or shape.tree or shape.place != "random" or DEVICE == "cpu":
        return None
    one_token = problem.max_q == 1 and not shape.mla and not shape.sinks
    if backend == "fa3" and (one_token or shape.sinks):
        return None  # one token at a time is what its prefill of 64 rows is not for
    make = latent if shape.mla else decode if one_token else prefill
    return make(problem, load(*folders), backend)
