"""Our attention kernels as a backend of vLLM: ``--attention-backend CUSTOM``.

Decode, prefill and both in one batch, over blocks of any strides: so blocks that hold all layers
are read where they lie. Imported by vLLM alone, in a process that has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.v1.attention import backend as base

from kvcached.errors import EngineUnsupported
from kvcached.kernels import attn_with_kvcache, reshape_and_cache

_MOST_HEAD_DIM = 256
_BLOCK_STEP = 16
_CAPABILITY = (8, 0)
"""The oldest GPUs whose tensor cores multiply bfloat16."""


@dataclass
class KvcachedMetadata:
    """What all layers of a group share in one step; tensors are int32 on the device."""

    num_actual_tokens: int
    """Query tokens, without what pads a captured graph."""
    max_query_len: int
    query_start_loc: torch.Tensor | None
    """``[B + 1]``; ``None`` if each sequence has one query token."""
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slots: torch.Tensor
    """Slot of each query token, -1: not to be written."""


class KvcachedMetadataBuilder(base.AttentionMetadataBuilder):
    """Makes ``KvcachedMetadata`` of vLLM's own, once a step and group.

    Captured graphs are replayed for batches of one query length each, such as decodes: how many
    programs a launch has follows from that length, so a mixed batch would need the largest.
    """

    _cudagraph_support: ClassVar[Any] = base.AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._slots: torch.Tensor | None = None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: Any,
        fast_build: bool = False,  # noqa: FBT001, FBT002 - vLLM's signature
    ) -> KvcachedMetadata:
        """See vLLM. A shared prefix is not treated apart."""
        del common_prefix_len, fast_build
        common = common_attn_metadata
        if common.causal is not True:
            raise EngineUnsupported("the backend CUSTOM of kvcached is for causal attention only")
        tokens, batch = common.num_actual_tokens, common.num_reqs
        single = common.max_query_len == 1 and tokens == batch
        return KvcachedMetadata(
            num_actual_tokens=tokens,
            max_query_len=int(common.max_query_len),
            query_start_loc=None if single else common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slots=self._narrow(common.slot_mapping[:tokens]),
        )

    def _narrow(self, slots: torch.Tensor) -> torch.Tensor:
        """``slots``, int64, as int32 in a place that captured graphs may go on reading.

        A graph may have been captured for more tokens than a step has: those write nowhere.
        """
        if self._slots is None:
            most = self.vllm_config.scheduler_config.max_num_batched_tokens
            self._slots = torch.empty(most, dtype=torch.int32, device=slots.device)
        if len(slots) > len(self._slots):  # only ever outside of a graph
            return slots.to(torch.int32)
        self._slots[len(slots) :].fill_(-1)
        return self._slots[: len(slots)].copy_(slots)


class KvcachedAttentionImpl(base.AttentionImpl):
    """One layer. Raises ``EngineUnsupported`` for what the kernels do not do."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = base.AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **more: Any,
    ) -> None:
        unknown = sorted(name for name, value in more.items() if not _says_no(value))
        if attn_type != base.AttentionType.DECODER or unknown:
            what = ", ".join(unknown) or f"attention of the type {attn_type}"
            raise EngineUnsupported(f"the backend CUSTOM of kvcached does not know {what}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype, self.sinks = kv_cache_dtype, sinks
        self.alibi_slopes = (
            None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        )
        self.window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
        self.softcap = logits_soft_cap or 0.0
        self.writes = kv_sharing_target_layer_name is None
        self._halves: tuple[Any, Any, Any] = (None, None, None)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: KvcachedMetadata | None,
        output: torch.Tensor,
        output_scale: Any = None,
        output_block_scale: Any = None,
    ) -> torch.Tensor:
        """Write the new keys and values, and attend; see vLLM for the shapes."""
        del layer
        if output_scale is not None or output_block_scale is not None:
            raise EngineUnsupported("the backend CUSTOM of kvcached does not quantise its output")
        if attn_metadata is None:  # vLLM tries the model out, without a cache
            return output.fill_(0)
        meta, tokens = attn_metadata, attn_metadata.num_actual_tokens
        keys, values = self._split(kv_cache)
        if self.writes and key is not None:
            reshape_and_cache(key[:tokens], value[:tokens], keys, values, meta.slots)
        attn_with_kvcache(
            query[:tokens], keys, values, cache_seqlens=meta.seq_lens,
            page_table=meta.block_table, cu_seqlens_q=meta.query_start_loc,
            max_seqlen_q=meta.max_query_len, softmax_scale=self.scale, window_size=self.window,
            softcap=self.softcap, alibi_slopes=self.alibi_slopes, sinks=self.sinks,
            out=output[:tokens],
        )  # fmt: skip
        return output

    def _split(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as ``[blocks, slots, heads, dim]``; made once, since views cost time."""
        seen, keys, values = self._halves
        if seen is not kv_cache:
            keys, values = split_cache(kv_cache, self.head_size)
            self._halves = kv_cache, keys, values
        return keys, values


def _says_no(value: Any) -> bool:
    """Whether an option is off: ``None``, ``False`` or -1, as vLLM's own defaults are."""
    return value is None or value is False or (isinstance(value, int) and value == -1)


def split_cache(kv_cache: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of vLLM's view of a layer, as ``[blocks, slots, heads, dim]``.

    To 0.24 that view is ``[blocks, 2, slots, heads, dim]``, later ``[blocks, heads, slots, 2 *
    dim]``; strides are arbitrary in both.
    """
    if kv_cache.dim() == 5:
        return kv_cache[:, 0], kv_cache[:, 1]
    keys, values = kv_cache.transpose(1, 2).split(head_size, dim=-1)
    return keys, values


class KvcachedAttentionBackend(base.AttentionBackend):
    """What vLLM asks of a backend before it takes it. What is not listed is refused by vLLM."""

    supported_dtypes: ClassVar[list[Any]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        """As users choose it, and as it is looked up again."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[KvcachedAttentionImpl]:
        """The layer."""
        return KvcachedAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[KvcachedMetadataBuilder]:
        """The builder of metadata."""
        return KvcachedMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Tokens of a block: any, but vLLM takes the smallest that it is told."""
        del kv_cache_spec
        return [base.MultipleOf(_BLOCK_STEP)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Up to what fits in shared memory with its pipeline."""
        return 0 < head_size <= _MOST_HEAD_DIM and head_size % 8 == 0

    @classmethod
    def supports_sink(cls) -> bool:
        """Learnt sinks (gpt-oss)."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Asked from 0.32 on; before, each backend was taken to do it."""
        return True

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """Ampere and later."""
        return (capability.major, capability.minor) >= _CAPABILITY

    @classmethod
    def supports_combination(
        cls, head_size: int, dtype: Any, kv_cache_dtype: Any, *args: Any, **more: Any
    ) -> str | None:
        """Keys and values are not converted."""
        del head_size, args, more
        if kv_cache_dtype in {None, "auto", str(dtype).removeprefix("torch.")}:
            return None
        return f"a cache of {kv_cache_dtype} under a model of {dtype}"

    # --- to 0.24 -----------------------------------------------------------------------------

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """Of the view of a layer."""
        del cache_dtype_str
        return num_blocks, 2, block_size, num_kv_heads, head_size

    @staticmethod
    def get_kv_cache_stride_order(
        include_num_layers_dimension: bool = False,  # noqa: FBT001, FBT002 - vLLM's signature
    ) -> tuple[int, ...]:
        """Token by token (NHD), and with all layers the block comes first."""
        return (1, 0, 2, 3, 4, 5) if include_num_layers_dimension else (0, 1, 2, 3, 4)

    @classmethod
    def get_required_kv_cache_layout(cls) -> str:
        """As above, whatever the environment says."""
        return "NHD"
