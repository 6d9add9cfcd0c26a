"""A GPU's broker over a card that is set by hand: others take memory, owners die."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time

import pytest
from broker_tenant import MIB, CountingTenant
from fake_nvml import UUID, FakeCard, FakeNvml
from fault.broker_rig import PACKAGE, until

from kvcached.broker.admin import list_tenants, request_reclaim, set_tenant_limit
from kvcached.broker.capacity import default_capacity
from kvcached.broker.files import RuntimeDir, try_lock
from kvcached.broker.nvml import open_card
from kvcached.broker.probe import NvmlProbe
from kvcached.broker.server import Server
from kvcached.config import Config
from kvcached.errors import BudgetExceeded, InvalidConfig
from kvcached.memory.cuda import CudaBackend
from kvcached.resources import device_slug, make_budget
from kvcached.testing import FakeCudaDriver

CAPACITY, RESERVE = 1024 * MIB, 1024 * MIB
DEVICE = f"GPU-{UUID}"
ENGINE = """
import sys
sys.path.insert(0, sys.argv[1])
from kvcached.broker.client import BrokerBudget
budget = BrokerBudget("dies", device=sys.argv[2], limit_bytes=None)
budget.claim(300 << 20)
print("ready", flush=True)
sys.stdin.read()
"""


class SharedCard(FakeCard):
    """What the tenants hold, what ``gone`` held, and what others use."""

    def __init__(self, tenants):
        super().__init__(CAPACITY + RESERVE)
        self.tenants, self.others, self.gone = tenants, 0, 0

    def memory(self):
        held = sum(tenant.in_use + tenant.cached for tenant in self.tenants)
        self.used = held + self.others + self.gone
        return super().memory()


@pytest.fixture
def tenants():
    made = []
    yield made
    for one in made:
        one.close()


@pytest.fixture
def card(runtime_dir, tenants):
    """A broker of this process, so that its card can be set; it leaves after the last tenant."""
    card = SharedCard(tenants)
    directory = RuntimeDir(str(runtime_dir), DEVICE.lower())
    lock = try_lock(directory)
    probe = NvmlProbe(lambda: card, capacity=CAPACITY, log=print)
    probe.wait_until_open()
    server = Server(directory, DEVICE.lower(), CAPACITY, probe)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield card
    for one in tenants:
        one.close()
    thread.join(10)
    assert not thread.is_alive()
    os.close(lock)
    directory.close()


@pytest.fixture
def tenant(card, tenants):
    def make(name, **options):
        tenants.append(CountingTenant(name, device=DEVICE, **options))
        return tenants[-1]

    return make


def row(name):
    (device,) = list_tenants(DEVICE)
    return next((tenant for tenant in device.tenants if tenant.name == name), None)


def test_what_others_use_is_not_handed_out(card, tenant):
    a, b = tenant("a"), tenant("b")
    card.others = 800 * MIB
    a.use(200 * MIB)
    started = time.monotonic()
    with pytest.raises(BudgetExceeded):
        b.use(100 * MIB)
    assert time.monotonic() - started < 1.0  # a was asked, and said no
    a.cache()
    time.sleep(0.15)  # until it has reported that: it was asked in vain just now
    b.use(100 * MIB)
    assert 100 * MIB <= a.cached <= 124 * MIB
    assert card.memory().free >= RESERVE
    card.others = 0
    time.sleep(0.05)
    b.use(800 * MIB)


def test_a_claim_that_others_make_impossible_is_refused_at_once(card, tenant):
    a = tenant("a", floor_bytes=64 * MIB)
    card.others = 900 * MIB
    started = time.monotonic()
    with pytest.raises(BudgetExceeded):
        a.use(200 * MIB)
    assert time.monotonic() - started < 0.4
    card.others = CAPACITY + RESERVE
    time.sleep(0.05)
    a.use(64 * MIB)  # the floor


def test_an_idle_broker_does_not_look_and_a_burst_looks_seldom(card, tenant):
    a = tenant("a")
    a.use(8 * MIB)
    assert until(lambda: a.budget.lease_bytes == a.budget.claimed_bytes, 3.0)
    time.sleep(0.2)
    looks = card.looks
    time.sleep(0.3)
    assert card.looks == looks
    started = time.monotonic()
    for _ in range(200):
        a.use(MIB)
        request_reclaim("a", 0)
    seconds = time.monotonic() - started
    assert card.looks - looks <= 2 + seconds / 0.03 + seconds / 0.1


def test_a_dead_engine_is_credited_when_the_device_has_let_it_go(card, tenant):
    a = tenant("a")
    with subprocess.Popen(
        [sys.executable, "-c", ENGINE, PACKAGE, DEVICE],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        card.pids, card.gone = {process.pid: 300 * MIB}, 300 * MIB
        a.use(MIB)  # something happens, so the broker sees what others use
        time.sleep(0.15)
        a.use(MIB)
        process.kill()
    assert until(lambda: row("dies").state == "draining")
    time.sleep(0.2)
    assert row("dies").lease_bytes >= 300 * MIB
    card.pids = {}
    time.sleep(0.1)
    assert row("dies").state == "draining"  # a child may hold its memory
    card.gone = 0
    assert until(lambda: row("dies") is None, 1.0)


# --- without a card -----------------------------------------------------------------------------


@pytest.fixture
def gpu():
    backend = CudaBackend(driver=FakeCudaDriver(capacity=3 << 30))
    yield backend
    backend.shutdown()


@pytest.mark.parametrize("broker", [True, False])
def test_a_cuda_backend_has_a_broker_and_a_limit_within_its_capacity(gpu, runtime_dir, broker):
    config = Config(runtime_dir=str(runtime_dir), broker=broker)
    assert device_slug(gpu) == f"GPU-{gpu.uuid}"
    budget = make_budget("a", gpu, config, limit="8GiB", floor=0, weight=1.0)
    try:
        assert budget.limit_bytes == 2 << 30  # 1 GiB is the headroom
        assert budget.set_limit(3 << 30).desired_bytes == 2 << 30
        budget.claim(1 << 30)
        budget.give_back(1 << 30)
    finally:
        budget.close()
    log = runtime_dir / f"{device_slug(gpu).lower()}.log"
    if broker:  # no machine has a card of that name
        assert until(lambda: log.exists() and "others use of this device is not seen" in
                     log.read_text())  # fmt: skip


def test_a_budget_that_comes_too_late_says_so(gpu, runtime_dir, caplog):
    terms = {"limit": None, "floor": 0, "weight": 1.0}

    def join(name, **settings):
        return make_budget(name, gpu, Config(runtime_dir=str(runtime_dir), **settings), **terms)

    with contextlib.ExitStack() as stack:
        for name, settings in (("a", {"budget": "1GiB"}), ("b", {"budget": "1GiB"}), ("c", {})):
            stack.enter_context(contextlib.closing(join(name, **settings)))
        assert caplog.records == []
        late = stack.enter_context(contextlib.closing(join("late", budget="2GiB")))
        (said,) = caplog.messages
        assert "the budget of 2.0 GiB" in said
        assert "runs, with 1.0 GiB" in said
        assert late.capacity_bytes == 1 << 30


def test_the_start_of_a_uuid_is_enough_to_look_and_to_steer(gpu, runtime_dir):
    config = Config(runtime_dir=str(runtime_dir))
    budget = make_budget("a", gpu, config, limit="1GiB", floor=0, weight=1.0)
    try:
        whole = device_slug(gpu)
        for start in (whole, whole[:12], whole[:12].lower()):  # ps shows 12 characters
            (found,) = list_tenants(start, config=config)
            assert found.device == whole.lower()
        assert list_tenants("gpu-0123fedc", config=config) == []
        assert list_tenants("cpu", config=config) == []
        assert set_tenant_limit("a", MIB, device=whole[:12], config=config).desired_bytes == MIB
    finally:
        budget.close()


def test_who_only_schedules_knows_the_capacity_of_a_card():
    library = FakeNvml(total=81 << 30, reserved=1 << 30)

    def capacity(**settings):
        return default_capacity(
            Config(**settings), DEVICE, lambda uuid: open_card(uuid, lambda: library)
        )

    assert capacity() == 79 << 30
    assert capacity(headroom="10%") == 72 << 30
    assert capacity(budget="50%") == 40 << 30
    assert capacity(budget="5GiB") == 5 << 30
    assert library.opened == 0
    library.names = ()
    assert capacity(budget="5GiB") == 5 << 30
    with pytest.raises(InvalidConfig, match="nvmlDeviceGetHandleByUUID: not found"):
        capacity()
