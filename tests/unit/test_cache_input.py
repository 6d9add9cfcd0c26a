"""Bad input to a cache: an error of our own tree that says what, how much, what to do."""

import numpy as np
import pytest
from cache_rig import FOREVER, tiny_cache, tiny_spec

from kvcached.broker.budget import LocalBudget
from kvcached.cache import KVCache
from kvcached.config import Config
from kvcached.errors import InvalidInput, InvalidSize, KvcachedError, OwnershipError
from kvcached.layout import CacheSpec
from kvcached.testing import FakeBackend

BAD_CONSTRUCTION = {
    "spec": ({"spec": {"num_layers": 2}}, "spec is"),
    "device": ({"device": "gpu0"}, "device 'gpu0'"),
    "device type": ({"device": 0}, "device is 0"),
    "name": ({"name": "Bad Name"}, "'Bad Name'"),
    "name type": ({"name": b"x"}, "b'x'"),
    "no tokens": ({"max_tokens": 0}, "max_tokens is 0"),
    "tokens type": ({"max_tokens": 1e6}, "max_tokens is 1000000.0"),
    "tokens bool": ({"max_tokens": True}, "max_tokens is True"),
    "too many tokens": ({"max_tokens": 1 << 31}, "int32"),
    "limit": ({"limit": "lots"}, "'lots' is not a size"),
    "negative limit": ({"limit": -1}, "-1"),
    "percent": ({"limit": "140%"}, "140%"),
    "limit below a block": ({"limit": 3}, "3 B"),
    "floor": ({"floor": "some"}, "'some' is not a size"),
    "negative floor": ({"floor": -1}, "-1"),
    "floor type": ({"floor": None}, "None is not a size"),
    "floor above the limit": ({"floor": "2GiB", "limit": "1GiB"}, "2.0 GiB is above the limit"),
    "share above the limit": ({"floor": "60%", "limit": "50%"}, "above the limit"),
    "floor above the device": ({"floor": 1 << 60}, "above the limit"),
    "no weight": ({"weight": 0}, "weight is 0"),
    "negative weight": ({"weight": -1.0}, "weight is -1.0"),
    "weight type": ({"weight": "x"}, "weight is 'x'"),
    "weight bool": ({"weight": True}, "weight is True"),
    "weight nan": ({"weight": float("nan")}, "weight is nan"),
    "endless weight": ({"weight": float("inf")}, "weight is inf"),
    "weight with more digits than a float": ({"weight": 10**400}, "weight is 1000"),
    "budget": ({"budget": 5}, "budget is 5"),
    "budget class": ({"budget": LocalBudget}, "budget is <class"),
    "floor beside a budget": ({"budget": LocalBudget(1 << 20), "floor": 5}, "floor is 5"),
    "weight beside a budget": ({"budget": LocalBudget(1 << 20), "weight": 2.0}, "weight 2.0"),
    "backend": ({"backend": "cpu"}, "backend is 'cpu'"),
    "backend class": ({"backend": FakeBackend}, "backend is <class"),
    "model": ({"model": b"llama"}, "model is b'llama'"),
    "config": ({"config": {"broker": False}}, "config is {'broker': False}"),
}


@pytest.mark.parametrize(("options", "says"), BAD_CONSTRUCTION.values(), ids=BAD_CONSTRUCTION)
def test_a_cache_that_cannot_be_is_refused_and_leaves_nothing(options, says):
    options = {"spec": tiny_spec(), "name": "bad", "config": Config(broker=False)} | options
    with pytest.raises(KvcachedError) as error:
        KVCache(options.pop("spec"), **options)
    assert says in str(error.value)


@pytest.mark.parametrize("terms", [{"weight": -1}, {"floor": "2MiB", "limit": "1MiB"}], ids=str)
def test_bad_terms_are_input_and_no_broker_is_asked(terms, runtime_dir):
    with pytest.raises(InvalidInput, match=next(iter(terms))) as error:
        KVCache(tiny_spec(), name="bad", config=Config(runtime_dir=str(runtime_dir)), **terms)
    assert error.value.hint
    assert not list(runtime_dir.iterdir()), "a broker was started for it"


