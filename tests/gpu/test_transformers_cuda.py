"""The transformers engine on a GPU: the same tokens as stock attention, in float32."""

from __future__ import annotations

import os
import warnings

import pytest
import torch

pytest.importorskip("transformers")
from tiny_models import make_model, make_pair, padded

from kvcached import CacheSpec, KVCache
from kvcached.engines.transformers import ElasticCache
from kvcached.errors import EngineUnsupported, InvalidInput

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]  # Triton compiles at first use
LENGTHS = [5, 33, 16, 1, 47, 17, 2, 30]
GREEDY = {"max_new_tokens": 32, "do_sample": False}


@pytest.fixture(autouse=True)
def _without_a_broker():
    os.environ["KVCACHED_BROKER"] = "0"


@pytest.fixture(scope="module")
def pair():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.set_float32_matmul_precision("highest")
    return tuple(model.to("cuda") for model in make_pair())


@pytest.fixture
def cache(pair):
    with ElasticCache(pair[1].config, limit="256MiB") as cache:
        yield cache


def _batch(lengths, **options):
    return {name: tensor.cuda() for name, tensor in padded(lengths, **options).items()}


def test_eight_prompts_of_32_tokens_are_those_of_stock(pair, cache):
    stock, elastic = pair
    batch = _batch(LENGTHS)
    ours = elastic.generate(**batch, **GREEDY, past_key_values=cache)
    assert torch.equal(ours, stock.generate(**batch, **GREEDY))
    assert cache.cache.backend.device == f"cuda:{torch.cuda.current_device()}"
    cache.check()


def test_logits_of_prefill_and_decode_are_those_of_stock(pair, cache):
    stock, elastic = pair
    ids = _batch([40])["input_ids"]
    whole = stock(ids).logits
    parts = [elastic(part, past_key_values=cache).logits for part in ids.split([30, 9, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_beam_search_forks_rows(pair, cache):
    stock, elastic = pair
    batch, options = _batch([5, 18, 16]), {**GREEDY, "num_beams": 4}
    ours = elastic.generate(**batch, **options, past_key_values=cache)
    assert torch.equal(ours, stock.generate(**batch, **options))
    cache.check()


def test_rows_are_repeated_while_their_kernels_are_queued(pair, cache):
    stock, elastic = pair
    ids = _batch([12])["input_ids"]
    more = _batch([2, 2], seed=4)["input_ids"]
    whole = stock(torch.cat([ids.expand(2, -1), more], 1)).logits[:, -2:]
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):  # so that the pass below is still queued when the rows are copied
        busy = busy @ busy / 64
    elastic(ids, past_key_values=cache)
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0, 2], device="cuda"))
    ours = elastic(more, past_key_values=cache).logits
    torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-4)


def test_a_reset_cache_serves_again_within_a_small_limit(pair):
    stock, elastic = pair
    batch = _batch([9, 30])
    expected = stock.generate(**batch, **GREEDY)
    with ElasticCache(elastic.config, limit="4MiB") as cache:  # two pages
        for _ in range(4):
            ours = elastic.generate(**batch, **GREEDY, past_key_values=cache)
            assert torch.equal(ours, expected)
            cache.reset()
            assert cache.cache.stats().blocks_in_use == 0


def test_no_layer_waits_for_the_device(pair, cache):
    """After a first pass with its mask read, torch refuses any further wait."""
    elastic = pair[1]
    ids = _batch([20, 20])["input_ids"]
    with torch.inference_mode():
        elastic(ids, past_key_values=cache)
        torch.cuda.synchronize()
        step, positions = ids[:, :1], torch.full((2, 1), 20, device="cuda")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls the mode a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            elastic(step, position_ids=positions, past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


def test_another_device_than_the_models_is_refused(pair):
    elastic = pair[1]
    with ElasticCache(elastic.config, device="cpu") as cache, pytest.raises(InvalidInput):
        elastic(**_batch([4]), past_key_values=cache)
    spec = CacheSpec.from_hf(elastic.config, dtype="float32")
    with KVCache(spec, device="cpu", max_tokens=4096, limit="16MiB") as mine:
        cache = ElasticCache(elastic.config, cache=mine)
        with pytest.raises(EngineUnsupported, match="cuda:0, but the cache holds"):
            elastic(**_batch([4]), past_key_values=cache)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_cache_follows_its_model_to_another_gpu():
    model = make_model(attention="kvcached").to("cuda:1")
    batch = {name: tensor.to("cuda:1") for name, tensor in padded(LENGTHS).items()}
    with ElasticCache(model.config, limit="64MiB") as cache:
        model(**batch, past_key_values=cache)
        assert cache.cache.backend.device == "cuda:1"
