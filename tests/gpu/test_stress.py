"""Several processes on one GPU: patterns under pressure, death, and what fresh memory shows."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kvcached import CacheSpec, Config, KVCache
from kvcached.broker.admin import list_tenants
from kvcached.broker.budget import LocalBudget
from kvcached.memory.cuda import CudaBackend
from kvcached.memory.views import tensor_from_address

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(560)]
HERE = Path(__file__).parent
SECONDS = float(os.environ.get("STRESS_SECONDS", "20"))
LLAMA_8B = CacheSpec(num_layers=32, num_kv_heads=8, head_dim=128)
GIB = 1 << 30


def start(script, *args, **environment):
    return subprocess.Popen(
        [sys.executable, str(HERE / script), *map(str, args)], text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, env=os.environ | environment,
    )  # fmt: skip


def used_bytes():
    """Bytes in use on the whole device, by anybody."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def memory_is_back():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.zeros(1, device="cuda")
    before = used_bytes()
    yield
    torch.cuda.empty_cache()
    until(lambda: used_bytes() - before <= 64 << 20)


@pytest.mark.parametrize("processes", [4])
def test_no_byte_is_ever_wrong(processes, monkeypatch):
    monkeypatch.setenv("KVCACHED_BUDGET", "6GiB")
    workers = [start("stress_worker.py", f"w{i}", SECONDS, i + 1) for i in range(processes)]
    outs = [worker.communicate(timeout=SECONDS + 120)[0] for worker in workers]
    reports = [json.loads(out.splitlines()[-1]) for out in outs if out.strip()]
    for report in reports:
        print(report)
    assert [worker.returncode for worker in workers] == [0] * processes
    assert sum(report["wrong"] for report in reports) == 0
    for what in ("split", "shrink", "reclaim", "prefix_hits", "ahead"):
        assert sum(report.get(what, 0) for report in reports) > 0, f"nothing of kind {what}"
    assert all(report["blocks_checked"] > 100 for report in reports)


def test_a_short_one_under_the_sanitizer(monkeypatch):
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(tool):
        pytest.skip("compute-sanitizer is not installed")
    monkeypatch.setenv("KVCACHED_BUDGET", "2GiB")
    done = subprocess.run(
        [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable,
         str(HERE / "stress_worker.py"), "sane", str(min(SECONDS, 20)), "2"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    print(done.stdout[-1500:])
    assert "ERROR SUMMARY: 0 errors" in done.stdout
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_byte_is_back_after_kill_9(monkeypatch):
    """Six rounds of five: killed while they hold 1 GiB each, all at once or one by one."""
    monkeypatch.setenv("KVCACHED_BUDGET", "12GiB")
    with KVCache(LLAMA_8B, device="cuda", name="witness", max_tokens=1 << 16) as witness:
        sequence = witness.new_sequence()
        witness.extend(sequence, 64)
        slug = f"gpu-{witness.backend.uuid}"
        before = used_bytes()
        for round_ in range(6):
            holders = [start("holder.py", f"h{round_}-{i}", 1024, 17) for i in range(5)]
            for holder in holders:
                assert holder.stdout.readline().strip() == "ready"
            (device,) = list_tenants(slug)
            assert device.leased_bytes >= 5 * GIB
            for holder in holders:
                holder.kill()
                if round_ % 2:
                    holder.wait(30)
            for holder in holders:
                holder.wait(30)
                holder.stdin.close()
                holder.stdout.close()
            until(lambda: used_bytes() - before <= 16 << 20)
            until(lambda: list_tenants(slug)[0].leased_bytes < 1 * GIB)
        witness.free(sequence)


@pytest.mark.parametrize("zero", ["on-tenant-change", "always", "never"])
def test_fresh_memory_shows_nobody_elses_bytes(zero, monkeypatch):
    """Another process filled most of 24 GiB with ones and was killed."""
    monkeypatch.setenv("KVCACHED_BUDGET", "30GiB")
    holder = start("holder.py", "dirty", 24 * 1024, 0xAB)
    assert holder.stdout.readline().strip() == "ready"
    holder.kill()
    holder.wait(30)
    holder.stdin.close()
    holder.stdout.close()
    backend = CudaBackend("cuda:0", zero=zero)
    with KVCache(LLAMA_8B, backend=backend, max_tokens=1 << 20, budget=LocalBudget(32 * GIB),
                 config=Config(broker=False)) as cache:  # fmt: skip
        sequence = cache.new_sequence()
        cache.extend(sequence, 16 * (24 * 512))
        base, size = cache._blocks.pages.address_of(0), LLAMA_8B.block_bytes
        seen = 0
        for block in sequence.block_ids:
            words = tensor_from_address(base + block * size, size, "cuda:0").view(torch.int64)
            seen += int(torch.count_nonzero(words)) if block % 4 == 0 else 0
        print(zero, "clears" if backend.clears else "leaves it to the driver", seen)
        assert zero == "never" or seen == 0
        cache.free(sequence)
    backend.shutdown()
