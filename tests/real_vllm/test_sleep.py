"""vLLM's own sleep: all memory goes at once, or all but the cached prefixes."""

from __future__ import annotations

import pytest
from real_vllm import rig

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
PHASES = [(4, 60), (16, 60)]


@pytest.mark.parametrize(
    ("choice", "levels", "kept"),
    [
        pytest.param("drop", [1], [False], marks=pytest.mark.slow),  # also over HTTP: test_servers
        ("keep", [1, 2, 1], [True, False, True]),  # at level 2 the weights may be others after
    ],
)
def test_prefixes_are_dropped_or_kept(model, run_dir, choice, levels, kept):
    done = rig.offline(model, run_dir, run_dir / "log", phases=PHASES, more={"sleep": levels},
                       KVCACHED="strict", KVCACHED_CHECK="1", KVCACHED_SLEEP=choice)  # fmt: skip
    before = done["phases"][-1]["tenants"][0]["report"]
    assert before["cached_bytes"] > 4 * rig.BLOCK
    for nap, keeps in zip(done["sleeps"], kept, strict=True):
        report = nap["asleep"][0]["report"]
        assert nap["tokens"] == done["phases"][0]["tokens"]
        assert report["spare_bytes"] == report["quarantined_bytes"] == 0
        assert report["in_use_bytes"] == rig.BLOCK  # the null block
        assert (report["cached_bytes"] > 0) is (nap["hits"] > 0) is keeps
        assert report["backed_bytes"] == report["in_use_bytes"] + report["cached_bytes"]
