"""Engines and brokers killed at random moments: no byte lost, no survivor hurt, nothing left."""

from __future__ import annotations

import random
import signal
import time

import pytest
from fault.broker_engine import CAPACITY
from fault.broker_rig import CACHE, TINY, Rig, until

from kvcached.broker.probe import shmem_bytes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

LOADS = [(TINY, 2, 42, 12), (TINY, 4, 150, 18), (TINY, 8, 100, 18), (CACHE, 3, 8, 2)]
"""What kind of engine, how many of them, and how often one of them and the broker are killed."""


def test_as_many_are_killed_as_is_promised():
    assert sum(kills for _, _, kills, _ in LOADS) >= 300
    assert sum(kills for _, _, _, kills in LOADS) >= 50


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


def kill_one(rig, rng, slots):
    """Kill an engine that holds memory, and start it again. Returns what it held when it died.

    One that has just started is still reading its imports: killing it would show nothing. On a
    machine where others work too, those of a ``KVCache`` take ten seconds and more.
    """
    holders = until(lambda: [slot for slot in slots if rig.truth[slot]], 40.0)
    assert holders, "no engine came to hold memory"
    slot = rng.choice(holders)
    process = rig.engines[slot]
    held, errors = rig.kill(slot)
    assert process.returncode == -signal.SIGKILL, errors
    assert "Traceback" not in errors
    rig.start(slot, wait=False)
    return held


@pytest.mark.parametrize(
    ("engine", "count", "engine_kills", "broker_kills"),
    LOADS,
    ids=["two", "four", "eight", "cache"],
)
def test_random_kills_of_engines_and_brokers(
    runtime_dir, engine, count, engine_kills, broker_kills
):
    rig, rng, before = Rig(runtime_dir / "r", engine=engine), random.Random(count), shmem_bytes()
    try:
        for slot in range(count):
            rig.start(slot, wait=False)
        for slot in range(count):
            rig.expect(slot, "ready")
        victims = ["engine"] * engine_kills + ["broker"] * broker_kills
        rng.shuffle(victims)
        held = []
        for step, victim in enumerate(victims):
            if victim == "broker":
                rig.kill_broker()
            else:
                held.append(kill_one(rig, rng, range(1, count)))
            time.sleep(rng.uniform(0, 0.02))
            if step % 10 == 0:
                check_frozen(rig)
        assert len(held) == engine_kills
        assert sum(nbytes > 0 for nbytes in held) >= 0.8 * engine_kills, held
        check_the_end(rig, count, before)
    finally:
        rig.close()


def check_the_end(rig, count, before):
    """The others die too; what is leased then is what the survivor holds, to the byte."""
    for slot in range(1, count):
        rig.kill(slot)
    survivor = rig.engines[0]
    assert survivor.poll() is None
    survivor.send_signal(signal.SIGUSR1)
    assert until(lambda: rig.truth[0] and (d := rig.device()) and d.leased_bytes == rig.truth[0])
    assert [tenant.name for tenant in rig.device().tenants] == ["e0"]
    output, errors = rig.end(0)
    assert "Traceback" not in errors
    assert int(output.split()[-1]) > 100, "the survivor found its own contents, page by page"
    assert until(lambda: not rig.leftovers()), rig.leftovers()
    assert until(lambda: shmem_bytes() - before < CAPACITY // 4, 20.0), "shared memory is left"
