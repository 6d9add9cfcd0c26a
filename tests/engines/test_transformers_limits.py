"""What the transformers engine refuses, by name and in time; and on which device a cache lies."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_model, padded

from kvcached import CacheSpec, KVCache
from kvcached.engines.transformers import ElasticCache, PackedCache
from kvcached.errors import ClosedError, EngineUnsupported, InvalidInput

GREEDY = {"max_new_tokens": 24, "do_sample": False}
pytestmark = pytest.mark.usefixtures("one_thread", "no_broker")


def test_out_of_memory_is_a_memory_error_and_reset_mends_it(pair):
    stock, elastic = pair
    with ElasticCache(elastic.config, limit="64KiB") as cache:
        with pytest.raises(MemoryError, match="KV10"):
            elastic(**padded([400, 400]), past_key_values=cache)
        cache.reset()
        batch = padded([9])
        ours = elastic.generate(**batch, **GREEDY, past_key_values=cache)
        assert torch.equal(ours, stock.generate(**batch, **GREEDY))


def test_another_attention_is_refused(pair):
    with (
        ElasticCache(pair[0].config) as cache,
        pytest.raises(EngineUnsupported, match=r"(?s)'sdpa'.*attn_implementation='kvcached'"),
    ):
        pair[0](**padded([4]), past_key_values=cache)


def test_features_that_pages_cannot_do_are_refused_by_name(pair, cache):
    elastic = pair[1]
    batch = padded([9])
    elastic(**batch, past_key_values=cache)
    with pytest.raises(EngineUnsupported, match="cropped"):
        cache.crop(-1)
    with pytest.raises(EngineUnsupported, match="output attentions"):
        elastic(**padded([2]), past_key_values=cache, output_attentions=True)
    cache.reset()
    elastic.train()
    try:
        elastic.model.layers[0].self_attn.attention_dropout = 0.5
        with pytest.raises(EngineUnsupported, match="dropout"):
            elastic(**batch, past_key_values=cache)
    finally:
        elastic.eval()
        elastic.model.layers[0].self_attn.attention_dropout = 0.0


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("qwen3_next", "linear_attention"),
        ("llama4_text", "chunked_attention"),
        ("deepseek_v3", "latent attention"),
    ],
)
def test_models_that_keep_something_else_are_refused(kind, what):
    from transformers import AutoConfig

    with pytest.raises(EngineUnsupported, match=what):
        ElasticCache(AutoConfig.for_model(kind))


def test_a_model_that_changes_keys_after_the_cache_is_found_out(pair, cache, monkeypatch):
    update = PackedCache.update
    monkeypatch.setattr(
        ElasticCache, "update", lambda *a, **k: tuple(x.clone() for x in update(*a))
    )
    with pytest.raises(EngineUnsupported, match="LlamaAttention changes keys"):
        pair[1](**padded([4]), past_key_values=cache)
    pair[1](**padded([4]))


def test_softcap_and_sinks_without_an_elastic_cache_are_refused():
    model = make_model("gemma2", "kvcached", attn_logit_softcapping=2.0)
    with pytest.raises(EngineUnsupported, match="softcap"):
        model(**padded([4]))


def test_a_mask_that_forgets_tokens_is_refused(pair, cache):
    batch = padded([6])
    pair[1](**batch, past_key_values=cache)
    mask = torch.ones(1, 7, dtype=torch.long)
    mask[0, 2] = 0
    with pytest.raises(InvalidInput, match="hold"):
        pair[1](batch["input_ids"][:, :1], attention_mask=mask, past_key_values=cache)


def test_another_batch_size_is_refused(pair, cache):
    pair[1](**padded([6]), past_key_values=cache)
    with pytest.raises(InvalidInput, match="2 rows"):
        pair[1](padded([1, 1])["input_ids"], past_key_values=cache)


def test_a_closed_cache_says_so(pair, cache):
    cache.close()
    cache.close()
    with pytest.raises(ClosedError):
        pair[1](**padded([3]), past_key_values=cache)
    pair[1](**padded([3]))  # the refused call has left nothing behind that this one falls over


def test_a_batch_that_does_not_continue_what_the_cache_holds_is_refused(pair, cache):
    batch = padded([5, 20])
    pair[1](**batch, past_key_values=cache)
    with pytest.raises(InvalidInput, match=r"(?s)was given 20 and 20 more come.*reset\(\)"):
        pair[1](**batch, past_key_values=cache)
    cache.reset()
    pair[1](**batch, past_key_values=cache)


# --- devices ----------------------------------------------------------------------------------


def test_a_cache_lies_where_the_model_computes(pair):
    with ElasticCache(pair[1].config, device="cpu") as cache:
        pair[1](**padded([4]), past_key_values=cache)
        assert cache.cache.backend.device == "cpu"


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("meta")])
def test_a_cache_on_another_device_than_the_model_is_refused(pair, device):
    with (
        ElasticCache(pair[1].config, device=device) as cache,
        pytest.raises(InvalidInput, match=r"(?s)computes on cpu.*Leave out device="),
    ):
        pair[1](**padded([4]), past_key_values=cache)


def test_a_device_that_is_none_is_refused(pair):
    with ElasticCache(pair[1].config, device="here") as cache, pytest.raises(InvalidInput):
        pair[1](**padded([4]), past_key_values=cache)


def test_a_layer_on_another_device_or_of_another_dtype_is_refused_before_it_takes_slots(pair):
    spec = CacheSpec.from_hf(pair[1].config, dtype="float32")
    away = make_model(attention="kvcached").to("meta")
    half = make_model(attention="kvcached").half()
    with KVCache(spec, device="cpu", name="mine", max_tokens=4096, limit="16MiB") as mine:
        cache = ElasticCache(pair[1].config, cache=mine)
        with pytest.raises(EngineUnsupported, match="layer 0 computes in float32 on meta"):
            away(padded([4])["input_ids"].to("meta"), past_key_values=cache)
        with pytest.raises(EngineUnsupported, match=r"float16 on cpu.*float32 on cpu"):
            half(**padded([4]), past_key_values=cache)
        assert mine.stats().blocks_in_use == 0
        pair[1](**padded([4]), past_key_values=cache)
