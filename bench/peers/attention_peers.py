"""Other people's attention on the problems of ``kernels.py``, as far as it is installed.

Each peer takes a ``Problem`` and gives a list of calls, one for each copy of the inputs, that
return ``[T, Hq, Dv]``; or ``None`` if it has nothing for such a problem. What a peer needs and
cannot share (contiguous rows, index lists, workspaces) is made beforehand, off the clock.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flashinfer_peers import flashinfer
from flex_peers import contiguous, flex_attention, on_pages
from kernel_problems import DEVICE, Problem, int32
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Calls = list[Callable[[], torch.Tensor]]
FOLDER: list[Path] = []
"""Where ``fetch_kernels.py`` has put files of peers, and packages may lie; from ``--peers``."""
WITHOUT: list[str] = []
"""First letters of peers that are not asked; from ``--without``."""


def even(problem: Problem) -> bool:
    """Whether all sequences are of one length, and ask as much."""
    shape = problem.shape
    return len(set(shape.lens)) == 1 and len(set(shape.counts)) == 1


def plain(problem: Problem) -> bool:
    """16-bit keys and values, no tree, no latents."""
    shape = problem.shape
    return shape.stored == "bfloat16" and not shape.tree and not shape.mla


def sdpa(problem: Problem, backend: SDPBackend) -> Calls | None:
    """Torch's own kernels on contiguous rows, which is what they take."""
    shape = problem.shape
    batch, queries = len(shape.lens), shape.counts[0]
    causal = shape.causal and queries > 1
    if not plain(problem) or not even(problem) or shape.sinks:
        return None
    if backend == SDPBackend.FLASH_ATTENTION and shape.value_dim != shape.dim:
        raise NotImplementedError("takes equal head dims of keys and values only")
    if causal and queries != shape.lens[0]:  # SDPA aligns is_causal top-left: another question
        return None
    calls: Calls = []
    for copy in range(problem.copies):
        q = problem.q[copy].view(batch, queries, shape.q_heads, shape.dim).transpose(1, 2)
        k, v = (x.view(batch, -1, *x.shape[1:]).transpose(1, 2) for x in problem.contiguous(copy))

        def call(q: Any = q, k: Any = k, v: Any = v) -> torch.Tensor:
            with sdpa_kernel([backend]):
                out = scaled_dot_product_attention(
                    q, k, v, is_causal=causal, enable_gqa=shape.q_heads != shape.kv_heads
                )
            return out.transpose(1, 2).reshape(-1, shape.q_heads, shape.value_dim)

        calls.append(call)
    return calls


def torch_varlen(problem: Problem) -> Calls | None:
    """FlashAttention 2 of torch over contiguous rows of any lengths; causal is bottom-right."""
    shape = problem.shape
    if not plain(problem) or shape.sinks or DEVICE == "cpu":
        return None
    if shape.value_dim != shape.dim:
        raise NotImplementedError("takes equal head dims of keys and values only")
    starts = int32([0, *shape.lens]).cumsum(0, dtype=torch.int32)
    calls: Calls = []
    for copy in range(problem.copies):
        k, v = problem.contiguous(copy)

        def call(q: Any = problem.q[copy], k: Any = k, v: Any = v) -> torch.Tensor:
            return torch.ops.aten._flash_attention_forward(  # noqa: SLF001 - as SDPA calls it
                q, k, v, problem.cu_q, starts, problem.max_q, max(shape.lens), 0.0,
                shape.causal and problem.max_q > 1, False, scale=shape.dim**-0.5,
            )[0]  # fmt: skip

        calls.append(call)
    return calls


def vllm_unified(problem: Problem) -> Calls | None:
    """Triton attention of vLLM on our own pages, with the split workspace of its backend."""
    shape = problem.shape
    if not plain(problem) or not shape.causal or shape.place != "random" or shape.block_size < 16:
        return None
    if shape.value_dim != shape.dim:
        return None
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    segments, threshold = 16, 128 // shape.kv_heads
    padded = 1 << (shape.dim - 1).bit_length()
    part = torch.empty(threshold, shape.q_heads, segments, padded, device=DEVICE)
    top, total = (torch.empty(threshold, shape.q_heads, segments, device=DEVICE) for _ in "ab")
    ones = torch.ones(len(shape.lens), shape.kv_heads, device=DEVICE)
    sinks = {"sinks": problem.sinks.bfloat16()} if shape.sinks else {}

    def call(copy: int) -> torch.Tensor:
        out = problem.out[copy]
        unified_attention(
            q=problem.q[copy], k=problem.k.as_subclass(torch.Tensor),
            v=problem.v.as_subclass(torch.Tensor), out=out, cu_seqlens_q=problem.cu_q,
            max_seqlen_q=problem.max_q, seqused_k=problem.lens, max_seqlen_k=max(shape.lens),
            softmax_scale=shape.dim**-0.5, causal=True, window_size=(-1, -1),
            block_table=problem.tables[copy], softcap=0, q_descale=None, k_descale=ones,
            v_descale=ones, seq_threshold_3D=threshold, num_par_softmax_segments=segments,
            softmax_segm_output=part, softmax_segm_max=top, softmax_segm_expsum=total, **sinks,
        )  # fmt: skip
        return out

    return [lambda copy=copy: call(copy) for copy in range(problem.copies)]


