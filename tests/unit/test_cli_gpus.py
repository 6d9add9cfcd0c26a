"""``kvcached doctor`` on GPUs, from facts, a fake NVML and a fake driver."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest
from fake_nvml import GIB, UNKNOWN, UUID

from kvcached.broker.nvml import open_card
from kvcached.cli import costs
from kvcached.cli.gpus import gpu_checks
from kvcached.cli.probes import DriverFacts, Gpu
from kvcached.errors import BackendUnavailable
from kvcached.testing import FakeCudaDriver

MIB = 1 << 20
GPU = Gpu(0, "Fake GPU", f"GPU-{UUID}", 79 * GIB, virtual_memory=True, page_bytes=2 * MIB,
          fd_handles=True)  # fmt: skip


@pytest.fixture
def driver():
    driver = FakeCudaDriver(2 * MIB, capacity=GIB)
    yield driver
    assert not any(driver.open_resources().values())


@pytest.fixture
def checks(library, driver):
    """The findings by name."""

    def run(*gpus, bindings="13.0.1", cuda="13.0", load=lambda: driver):
        facts = DriverFacts("", cuda, list(gpus or [GPU]))
        found = gpu_checks(
            facts, bindings=bindings, find=lambda uuid: open_card(uuid, lambda: library), load=load
        )
        return {check.name: check for check in found}

    return run


def test_a_gpu_in_order(checks, library):
    library.in_use = {os.getpid(): 3 * GIB, 1 << 30: UNKNOWN}
    started = time.monotonic()
    found = checks()
    assert time.monotonic() - started < 5.0
    assert {check.status for check in found.values()} == {"ok", "info"}
    assert found["nvidia driver"].detail == "580.159.03, CUDA 13.0; cuda-bindings 13.0.1"
    assert "2.0 MiB pages that can be shared as file descriptors" in found["gpu 0"].detail
    held = found["gpu 0 memory"].detail
    assert f"({os.getpid()}) 3.0 GiB" in held
    assert f"process ({1 << 30})" in held
    shown = found["gpu 0 costs"].detail
    assert shown.startswith("2.0 MiB: create ")
    assert "64.0 MiB: create " in shown
    assert "layout" in found["gpu 0 advice"].detail


def test_many_holders_are_counted(checks, library):
    library.in_use = dict.fromkeys(range(1 << 30, (1 << 30) + 9), GIB)
    assert checks()["gpu 0 memory"].detail.endswith(" and 5 more")


def test_modes_in_which_nobody_can_share(checks):
    found = checks(replace(GPU, compute_mode=3))
    assert found["gpu 0 mode"].status == "warn"
    assert "exclusive process: one process only" in found["gpu 0 mode"].detail
    assert found["gpu 0 mode"].fix.endswith("-c DEFAULT")
    found = checks(replace(GPU, compute_mode=2))
    assert "prohibited: nobody can use it" in found["gpu 0 mode"].detail
    assert "gpu 0 costs" not in found


def test_a_gpu_without_virtual_memory_is_not_measured_but_the_next_one_is(checks):
    other = replace(GPU, index=1)
    found = checks(replace(GPU, virtual_memory=False), other, replace(GPU, index=2))
    assert found["gpu 0"].status == "warn"
    assert "gpu 1 costs" in found
    assert "gpu 2 costs" not in found


def test_mig(checks, library):
    library.mig = 1
    assert checks()["gpu 0 mig"].detail.startswith("MIG is on")
    library.names = (f"MIG-{UUID}",)
    assert checks()["gpu 0 mig"].detail.startswith("a MIG slice")


def test_bindings_newer_than_the_driver(checks):
    check = checks(cuda="12.8")["nvidia driver"]
    assert check.status == "warn"
    assert "cuda-bindings==12.*" in check.fix
    found = checks(bindings=None)
    assert found["nvidia driver"].status == "ok"
    assert "gpu 0 costs" not in found


def test_without_nvml(checks, library):
    library.names = ()
    found = checks()
    assert "NVML does not answer" in found["nvidia driver"].detail
    assert "gpu 0 memory" not in found
    assert "gpu 0 costs" in found


def test_a_card_that_is_lost(checks, library):
    library.failing["nvmlDeviceGetComputeRunningProcesses_v3"] = 15
    library.failing["nvmlSystemGetDriverVersion"] = 15
    found = checks()
    assert found["nvidia driver"].detail.startswith("CUDA 13.0")
    assert "the GPU is lost" in found["gpu 0 memory"].detail


def test_a_full_card_is_left_alone(checks, library, driver):
    library.in_use = {7: library.total - GIB}
    assert "not measured" in checks()["gpu 0 costs"].detail
    assert not driver.calls


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (BackendUnavailable("cuda.bindings cannot be imported"), "cannot be imported"),
        (RuntimeError("function cuMemCreate is not found"), "cuMemCreate is not found"),
    ],
)
def test_a_driver_that_cannot_be_used(checks, error, text):
    def load():
        raise error

    check = checks(load=load)["gpu 0 costs"]
    assert check.status == "warn"
    assert text in check.detail


def test_a_driver_that_fails_leaves_nothing_behind(checks, driver):
    driver.fail("cuMemCreate", at=3, status="CUDA_ERROR_OUT_OF_MEMORY")
    assert "CUDA_ERROR_OUT_OF_MEMORY" in checks()["gpu 0 costs"].detail


def test_no_driver():
    (check,) = gpu_checks(DriverFacts("no NVIDIA driver"), bindings=None)
    assert check.status == "info"
    assert "device='cpu' only" in check.detail


def test_costs_are_those_of_the_driver(driver):
    class SlowDriver(FakeCudaDriver):
        def cuMemSetAccess(self, *arguments):  # noqa: N802
            time.sleep(0.002)
            return super().cuMemSetAccess(*arguments)

    slow = SlowDriver(2 * MIB, capacity=GIB)
    small, large = costs.measure("cuda:0", slow, seconds=0.05, handle_bytes=4 * MIB)
    assert (small.nbytes, large.nbytes) == (2 * MIB, 4 * MIB)
    assert list(small.micros) == ["create", "map", "access", "unmap", "release"]
    assert small.micros["access"] >= 2000
    assert small.micros["map"] < 2000
    assert small.up >= 2000
    assert not any(slow.open_resources().values())


def test_advice():
    def of(nbytes, up):
        return costs.Costs(nbytes, {"create": up})

    assert "KVCACHED_MAX_HANDLE at 64.0 MiB or more" in costs.advice(
        [of(2 * MIB, 54.0), of(64 * MIB, 60.0)]
    )
    text = costs.advice([of(2 * MIB, 54.0), of(64 * MIB, 1700.0)])
    assert "1 GiB more takes 27.6 ms in handles of 2.0 MiB and 27.2 ms" in text
    assert "small handles cost little" in text
