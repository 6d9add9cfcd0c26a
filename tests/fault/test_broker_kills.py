"""Engines and brokers killed at random moments: no byte lost, no survivor hurt, nothing left."""

from __future__ import annotations

import random
import time

import pytest
from fault.broker_engine import CAPACITY
from fault.broker_rig import Rig, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.fixture
def rig(runtime_dir):
    rig = Rig(runtime_dir / "r")
    yield rig
    rig.close()


def check_frozen(rig):
    """Ledger >= truth for each engine, and truth <= capacity."""
    with rig.frozen():
        device = rig.device()
        if device is None:  # between two brokers nothing is claimed about the ledger
            assert sum(rig.truth) <= CAPACITY
            return
        leases = {tenant.name: tenant.lease_bytes for tenant in device.tenants}
        truth = {f"e{slot}": rig.truth[slot] for slot in range(len(rig.engines))}
    assert sum(truth.values()) <= CAPACITY
    for name, nbytes in truth.items():
        assert leases.get(name, nbytes) >= nbytes, (name, leases, truth)


@pytest.mark.parametrize(
    ("count", "engine_kills", "broker_kills"), [(2, 60, 10), (4, 90, 15), (8, 150, 25)]
)
def test_random_kills_of_engines_and_brokers(rig, count, engine_kills, broker_kills):
    rng = random.Random(count)
    for slot in range(count):
        rig.start(slot, wait=False)
    for slot in range(count):
        rig.expect(slot, "ready")
    victims = ["engine"] * engine_kills + ["broker"] * broker_kills
    rng.shuffle(victims)
    survivors = rig.engines[0]
    for step, victim in enumerate(victims):
        if victim == "broker":
            rig.kill_broker()
        else:
            slot = rng.randrange(1, count)
            rig.kill(slot)
            rig.start(slot, wait=False)
        time.sleep(rng.uniform(0, 0.02))
        if step % 10 == 0:
            check_frozen(rig)
    assert survivors.poll() is None
    for slot in range(count):
        assert "Traceback" not in rig.end(slot)
    assert until(lambda: not rig.leftovers()), rig.leftovers()
    assert sum(rig.truth) == 0
