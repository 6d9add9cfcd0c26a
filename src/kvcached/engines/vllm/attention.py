"""Our attention kernels as a backend of vLLM: ``--attention-backend CUSTOM``.

Decode, prefill and both in one batch, over blocks of any strides: so blocks that hold all layers
are read where they lie. Imported by vLLM alone, in a process that has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.v1.attention import backend as base

from kvcached.errors import EngineUnsupported, InvalidInput
from kvcached.kernels import attn_with_kvcache, bind, reshape_and_cache
from kvcached.layout import cdiv

if TYPE_CHECKING:
    from kvcached.kernels import BoundCall, Plan

_MOST_HEAD_DIM = 256
_BLOCK_STEP = 16
_CAPABILITY = (8, 0)
"""The oldest GPUs whose tensor cores multiply bfloat16."""
_FEW = 2
"""Sequences that are cut into equal parts, without a kernel that finds out how long they are. On an
H100 (24 heads, 8 of KV, 128 wide) two of 600 tokens took 6.7 us so and 9.3 with it, one of 3500 and
one of 500 12.3 and 13.6, but eight of 50 to 3500 33 and 15."""


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
    max_seq_len: int
    """No sequence is longer. To capture, vLLM names the most that there may be."""
    plans: dict[Any, Plan]
    """By ``KvcachedAttentionImpl.plan_key``: memory for parts, and how sequences are cut."""
    calls: dict[Any, BoundCall] = field(default_factory=dict)
    """Checked and described for the first layer; the others differ from it in addresses only."""
    tables: dict[int, torch.Tensor] = field(default_factory=dict)

    def table(self, block_size: int) -> torch.Tensor:
        """The block table; of prompts its used columns: how one is cut follows from its width."""
        if self.max_query_len == 1:  # of one shape, whatever is captured
            return self.block_table
        found = self.tables.get(block_size)
        if found is None:
            columns = max(1, cdiv(self.max_seq_len, block_size))
            found = self.tables[block_size] = self.block_table[:, :columns]
        return found

    def call(
        self, key: Any, function: Callable[..., Any], tensors: dict[str, torch.Tensor],
        **options: Any,
    ) -> None:  # fmt: skip
        """``function(**tensors, **options)``; calls of one ``key`` have the same ``options``."""
        made = self.calls.get(key)
        if made is not None:
            try:
                made(*tensors.values())
            except InvalidInput:  # the tensors of this layer lie otherwise
                made = None
        if made is None:
            made = self.calls[key] = bind(function, **tensors, **options).release()
            made(*tensors.values())


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
        self._written = 0
        self._plans: tuple[dict[Any, Plan], dict[Any, Plan]] | None = None
        self._captured: list[KvcachedMetadata] = []

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
        most, starts = int(common.max_query_len), common.query_start_loc
        if self._plans is None:  # now the layers are there
            self._plans = self._make_plans()
        few, many = self._plans
        for plan in many.values():
            if batch > _FEW and most <= plan.shape["max_q"]:
                plan.update(common.seq_lens, starts if plan.shape["max_q"] > 1 else None)
        return KvcachedMetadata(
            num_actual_tokens=tokens,
            max_query_len=most,
            query_start_loc=None if most == 1 and tokens == batch else starts,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            max_seq_len=int(common.max_seq_len),
            slots=self._narrow(common.slot_mapping[:tokens]),
            plans=many if batch > _FEW else few,
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> KvcachedMetadata:
        """See vLLM. What a graph writes to lives as long as the graph."""
        made = self.build(0, common_attn_metadata)
        self._captured.append(made)
        return made

    def _make_plans(self) -> tuple[dict[Any, Plan], dict[Any, Plan]]:
        """For the layers of this group, for few sequences and for more. None on the CPU."""
        if torch.device(self.device).type != "cuda":
            return {}, {}
        from vllm.config import get_layers_from_vllm_config
        from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

        found = get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase, self.layer_names)
        layers = [layer.impl for layer in found.values()]
        scheduler, compilation = (
            self.vllm_config.scheduler_config, self.vllm_config.compilation_config
        )  # fmt: skip
        most = max(scheduler.max_num_seqs, compilation.max_cudagraph_capture_size or 0)
        few, many = (
            plans_of(layers, batch, self.vllm_config, self.kv_cache_spec.dtype, self.device)
            for batch in (_FEW, max(_FEW + 1, most))
        )
        return few, many

    def _narrow(self, slots: torch.Tensor) -> torch.Tensor:
        """``slots``, int64, as int32 in a place that captured graphs may go on reading.

        A graph may have been captured for more tokens than a step has: those write nowhere.
        """
        if self._slots is None:
            most = self.vllm_config.scheduler_config.max_num_batched_tokens
            self._slots = torch.full((most,), -1, dtype=torch.int32, device=slots.device)
        count = len(slots)
        if count > len(self._slots):  # only ever outside of a graph
            return slots.to(torch.int32)
        if count < self._written:
            self._slots[count : self._written].fill_(-1)
        self._written = count
        return self._slots[:count].copy_(slots)


def plans_of(
    layers: Iterable[KvcachedAttentionImpl], batch: int, vllm_config: Any, dtype: torch.dtype,
    device: Any,
) -> dict[Any, Plan]:  # fmt: skip
    """A plan for each kind of ``layers`` and up to ``batch`` sequences.

    For decodes, and for drafts to verify if they fit a tile. Made before any graph is captured, so
    capturing allocates nothing.
    """
    from kvcached.kernels import plan_attention  # needs Triton

    drafts = getattr(vllm_config.speculative_config, "num_speculative_tokens", 0) or 0
    longest = vllm_config.model_config.max_model_len
    plans: dict[Any, Plan] = {}
    for layer in layers:
        if layer.plan_key in plans:
            continue
        heads, kv_heads, dim, left = layer.plan_key
        given = batch, longest, heads, kv_heads, dim, dtype
        more = {"device": device, "window_size": (left, -1)}
        try:
            plans[layer.plan_key] = plan_attention(*given, max_q=1 + drafts, **more)
        except InvalidInput:
            plans[layer.plan_key] = plan_attention(*given, **more)
    return plans


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
        self._per_head: dict[str, torch.Tensor] = {}
        self.plan_key = num_heads, self.num_kv_heads, head_size, self.window[0]
        """What a plan is made for."""
        self._kind = (self.plan_key, self.scale, self.softcap, sinks is None, alibi_slopes is None)
        self._gather_per_head()

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """See vLLM: once the weights are there, and again when others are loaded."""
        del act_dtype
        self._gather_per_head()

    def _gather_per_head(self) -> None:
        """Sinks are weights, perhaps in 16 bits; the kernels read float32."""
        found = {"sinks": self.sinks, "alibi_slopes": self.alibi_slopes}
        self._per_head = {name: x.detach().float() for name, x in found.items() if x is not None}

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
        caches = dict(zip(("k_cache", "v_cache"), self._split(kv_cache), strict=True))
        if self.writes and key is not None:
            rows = {"key": key[:tokens], "value": value[:tokens], "slot_mapping": meta.slots}
            meta.call(reshape_and_cache, reshape_and_cache, rows | caches)
        given = {"q": query[:tokens], "out": output[:tokens], "cache_seqlens": meta.seq_lens,
                 "page_table": meta.table(caches["k_cache"].shape[1]), **caches,
                 **self._per_head}  # fmt: skip
        meta.call(
            self._kind, attn_with_kvcache, given, cu_seqlens_q=meta.query_start_loc,
            max_seqlen_q=meta.max_query_len, softmax_scale=self.scale, window_size=self.window,
            softcap=self.softcap, plan=meta.plans.get(self.plan_key),
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
