"""Two workers, each with its own memory, behind one scheduler."""

from __future__ import annotations

import pytest
from real_vllm import rig

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]
PHASES = [(2, 100), (16, 100), (3, 100)]


def test_two_ranks_say_what_two_stock_ranks_say(model, run_dir):
    runs = {}
    for mode in ("0", "strict"):
        runs[mode] = rig.offline(
            model, run_dir, run_dir / f"{mode}.log", phases=PHASES,
            engine={"tensor_parallel_size": 2}, KVCACHED=mode,
            KVCACHED_NAME="two", VLLM_CPU_OMP_THREADS_BIND="0|1",
        )  # fmt: skip
    tokens = [[phase["tokens"] for phase in run["phases"]] for run in runs.values()]
    assert tokens[0] == tokens[1]
    report = runs["strict"]["phases"][-1]["tenants"][0]["report"]
    assert report["in_use_bytes"] == rig.BLOCK  # the null block: half of it with each rank
