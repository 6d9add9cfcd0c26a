"""The parts of the attention backend: what it is given by vLLM, what it makes of it, refusals."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kvcached import kernels
from kvcached.engines.vllm import install
from kvcached.errors import EngineUnsupported, InvalidInput
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


def test_a_call_is_described_once_a_step_for_all_layers_that_are_alike(ours, monkeypatch):
    made = []

    def bind(function, **given):
        made.append(function.__name__)
        return kernels.bind(function, **given)

    monkeypatch.setattr(ours, "bind", bind)
    common, tokens = step_of(*BATCHES["mixed"])
    meta, results = builder_of(ours).build(0, common), []
    q, k = torch.randn(tokens, HEADS, DIM), torch.randn(tokens, KV_HEADS, DIM)
    layers = [({}, 1), ({}, 1), ({"logits_soft_cap": 5.0}, 2), ({"sliding_window": 4}, 3), ({}, 3)]
    for options, kinds in layers:
        *_, layer = cache_of("packed")
        impl = ours.KvcachedAttentionImpl(HEADS, DIM, 1.0, KV_HEADS, **options)
        results.append(impl.forward(None, q, k, k, layer, meta, torch.empty_like(q)))
        assert made.count("attn_with_kvcache") == kinds
    assert made.count("reshape_and_cache") == 1
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[4])
    assert not torch.equal(results[0], results[2])


def test_a_layer_whose_tensors_lie_otherwise_is_described_anew(ours):
    """As a call does on a GPU, where strides are compiled in."""
    seen = []

    class Strict:
        def __init__(self, k_cache):
            self.strides = k_cache.stride()

        def release(self):
            return self

        def __call__(self, *tensors):
            seen.append(tensors[-1].stride())
            if seen[-1] != self.strides:
                raise InvalidInput("strides")

    made = []
    meta = builder_of(ours).build(0, step_of(*BATCHES["decode"])[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "bind", lambda _, **given: made.append(1) or Strict(given["k_cache"]))
        for cache in (torch.ones(2, 3), torch.ones(2, 3), torch.ones(3, 2).T):
            meta.call("attend", None, {"k_cache": cache})
    assert (len(made), seen) == (2, [(3, 1), (3, 1), (1, 2), (1, 2)])
    with pytest.raises(InvalidInput, match="value"):
        meta.call("write", kernels.reshape_and_cache, {
            "key": torch.ones(1, 1, 8), "value": torch.ones(1, 2, 8),
            "slot_mapping": torch.zeros(1, dtype=torch.int32),
            "k_cache": torch.ones(1, 1, 1, 8), "v_cache": torch.ones(1, 1, 1, 8)})  # fmt: skip


class APlan:
    """What ``plan_attention`` was asked for, and the updates."""

    def __init__(self, *given, device, window_size, max_q=1):
        if max_q > 8:
            raise InvalidInput("no tile holds them")
        self.given, self.window, self.shape = given, window_size, {"max_q": max_q}
        self.updates = []

    def update(self, lens, starts):
        self.updates.append((lens, starts))


def layer_of(impl):
    """A layer of a model, as vLLM finds it."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    class Layer(AttentionLayerBase):
        def get_attn_backend(self): ...

        def get_kv_cache_spec(self, vllm_config): ...

    layer = Layer()
    layer.impl = impl
    return layer


@pytest.mark.parametrize(("drafts", "most"), [(0, 1), (4, 5), (9, 1)])
def test_a_plan_for_each_kind_of_layer_follows_decodes_and_drafts(ours, drafts, most, monkeypatch):
    monkeypatch.setitem(vars(kernels), "plan_attention", APlan)
    spec = SimpleNamespace(num_speculative_tokens=drafts) if drafts else None
    config = SimpleNamespace(
        speculative_config=spec, scheduler_config=SimpleNamespace(max_num_seqs=16,
                                                                  max_num_batched_tokens=64),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=24),
        model_config=SimpleNamespace(max_model_len=80),
    )  # fmt: skip
    layers = [ours.KvcachedAttentionImpl(HEADS, DIM, 1.0, KV_HEADS, sliding_window=window)
              for window in (None, 12, None)]  # fmt: skip
    forward = {name: layer_of(impl) for name, impl in zip("abc", layers, strict=True)}
    config.compilation_config.static_forward_context = forward
    spec = SimpleNamespace(dtype=torch.bfloat16)
    builder = ours.KvcachedMetadataBuilder(spec, list(forward), config, "cuda:0")
    few, plans = builder._plans = builder._make_plans()
    assert [plan.window for plan in plans.values()] == [(-1, -1), (11, -1)]
    for some, batch in ((few, 2), (plans, 24)):
        assert {plan.given for plan in some.values()} == {(batch, 80, HEADS, KV_HEADS, DIM,
                                                           torch.bfloat16)}  # fmt: skip
        assert {plan.shape["max_q"] for plan in some.values()} == {most}
    decode, prompts = (step_of(*BATCHES[name])[0] for name in ("decode", "prefill"))
    meta = builder.build(0, decode)
    assert meta.plans is plans
    builder.build(0, step_of([9] * 5, [33] * 5)[0])
    assert builder.build(0, prompts).plans is few, "two sequences"
    assert not any(plan.updates for plan in few.values())
    for layer in layers:
        ((lens, starts),) = meta.plans[layer.plan_key].updates
        assert lens is decode.seq_lens
        assert (starts is decode.query_start_loc) is (most > 1)
    assert builder.build_for_cudagraph_capture(decode) in builder._captured


def test_prompts_are_cut_by_the_columns_that_they_use_and_decodes_by_all(ours):
    prompts, decode = (step_of(*BATCHES[name])[0] for name in ("prefill", "decode"))
    meta = builder_of(ours).build(0, prompts)  # of 33 and 7 tokens
    assert [meta.table(size).shape[1] for size in (16, 64, 16)] == [3, 1, 3]
    assert meta.table(16) is meta.table(16)
    assert builder_of(ours).build(0, decode).table(16) is decode.block_table_tensor


def test_sinks_are_read_again_when_weights_were_loaded(ours):
    sinks = torch.zeros(HEADS, dtype=torch.bfloat16)
    impl = ours.KvcachedAttentionImpl(HEADS, DIM, 1.0, KV_HEADS, sinks=sinks)
    sinks.fill_(3)
    impl.process_weights_after_loading(torch.bfloat16)
    assert impl._per_head["sinks"].tolist() == [3.0] * HEADS
    assert impl._per_head["sinks"].dtype == torch.float32


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