def test_a_floor_that_fits_is_met_without_a_broker():
    config = Config(broker=False, budget="64MiB")
    with KVCache(tiny_spec(), name="alone", floor="50%", weight=2, config=config) as cache:
        assert cache.stats().limit_bytes == 64 << 20


def test_a_refused_construction_gives_back_the_backend_and_the_budget():
    backend, budget = FakeBackend(32), LocalBudget(20)
    with pytest.raises(MemoryError, match="20 B"):
        KVCache(tiny_spec(), name="bad", backend=backend, budget=budget, config=FOREVER)
    assert budget.claimed_bytes == 0
    backend.shutdown()  # raises if something is left


def test_per_layer_needs_keys_and_values_of_one_size():
    spec = tiny_spec(layout="per_layer", head_dim_v=3)
    backend = FakeBackend(32)
    with pytest.raises(InvalidInput, match="one size"):
        KVCache(spec, name="bad", backend=backend, budget=LocalBudget(1 << 20), config=FOREVER)
    backend.shutdown()


@pytest.mark.parametrize(
    "changes",
    [{"num_layers": 0}, {"num_kv_heads": -1}, {"head_dim": 2.0}, {"block_size": "16"},
     {"dtype": "int4"}, {"layout": "rows"}, {"head_dim_v": -1}, {"mla_value_dim": 1},
     {"mla_value_dim": "x"}, {"mla_value_dim": -1}],
    ids=str,
)  # fmt: skip
def test_a_spec_that_cannot_be_names_the_field(changes):
    with pytest.raises(InvalidInput, match=next(iter(changes))):
        CacheSpec(**({"num_layers": 2, "num_kv_heads": 1, "head_dim": 4} | changes))


GQA = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
       "hidden_size": 64}  # fmt: skip
