"""A broker that is started before there is a tenant for it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
from broker_tenant import MIB, device, tenants
from fault.broker_rig import until

from kvcached.broker import link
from kvcached.broker.admin import list_tenants
from kvcached.broker.server import FIRST_TENANT_S
from kvcached.config import Config
from kvcached.memory.host import HostBackend
from kvcached.resources import begin_budget


@pytest.fixture
def tenant():
    with tenants() as make:
        yield make


def expect(capacity):
    threading.Thread(target=link.expect_tenant, args=(Config.from_env(), "cpu", capacity)).start()


def test_a_broker_that_was_started_early_is_the_one_that_tenants_find(tenant):
    expect(64 * MIB)
    pid = until(lambda: list_tenants("cpu"))[0].broker_pid
    expect(32 * MIB)
    one = tenant("a")
    assert (device().broker_pid, one.budget.capacity_bytes) == (pid, 64 * MIB)
    one.close()
    assert until(lambda: not list_tenants("cpu")), "it leaves as any other"


def test_it_waits_while_somebody_expects_a_tenant_and_leaves_after_them(runtime_dir):
    script = "from kvcached.broker import link; from kvcached.config import Config; "
    script += "link.expect_tenant(Config.from_env(), 'cpu', 1 << 20)"
    with subprocess.Popen([sys.executable, "-c", script]) as process:
        assert until(lambda: list_tenants("cpu"))
        time.sleep(FIRST_TENANT_S + 0.5)
        assert list_tenants("cpu")
        process.kill()
    assert until(lambda: not list_tenants("cpu"), FIRST_TENANT_S / 2)


def test_a_budget_is_begun_beside_other_work_and_trouble_is_left_for_later(runtime_dir, tenant):
    backend = HostBackend(4096)
    begin_budget(backend, Config.from_env({"KVCACHED_BROKER": "0"}))
    begin_budget(backend, Config(runtime_dir=f"{runtime_dir}/none/at/all"))
    assert os.listdir(runtime_dir) == []
    begin_budget(backend, Config.from_env())
    assert until(lambda: list_tenants("cpu"))
    tenant("a").close()
    backend.shutdown()