def load_sglang() -> Any:
    """SGLang's decode file alone: the package around it is replaced by what the file asks for."""
    folder = next((path / "sglang" for path in FOLDER if (path / "sglang").is_dir()), None)
    if folder is None:
        raise ImportError("no sglang folder; see bench/peers/fetch_kernels.py")

    class Off:
        def __getattr__(self, _: str) -> Any:
            return types.SimpleNamespace(get=lambda: False)

    no: Callable[..., bool] = lambda *_: False  # noqa: E731
    stubs = {
        "sglang": {}, "sglang.kernels": {}, "sglang.kernels.ops": {}, "sglang.srt": {},
        "sglang.kernels.ops.attention": {"__path__": [str(folder)]},
        "sglang.srt.environ": {"envs": Off()},
        "sglang.srt.utils": {
            "is_hip": no, "is_gfx95_supported": no, "is_gfx1250_supported": no,
            "get_device_core_count": lambda index=0: torch.cuda.get_device_properties(
                index).multi_processor_count,
        },
    }  # fmt: skip
    for name, contents in stubs.items():
        if name not in sys.modules:
            module = types.ModuleType(name)
            vars(module).update({"__path__": [], **contents})
            sys.modules[name] = module
    return importlib.import_module("sglang.kernels.ops.attention.decode_attention")


def sglang_decode(problem: Problem) -> Calls | None:
    """SGLang's Triton decode: pages of one token, its own rule for the number of splits."""
    shape = problem.shape
    if shape.stored != "bfloat16" or shape.tree or problem.max_q > 1:
        return None
    if DEVICE == "cpu":
        return None
    decode = load_sglang().decode_attention_fwd
    batch, most = len(shape.lens), 8
    starts = int32([0, *shape.lens]).cumsum(0, dtype=torch.int32)
    # as its backend does for even batches: enough programs for the card, at most 8
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    tiles = batch * shape.kv_heads * math.ceil(shape.q_heads / shape.kv_heads / 16)
    splits = torch.full((batch,), max(1, min(most, -(-2 * sms // tiles))), device=DEVICE).int()
    logits = torch.empty(batch, shape.q_heads, most, shape.value_dim, device=DEVICE)
    lse = torch.empty(batch, shape.q_heads, most, device=DEVICE)
    sinks = {"sinks": problem.sinks} if shape.sinks else {}
    calls: Calls = []
    for copy in range(problem.copies):
        k, v = problem.contiguous(copy)
        v = k[..., : shape.value_dim] if shape.mla else v
        order = torch.randperm(len(k), device=DEVICE)
        shuffled, indices = torch.empty_like(k), order.int()
        shuffled[order] = k
        values = shuffled[..., : shape.value_dim] if shape.mla else torch.empty_like(v)
        if not shape.mla:
            values[order] = v

        def call(copy: int = copy, k: Any = shuffled, v: Any = values, i: Any = indices) -> Any:
            decode(
                problem.q[copy], k, v, problem.out[copy], starts, i, logits, lse, splits, most,
                shape.dim**-0.5, 1.0, 1.0, has_mla=shape.mla, **sinks,
            )  # fmt: skip
            return problem.out[copy]

        calls.append(call)
    return calls


PEERS: dict[str, Callable[[Problem], Calls | None]] = {
    "torch flash, contiguous": lambda p: sdpa(p, SDPBackend.FLASH_ATTENTION),
    "torch flash varlen, contiguous": torch_varlen,
    "cuDNN, contiguous": lambda p: sdpa(p, SDPBackend.CUDNN_ATTENTION),
    "vLLM Triton": vllm_unified,
    "SGLang Triton": sglang_decode,
    "FlashInfer fa2": lambda p: flashinfer(p, FOLDER, "fa2"),
    "FlashInfer fa3": lambda p: flashinfer(p, FOLDER, "fa3"),
    "FlexAttention": lambda p: flex_attention(p, on_pages),
    "FlexAttention, contiguous": lambda p: flex_attention(p, contiguous),
}


def available() -> dict[str, Callable[[Problem], Calls | None]]:
    """Those that are installed here."""
    needs = {"vLLM Triton": "vllm", "FlashInfer fa2": "flashinfer", "FlashInfer fa3": "flashinfer"}
    found = {name: peer for name, peer in PEERS.items() if not name.startswith(tuple(WITHOUT))}
    for name, package in needs.items():
        if importlib.util.find_spec(package) is None:
            found.pop(name, None)
    if not any((path / "sglang").is_dir() for path in FOLDER):
        found.pop("SGLang Triton", None)
    if DEVICE == "cpu":  # a dry run: these show that the peers' path works
        found = {name: peer for name, peer in found.items() if name.startswith("Flex")}
        return {"torch, contiguous": lambda p: sdpa(p, SDPBackend.MATH)} | found
    return found


def use(folders: list[Path], without: list[str]) -> None:
    """Add folders in which peers lie (``--peers``), and leave those out whose names begin so."""
    FOLDER.extend(folders)
    WITHOUT.extend(without)
    sys.path.extend(str(path) for path in folders)
