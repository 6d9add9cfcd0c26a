"""The broker of a real GPU: what NVML says, and what becomes of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from broker_tenant import MIB, CountingTenant
from fault.broker_rig import PACKAGE, until

from kvcached.broker.admin import list_tenants
from kvcached.broker.capacity import card_bytes
from kvcached.broker.nvml import open_card
from kvcached.errors import BudgetExceeded

pytestmark = pytest.mark.gpu

GIB = 1 << 30
ENGINE = """
import sys
sys.path.insert(0, sys.argv[1])
from kvcached.broker.client import BrokerBudget
from kvcached.memory.cuda import CudaBackend
backend = CudaBackend()
budget = BrokerBudget("dies", device=sys.argv[2], limit_bytes=None)
budget.claim(2 << 30)
handles = [backend.create((64 << 20) // backend.page_bytes) for _ in range(32)]
print("ready", flush=True)
sys.stdin.read()
"""
LOOKER = """
import os, sys
sys.path.insert(0, sys.argv[1])
from kvcached.broker.nvml import open_card
card = open_card(sys.argv[2])
assert card.memory().total
assert os.getpid() not in card.processes()
"""


@pytest.fixture(scope="module")
def uuid():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.cuda.init()
    torch.empty(1, device="cuda")
    return f"GPU-{torch.cuda.get_device_properties(0).uuid}"


@pytest.fixture
def card(uuid):
    with closing(open_card(uuid)) as card:
        yield card


@pytest.fixture
def tenant(uuid):
    """A tenant of a broker that has opened the card."""
    _, total = torch.cuda.mem_get_info()
    one = CountingTenant("a", device=uuid, capacity=total - GIB)
    (device,) = list_tenants(uuid)
    maps = Path(f"/proc/{device.broker_pid}/maps")
    assert until(lambda: "libnvidia-ml" in maps.read_text())
    time.sleep(1.0)  # for the card itself
    yield one
    one.close()


def test_memory_is_what_cuda_says(card, uuid):
    free, total = torch.cuda.mem_get_info()
    memory = card.memory()
    assert abs(memory.free - free) < 256 * MIB
    assert abs(memory.total - total) < 256 * MIB
    assert card_bytes(uuid) == memory.total
    taken = torch.empty(3 * GIB, dtype=torch.uint8, device="cuda")
    assert abs(memory.free - card.memory().free - 3 * GIB) < 64 * MIB
    del taken
    torch.cuda.empty_cache()


def test_processes_have_our_pid(card):
    processes = card.processes()
    if os.getpid() not in processes:
        pytest.skip("NVML shows other pids than ours: another pid namespace")
    nbytes = processes[os.getpid()]
    assert nbytes is None or nbytes > MIB


def test_looking_makes_no_context(uuid):
    subprocess.run([sys.executable, "-I", "-S", "-c", LOOKER, PACKAGE, uuid], check=True)


def test_looking_is_quick(card):
    started = time.perf_counter()
    for _ in range(100):
        card.memory()
    assert (time.perf_counter() - started) / 100 < 0.003
    started = time.perf_counter()
    for _ in range(20):
        card.processes()
    assert (time.perf_counter() - started) / 20 < 0.02


def test_what_torch_takes_is_not_handed_out(tenant, card):
    (device,) = list_tenants(tenant.budget._session._device)
    assert device.broker_pid not in card.processes()
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(free - 8 * GIB, dtype=torch.uint8, device="cuda")
    started = time.monotonic()
    with pytest.raises(BudgetExceeded):
        tenant.use(8 * GIB)  # 1 GiB stays free for those outside
    assert time.monotonic() - started < 0.4
    tenant.use(6 * GIB)
    tenant.drop(6 * GIB)
    del taken
    torch.cuda.empty_cache()
    time.sleep(0.1)
    tenant.use(8 * GIB)


def test_a_killed_engine_is_credited_when_its_bytes_are_back(tenant, card, uuid):
    pytest.importorskip("cuda.bindings.driver")
    tenant.use(MIB)
    free = card.memory().free
    with subprocess.Popen(
        [sys.executable, "-c", ENGINE, PACKAGE, uuid],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        assert free - card.memory().free > 2 * GIB
        process.kill()

    def gone():
        (device,) = list_tenants(uuid)
        return all(row.name != "dies" for row in device.tenants)

    assert until(gone, 3.0)
    assert free - card.memory().free < 64 * MIB
