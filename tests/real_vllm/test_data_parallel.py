"""Replicas of one model behind one server: each a tenant of the budget."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from real_vllm import offline, rig

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]
BUDGET = 20 << 20  # 40 blocks; one replica at full load wants 16 requests of 6 blocks


def test_two_replicas_share_a_budget_too_small_for_both(model, stock, run_dir):
    server = rig.Server(model, run_dir, run_dir / "log", "--data-parallel-size=2",
                        KVCACHED="strict", KVCACHED_NAME="chat", KVCACHED_BUDGET=str(BUDGET),
                        VLLM_CPU_OMP_THREADS_BIND="0|1")  # fmt: skip
    number, (count, length) = 1, rig.PHASES[1]
    try:
        server.wait(400)
        assert {t["name"] for t in rig.tenants(run_dir)} == {"chat", "chat-dp1"}
        with ThreadPoolExecutor(count) as pool:
            prompts = offline.prompts_of(number, count)
            texts = list(pool.map(lambda prompt: server.complete(prompt, length), prompts))
        assert texts == stock["phases"][number]["texts"]
        leases = {t["name"]: t["lease_bytes"] for t in rig.tenants(run_dir)}
        assert min(leases.values()) > 2 * rig.BLOCK, "one of them did all the work"
        assert sum(leases.values()) <= BUDGET
    finally:
        server.end()
