"""vLLM on elastic memory says what stock vLLM says, and its memory follows its load."""

from __future__ import annotations

import pytest
from real_vllm import rig

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


def elastic(model, folder, **more):
    more = {"KVCACHED": "strict", "KVCACHED_CHECK": "1"} | more
    return rig.offline(model, folder, folder / "log", phases=rig.PHASES, **more)


def assert_same(ours, stock):
    for number, (a, b) in enumerate(zip(ours["phases"], stock["phases"], strict=True)):
        assert a["tokens"] == b["tokens"], f"phase {number}"


def test_enough_tokens_are_compared(stock):
    assert sum(len(t) for phase in stock["phases"] for t in phase["tokens"]) >= 10_000


def test_with_prefix_caching(model, stock, run_dir):
    ours = elastic(model, run_dir, KVCACHED_NAME="cached")
    assert_same(ours, stock)
    (tenant,) = ours["phases"][-1]["tenants"]
    assert tenant["name"] == "cached"
    assert tenant["meta"]["engine"].startswith("vLLM")
    report = tenant["report"]
    assert report["cached_bytes"] > 50 * rig.BLOCK  # nobody wanted it back
    assert report["in_use_bytes"] == rig.BLOCK  # the null block


def test_without_prefix_caching_memory_follows_load(model, stock, run_dir):
    ours = elastic(model, run_dir, KVCACHED_HOST_MEMORY="memfd",
                   engine={"enable_prefix_caching": False})  # fmt: skip
    assert_same(ours, stock)
    busy, idle = ([phase[key] for phase in ours["phases"]] for key in ("busy_bytes", "idle_bytes"))
    assert busy[1] > 10 * rig.BLOCK
    assert max(idle) <= 2 * rig.BLOCK


def test_a_budget_that_holds_few_requests(model, stock, run_dir):
    chunked = {"max_num_batched_tokens": 256, "enable_chunked_prefill": True}
    ours = elastic(model, run_dir, KVCACHED_LIMIT="12MiB", engine=chunked)
    assert_same(ours, stock)
    assert ours["preempted"] > 0
    for phase in ours["phases"]:
        assert phase["tenants"][0]["lease_bytes"] <= 12 << 20
