"""A broker that is started before there is a tenant for it."""

from __future__ import annotations

import os

import pytest
from broker_tenant import MIB, device, tenants
from fault.broker_rig import until

from kvcached.broker import link
from kvcached.broker.admin import list_tenants
from kvcached.config import Config
from kvcached.memory.host import HostBackend
from kvcached.resources import begin_budget


@pytest.fixture
def tenant():
    with tenants() as make:
        yield make


def test_a_broker_that_was_started_early_is_the_one_that_tenants_find(tenant):
    link.start_early(Config.from_env(), "cpu", 64 * MIB, 30.0)
    pid = device().broker_pid
    link.start_early(Config.from_env(), "cpu", 32 * MIB, 30.0)
    one = tenant("a")
    assert (device().broker_pid, one.budget.capacity_bytes) == (pid, 64 * MIB)
    one.close()
    assert until(lambda: not list_tenants("cpu")), "it leaves as any other"


def test_a_broker_that_was_started_early_for_nobody_leaves(runtime_dir):
    link.start_early(Config.from_env(), "cpu", 64 * MIB, 0.1)
    assert until(lambda: not list_tenants("cpu"))


def test_a_budget_is_begun_beside_other_work_and_trouble_is_left_for_later(runtime_dir, tenant):
    backend = HostBackend(4096)
    begin_budget(backend, Config.from_env({"KVCACHED_BROKER": "0"}))
    begin_budget(backend, Config(runtime_dir=f"{runtime_dir}/none/at/all"))
    assert os.listdir(runtime_dir) == []
    begin_budget(backend, Config.from_env())
    assert until(lambda: list_tenants("cpu"))
    tenant("a").close()
    backend.shutdown()
