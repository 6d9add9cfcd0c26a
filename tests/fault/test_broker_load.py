"""Eight engines in one budget under random load: nobody starves, nobody has more than is leased."""

from __future__ import annotations

import time

import pytest
from fault.broker_engine import CAPACITY, PAGE
from fault.broker_rig import Rig, until

ENGINES = 8
SECONDS = 3.0


@pytest.mark.timeout(60)
def test_eight_engines_share_one_budget(runtime_dir):
    rig = Rig(runtime_dir / "r", slots=ENGINES)
    try:
        for slot in range(ENGINES):
            rig.start(slot, wait=False)
        for slot in range(ENGINES):
            rig.expect(slot, "ready")
        most, end = [0] * ENGINES, time.monotonic() + SECONDS
        full = looks = 0
        while time.monotonic() < end:
            with rig.frozen():
                held, device = list(rig.truth[:ENGINES]), rig.device()
            assert sum(held) <= device.leased_bytes <= CAPACITY
            leases = {tenant.name: tenant.lease_bytes for tenant in device.tenants}
            assert len(leases) == ENGINES
            assert all(leases[f"e{slot}"] >= nbytes for slot, nbytes in enumerate(held))
            most = [max(pair) for pair in zip(most, held, strict=True)]
            full, looks = max(full, device.leased_bytes), looks + 1
            time.sleep(0.05)
        assert looks > 5
        assert full > CAPACITY // 2, "they never had to share"
        assert min(most) >= 8 * PAGE, most
        for slot in range(ENGINES):
            output, errors = rig.end(slot)
            assert "Traceback" not in errors
            assert int(output.split()[-1]) > 50, "each page was looked at, and was as written"
        assert until(lambda: not rig.leftovers()), rig.leftovers()
    finally:
        rig.close()
