"""Workers that hold different layers, each with its own memory, behind one scheduler."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from real_vllm import offline, rig

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
# On the CPU stock vLLM makes what the stages hand on while it compiles, and not at all if told not
# to (its second stage ends in an AssertionError): this only traces.
STAGES = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"},
          "pipeline_parallel_size": 2}  # fmt: skip
PHASES = [(2, 60), (16, 60)]


def staged(model, folder, mode="strict", *, engine=None, binding="0|1", **more):
    return rig.offline(
        model, folder, folder / f"{mode}.log", phases=PHASES, engine=STAGES | (engine or {}),
        KVCACHED=mode, KVCACHED_CHECK="1", VLLM_CPU_OMP_THREADS_BIND=binding, **more,
    )  # fmt: skip


def tokens(run, most=60):
    """Of each request of ``PHASES``, which are among ``rig.PHASES``."""
    return [[said[:most] for said in phase["tokens"][:count]]
            for phase, (count, _) in zip(run["phases"], PHASES, strict=False)]  # fmt: skip


def test_stages_of_unlike_many_layers_under_a_tight_budget(model, stock, run_dir):
    """Two steps are in flight at once; requests are preempted and blocks leave meanwhile."""
    chunked = {"max_num_batched_tokens": 256, "enable_chunked_prefill": True}
    ours = staged(model, run_dir, KVCACHED_LIMIT="12MiB", VLLM_PP_LAYER_PARTITION="3,1",
                  engine=chunked)  # fmt: skip
    assert tokens(ours) == tokens(stock)
    assert ours["preempted"] > 0
    for phase in ours["phases"]:
        (tenant,) = phase["tenants"]
        assert tenant["lease_bytes"] <= 12 << 20
        assert tenant["report"]["in_use_bytes"] == rig.BLOCK  # the null block, of both stages


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["2,2", "1,3"])
def test_memory_of_all_stages_follows_load(model, stock, run_dir, layers):
    more = {"VLLM_PP_LAYER_PARTITION": layers, "engine": {"enable_prefix_caching": False}}
    theirs = staged(model, run_dir, "0", **more)
    ours = staged(model, run_dir, KVCACHED_HOST_MEMORY="memfd", **more)
    assert tokens(ours) == tokens(theirs) == tokens(stock)
    busy, idle = ([phase[key] for phase in ours["phases"]] for key in ("busy_bytes", "idle_bytes"))
    assert busy[1] > 10 * rig.BLOCK
    assert max(idle) <= 2 * rig.BLOCK


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["drop", "keep"])
def test_sleep_gives_the_memory_of_all_stages_back(model, run_dir, choice):
    done = staged(model, run_dir, more={"sleep": [1]}, KVCACHED_SLEEP=choice,
                  VLLM_PP_LAYER_PARTITION="3,1")  # fmt: skip
    (nap,) = done["sleeps"]
    report = nap["asleep"][0]["report"]
    assert nap["tokens"] == done["phases"][0]["tokens"]
    assert report["spare_bytes"] == report["quarantined_bytes"] == 0
    assert (report["cached_bytes"] > 0) is (nap["hits"] > 0) is (choice == "keep")
    assert report["backed_bytes"] == report["in_use_bytes"] + report["cached_bytes"]


@pytest.mark.slow
def test_blocks_that_hold_all_layers_of_a_stage(model, run_dir):
    """With our own attention, which takes that layout on the CPU: steps of a page of each layer."""
    ours = staged(model, run_dir, KVCACHED_LIMIT="12MiB", VLLM_LOGGING_STREAM="ext://sys.stderr",
                  engine={"attention_backend": "CUSTOM"},
                  VLLM_PP_LAYER_PARTITION="1,3")  # fmt: skip
    whole = rig.offline(
        model, run_dir, run_dir / "one.log", phases=PHASES,
        engine={"attention_backend": "CUSTOM"}, KVCACHED="strict",
    )  # fmt: skip
    assert "Using BLNHC KV cache layout" in (run_dir / "strict.log").read_text(encoding="utf-8")
    assert tokens(ours) == tokens(whole)
    assert ours["preempted"] > 0


@pytest.mark.slow
def test_two_stages_of_two_workers(model, stock, run_dir):
    ours = staged(model, run_dir, engine={"tensor_parallel_size": 2}, binding="0|0|1|1",
                  VLLM_PP_LAYER_PARTITION="3,1")  # fmt: skip
    theirs = staged(model, run_dir, "0", engine={"tensor_parallel_size": 2}, binding="0|0|1|1",
                    VLLM_PP_LAYER_PARTITION="3,1")  # fmt: skip
    assert tokens(ours) == tokens(theirs)
    assert ours["phases"][-1]["tenants"][0]["report"]["in_use_bytes"] == rig.BLOCK


def in_use(run_dir):
    (tenant,) = rig.tenants(run_dir)
    return tenant["report"]["in_use_bytes"]


def worker_of(server, title):
    """The process of this title below the server."""
    for pid in offline.descendants(server.process.pid):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(title.encode()):
                return pid
    raise AssertionError(f"no process is called {title}")


@pytest.mark.slow
def test_a_stage_that_dies_takes_its_engine_with_it_and_the_memory_is_back(model, run_dir):
    server = rig.Server(
        model, run_dir, run_dir / "log", "--pipeline-parallel-size=2", "--no-enforce-eager",
        '--compilation-config={"mode": 2, "backend": "eager"}', KVCACHED="strict",
        KVCACHED_NAME="stages", VLLM_CPU_OMP_THREADS_BIND="0|1", VLLM_PP_LAYER_PARTITION="3,1",
    )  # fmt: skip
    shared = set()
    try:
        server.wait(400)
        with ThreadPoolExecutor(4) as pool:
            doomed = [pool.submit(server.complete, f"request {i}", 1000) for i in range(4)]
            end = time.monotonic() + 30
            while in_use(run_dir) == rig.BLOCK:
                assert time.monotonic() < end, "they use nothing"
            shared = rig.shared_files(offline.descendants(server.process.pid))
            os.kill(worker_of(server, "VLLM::Worker_PP1"), signal.SIGKILL)
            for future in doomed:
                with pytest.raises(OSError):  # noqa: PT011 - an error, or the end of the connection
                    future.result()
        end = time.monotonic() + 60
        while (found := rig.tenants(run_dir)) and time.monotonic() < end:
            time.sleep(0.1)
        assert found == []
    finally:
        server.end()
        rig.remove(shared)
