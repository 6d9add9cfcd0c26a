"""The parts of the attention backend: what it is given by vLLM, what it makes of it, refusals."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kvcached.engines.vllm import install
from kvcached.errors import EngineUnsupported
from kvcached.kernels import reference

pytestmark = pytest.mark.vllm
BLOCKS, SIZE, HEADS, KV_HEADS, DIM = 40, 16, 6, 2, 32
BATCHES = {  # context before, and query tokens, of each sequence
    "decode": ([5, 40, 16], [1, 1, 1]),
    "prefill": ([0, 0], [33, 7]),
    "mixed": ([20, 0, 63, 17], [1, 18, 1, 6]),
}


@pytest.fixture(scope="module")
def ours():
    from kvcached.engines.vllm import attention

    return attention


def cache_of(view):
    """Keys and values as ours, and as the layer's view of 0.24 or of later releases."""
    torch.manual_seed(3)
    if view == "packed":  # a block of all layers: this is layer 1 of 3
        raw = torch.randn(BLOCKS, 3, 2, SIZE, KV_HEADS, DIM)
        layer = raw[:, 1]
        return layer[:, 0], layer[:, 1], layer
    raw = torch.randn(BLOCKS, SIZE, KV_HEADS, 2 * DIM) if view == "tokens" else torch.randn(
        BLOCKS, KV_HEADS, SIZE, 2 * DIM).transpose(1, 2)  # fmt: skip
    return raw[..., :DIM], raw[..., DIM:], raw.transpose(1, 2)


def step_of(before, queries):
    """``CommonAttentionMetadata`` of a step, and the number of its tokens."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    lens = torch.tensor([b + q for b, q in zip(before, queries, strict=True)], dtype=torch.int32)
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    table = (torch.randperm(BLOCKS - 1) + 1)[: len(lens) * 5].view(len(lens), 5).to(torch.int32)
    slots = torch.cat([
        table[i, pos // SIZE].long() * SIZE + pos % SIZE
        for i, (b, q) in enumerate(zip(before, queries, strict=True))
        for pos in [torch.arange(b, b + q)]
    ])  # fmt: skip
    padded = torch.cat([slots, torch.full((9,), -1)])
    return CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lens, num_reqs=len(lens),
        num_actual_tokens=len(slots), max_query_len=max(queries), max_seq_len=int(lens.max()),
        block_table_tensor=table, slot_mapping=padded,
    ), len(slots)  # fmt: skip


def builder_of(ours, most=64):
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=most))
    return ours.KvcachedMetadataBuilder(None, [], config, torch.device("cpu"))


@pytest.mark.parametrize("view", ["packed", "tokens", "heads"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    "options",
    [{}, {"sliding_window": 12}, {"logits_soft_cap": 5.0},
     {"alibi_slopes": [0.5, 0.25, 0.125, 0.1, 0.05, 0.01]}, {"sinks": torch.randn(HEADS)}],
    ids=["plain", "window", "softcap", "alibi", "sinks"],
)  # fmt: skip
def test_a_step_writes_and_attends_as_the_reference_does(ours, view, batch, options):
    keys, values, layer = cache_of(view)
    common, tokens = step_of(*BATCHES[batch])
    meta = builder_of(ours).build(0, common)
    impl = ours.KvcachedAttentionImpl(HEADS, DIM, DIM**-0.5, KV_HEADS, **options)
    q, k, v = (torch.randn(tokens + 9, n, DIM) for n in (HEADS, KV_HEADS, KV_HEADS))
    out = torch.full_like(q, 7.0)
    assert impl.forward(None, q, k, v, layer, meta, out) is out
    slots = common.slot_mapping[:tokens]
    assert torch.equal(keys[slots // SIZE, slots % SIZE], k[:tokens])
    assert torch.equal(values[slots // SIZE, slots % SIZE], v[:tokens])
    window = options.get("sliding_window")
    slopes = options.get("alibi_slopes")
    expected, _ = reference.attn_with_kvcache(
        q[:tokens], keys, values, cache_seqlens=common.seq_lens,
        page_table=common.block_table_tensor, cu_seqlens_q=common.query_start_loc,
        max_seqlen_q=common.max_query_len, softmax_scale=DIM**-0.5,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=options.get("logits_soft_cap", 0.0), sinks=options.get("sinks"),
        alibi_slopes=None if slopes is None else torch.tensor(slopes),
    )  # fmt: skip
    torch.testing.assert_close(out[:tokens], expected.float(), rtol=1e-5, atol=1e-5)
    assert (out[tokens:] == 7.0).all(), "what pads a step is not written"


def test_layers_that_share_the_cache_of_another_do_not_write(ours):
    keys, _, layer = cache_of("packed")
    before = keys.clone()
    common, tokens = step_of(*BATCHES["decode"])
    impl = ours.KvcachedAttentionImpl(HEADS, DIM, 1.0, KV_HEADS,
                                      kv_sharing_target_layer_name="model.layers.0")  # fmt: skip
    q, k = torch.randn(tokens, HEADS, DIM), torch.randn(tokens, KV_HEADS, DIM)
    impl.forward(None, q, k, k, layer, builder_of(ours).build(0, common), torch.empty_like(q))
    assert torch.equal(keys, before)


def test_slots_lie_where_a_captured_graph_reads_them_again(ours):
    builder = builder_of(ours)
    common, _ = step_of(*BATCHES["decode"])
    first = builder.build(0, common)
    common.slot_mapping = common.slot_mapping + 1
    second = builder.build(0, common)
    assert first.slots.data_ptr() == second.slots.data_ptr()
    assert torch.equal(first.slots, common.slot_mapping[:3].int())
    assert second.query_start_loc is None, "one token each"
    mixed, tokens = step_of(*BATCHES["mixed"])
    longer = builder.build(0, mixed)
    assert longer.query_start_loc is mixed.query_start_loc
    builder.build(0, common)
    assert (longer.slots[3:tokens] == -1).all(), "a graph of more tokens would write to old slots"
    assert torch.equal(
        builder_of(ours, most=2).build(0, mixed).slots, mixed.slot_mapping[:26].int()
    )


@pytest.fixture
def registry():
    """vLLM's, as it was afterwards."""
    from vllm.v1.attention.backends import registry

    kept = dict(registry._ATTN_OVERRIDES)
    registry._ATTN_OVERRIDES.clear()
    yield registry
    registry._ATTN_OVERRIDES.clear()
    registry._ATTN_OVERRIDES.update(kept)