MLA = {"num_hidden_layers": 2, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
BAD_MODELS = {
    "nothing": (None, {}, "no attention heads"),
    "no mapping": ("llama", {}, "no attention heads"),
    "no layers": (GQA | {"num_hidden_layers": None}, {}, "num_hidden_layers is None"),
    "layers": (GQA | {"num_hidden_layers": "2"}, {}, "num_hidden_layers is '2'"),
    "no heads": (GQA | {"num_attention_heads": 0}, {}, "num_attention_heads is 0"),
    "heads": (GQA | {"num_attention_heads": [8, 4]}, {}, r"num_attention_heads is \[8, 4\]"),
    "no heads of keys": (GQA | {"num_key_value_heads": 0}, {}, "num_kv_heads is 0"),
    "no width": (GQA | {"hidden_size": None}, {}, "hidden_size is None"),
    "fewer elements than heads": (GQA | {"hidden_size": 4}, {}, "head_dim is 0"),
    "head": (GQA | {"head_dim": "64"}, {}, "head_dim is '64'"),
    "dtype": (GQA | {"dtype": "auto"}, {}, "dtype 'auto'"),
    "rank": (MLA | {"kv_lora_rank": "16"}, {}, "kv_lora_rank is '16'"),
    "rope": (MLA | {"qk_rope_head_dim": -8}, {}, "qk_rope_head_dim is -8"),
    "linear": (GQA | {"layer_types": ["linear_attention", "full_attention"]}, {}, "linear_att"),
    "override": (GQA, {"num_heads": 4}, "no field num_heads"),
    "value of an override": (GQA, {"block_size": 0}, "block_size is 0"),
}


@pytest.mark.parametrize(("config", "changes", "says"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_a_model_that_cannot_be_read_says_what_is_missing(config, changes, says):
    with pytest.raises(InvalidInput, match=says):
        CacheSpec.from_hf(config, **changes)


def test_a_name_in_place_of_a_configuration_is_told_what_to_pass():
    with pytest.raises(InvalidInput) as caught:
        CacheSpec.from_hf("meta-llama/Llama-3.1-8B")
    assert "AutoConfig.from_pretrained" in caught.value.hint


def test_an_override_stands_in_for_what_cannot_be_read():
    assert CacheSpec.from_hf(GQA) == CacheSpec(2, 2, 8)
    assert CacheSpec.from_hf(MLA) == CacheSpec(2, 1, 24, head_dim_v=0, mla_value_dim=16)
    assert CacheSpec.from_hf(GQA | {"dtype": "auto"}, dtype="float16").dtype == "float16"
    hybrid = GQA | {"layer_types": ["linear_attention", "full_attention"]}
    assert CacheSpec.from_hf(hybrid, num_layers=1).num_layers == 1


@pytest.mark.parametrize(
    "tokens",
    ["a prompt", b"bytes", [1.5], 2.0, True, [[1, 2], [3, 4]], [[1], [2, 3]], [None], {1, 2},
     np.zeros(3), [1 << 70], object()],
    ids=repr,
)  # fmt: skip
def test_tokens_must_be_a_count_or_a_flat_list_of_integers(tokens):
    with tiny_cache() as cache:
        sequence = cache.new_sequence()
        before = cache.stats()
        with pytest.raises(InvalidInput):
            cache.extend(sequence, tokens)
        with pytest.raises(InvalidInput):
            cache.new_sequence(tokens)
        assert cache.stats() == before


def test_a_negative_count_is_refused():
    with tiny_cache() as cache, pytest.raises(InvalidInput, match="-3 tokens"):
        cache.extend(cache.new_sequence(), -3)


@pytest.mark.parametrize("kind", [np.int32, np.uint8, np.int64, list, tuple, range])
def test_integers_of_every_kind_are_tokens(kind):
    tokens = range(9) if kind is range else kind(range(9)) if kind in (list, tuple) else (
        np.arange(9, dtype=kind)
    )  # fmt: skip
    with tiny_cache() as cache:
        sequence = cache.new_sequence()
        assert len(cache.extend(sequence, tokens)) == 9
        assert cache.new_sequence(list(range(9))).num_cached_tokens == 8
        assert len(cache.extend(sequence, np.int64(2))) == 2


@pytest.mark.parametrize("stranger", [None, 3, "seq", (1, 2)])
def test_a_stranger_is_no_sequence(stranger):
    with tiny_cache() as cache:
        for use in (cache.free, cache.fork, lambda s: cache.extend(s, 1),
                    lambda s: cache.block_tables([s])):  # fmt: skip
            with pytest.raises(InvalidInput, match="is not a Sequence"):
                use(stranger)


def test_a_sequence_is_no_list_of_sequences():
    with tiny_cache() as cache, pytest.raises(InvalidInput, match="a list of sequences") as caught:
        cache.block_tables(cache.new_sequence())
    assert "[sequence]" in caught.value.hint


@pytest.mark.parametrize("index", [-1, 2, 1.0, "0", None, True])
def test_a_layer_that_is_not_there_is_refused(index):
    with tiny_cache() as cache, pytest.raises(InvalidInput, match="the cache has 2"):
        cache.layer(index)


@pytest.mark.parametrize("size", ["many", -5, 1.5, None, "12XB", True, "120%"])
def test_a_limit_that_is_no_size_is_refused(size):
    with tiny_cache() as cache:
        before = cache.stats()
        with pytest.raises(InvalidSize, match=r"not a size|more than all there is"):
            cache.set_limit(size)
        with pytest.raises(InvalidSize, match=r"not a size|more than all there is"):
            cache.evict_prefixes(size)
        assert cache.stats() == before


def test_a_salt_is_a_string_and_a_fence_can_pass():
    with tiny_cache() as cache:
        with pytest.raises(InvalidInput, match="salt is 7"):
            cache.new_sequence([1, 2], salt=7)
        sequence = cache.new_sequence()
        with pytest.raises(InvalidInput, match="passed"):
            cache.free(sequence, fence="soon")
        cache.free(sequence)
        assert cache.stats().sequences == 0


def test_block_ids_of_others_are_refused_before_they_are_cut_to_32_bits():
    with tiny_cache() as cache:
        pool = cache._blocks
        assert pool.validate([1, 2]).dtype == np.int32
        for ids in ([1 << 32], [-1], [17]):
            with pytest.raises(OwnershipError, match="no block has this id"):
                pool.validate(ids)
        for ids in ("1", [[1]], [1.0], 3):
            with pytest.raises(InvalidInput, match="list of integers"):
                pool.validate(ids)
