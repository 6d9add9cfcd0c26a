"""Gauges at vLLM's /metrics, with a stand-in for the client library that vLLM brings."""

from __future__ import annotations

import types

import pytest

from kvcached.engines.vllm import gauges
from kvcached.errors import BrokerUnavailable
from kvcached.stats import DeviceSnapshot, LimitRecord, TenantReport, TenantSnapshot


class Family:
    def __init__(self, name, text, labels):
        self.name, self.labels, self.samples = name, labels, {}

    def add_metric(self, labels, value):
        self.samples[labels] = value


@pytest.fixture
def library(monkeypatch):
    registered = []
    client = types.SimpleNamespace(
        GaugeMetricFamily=Family, REGISTRY=types.SimpleNamespace(register=registered.append)
    )
    monkeypatch.setattr(gauges, "import_module", lambda name: client)
    return registered


def tenant(name):
    report = TenantReport(backed_bytes=70, in_use_bytes=30, cached_bytes=20, spare_bytes=10)
    return TenantSnapshot(name, 7, 0, "live", 80, LimitRecord(100, 0, 80), report, 1.0,
                          {"model": "tiny"})  # fmt: skip


def test_each_engine_is_a_sample_of_each_gauge(library, monkeypatch):
    device = DeviceSnapshot(1, "cpu", 200, 160, 1, 1, (tenant("a"), tenant("b")))
    monkeypatch.setattr(gauges, "list_tenants", lambda config: [device])
    assert gauges.register()
    (collector,) = library
    assert collector.describe() == []
    found = {family.name: family for family in collector.collect()}
    key = ("a", "cpu", "7", "tiny")
    values = {name.removeprefix("kvcached_"): f.samples[key] for name, f in found.items()}
    assert values == {"lease_bytes": 80, "limit_bytes": 100, "in_use_bytes": 30,
                      "cached_bytes": 20, "spare_bytes": 10}  # fmt: skip
    assert len(found["kvcached_lease_bytes"].samples) == 2


def test_a_scrape_without_a_broker_is_empty_and_no_error(library, monkeypatch):
    def nobody(config):
        raise BrokerUnavailable("nobody listens")

    monkeypatch.setattr(gauges, "list_tenants", nobody)
    assert all(not f.samples for f in gauges.TenantCollector().collect())


def test_without_the_client_library(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(gauges, "import_module", missing)
    assert not gauges.register()