def config_of(backend):
    return SimpleNamespace(attention_config=SimpleNamespace(backend=backend))


def test_it_is_offered_as_custom_and_on_the_cpu_taken_where_it_was_chosen(ours, registry):
    kinds = registry.AttentionBackendEnum
    install._offer_attention()
    assert kinds.CUSTOM.get_class() is ours.KvcachedAttentionBackend
    for other in (None, kinds.CPU_ATTN, kinds.FLASH_ATTN):
        install._attend_on_cpu(config_of(other))
        assert not kinds.CPU_ATTN.is_overridden()
    install._attend_on_cpu(config_of(kinds.CUSTOM))
    assert kinds.CPU_ATTN.get_class() is ours.KvcachedAttentionBackend


def test_another_plug_in_keeps_custom(registry):
    kinds = registry.AttentionBackendEnum
    registry.register_backend(kinds.CUSTOM, "another.Backend")
    install._offer_attention()
    install._attend_on_cpu(config_of(kinds.CUSTOM))
    assert kinds.CUSTOM.get_path() == "another.Backend"
    assert not kinds.CPU_ATTN.is_overridden()


def test_what_it_cannot_do_is_refused(ours):
    common, _ = step_of(*BATCHES["decode"])
    common.causal = False
    with pytest.raises(EngineUnsupported, match="causal"):
        builder_of(ours).build(0, common)
    with pytest.raises(EngineUnsupported, match="use_alibi_sqrt"):
        ours.KvcachedAttentionImpl(HEADS, DIM, 1.0, KV_HEADS, use_alibi_sqrt=True)
    with pytest.raises(EngineUnsupported, match="know lists, tensors"):
        ours.KvcachedAttentionImpl(HEADS, DIM, 1.0, KV_HEADS, tensors=torch.ones(2), lists=[1])
    with pytest.raises(EngineUnsupported, match="encoder"):
        ours.KvcachedAttentionImpl(HEADS, DIM, 1.0, KV_HEADS, attn_type="encoder_only")
    impl = ours.KvcachedAttentionImpl(HEADS, DIM, 1.0, KV_HEADS, chunk_lookback=-1)
    with pytest.raises(EngineUnsupported, match="quantise"):
        impl.forward(None, None, None, None, None, None, None, output_scale=torch.ones(1))
    out = torch.ones(2, HEADS, DIM)
    assert not impl.forward(None, None, None, None, None, None, out).any(), "vLLM's trial run"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, []),
        ({"kv_cache_dtype": "bfloat16"}, []),
        ({"has_sink": True}, []),
        ({"has_sliding_window": True}, []),
        ({"head_size": 512}, ["head_size not supported"]),
        ({"kv_cache_dtype": "fp8"}, ["kv_cache_dtype not supported"]),
        ({"kv_cache_dtype": "float16"}, ["a cache of float16 under a model of torch.bfloat16"]),
        ({"block_size": 8}, ["block_size not supported"]),
        ({"use_mla": True}, ["MLA not supported"]),
        ({"use_non_causal": True}, ["non-causal attention not supported"]),
        ({"use_batch_invariant": True}, ["batch invariance not supported"]),
        ({"device_capability": (7, 5)}, ["compute capability not supported"]),
    ],
)
def test_vllm_asks_before_it_takes_it(ours, change, why):
    from vllm.platforms.interface import DeviceCapability

    asked = {
        "head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 16,
        "use_mla": False, "has_sink": False, "use_sparse": False, "use_mm_prefix": False,
        "use_per_head_quant_scales": False, "attn_type": "decoder", "device_capability": (9, 0),
    } | change  # fmt: skip
    asked["device_capability"] = DeviceCapability(*asked["device_capability"])
    reasons = ours.KvcachedAttentionBackend.validate_configuration(**asked)
    assert reasons[: len(why)] == why
    assert bool(reasons) is bool(why)
