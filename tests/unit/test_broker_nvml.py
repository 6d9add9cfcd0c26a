"""NVML by its function table, and what the probe makes of a card."""

from __future__ import annotations

import ctypes
import threading

import pytest
from fake_nvml import GIB, LOST, NO_FUNCTION, UNKNOWN, UUID, FakeCard, FakeNvml

from kvcached.broker import nvml
from kvcached.broker.nvml import NvmlError, open_card
from kvcached.broker.probe import CardError, NvmlProbe, ShmemProbe, make_probe

MIB = 1 << 20


@pytest.fixture
def card(library):
    card = open_card(f"gpu-{UUID}", lambda: library)
    yield card
    card.close()


# --- the library ----------------------------------------------------------------------------------


def test_structures_have_the_sizes_of_the_header():
    assert ctypes.sizeof(nvml._Memory) == 24
    assert ctypes.sizeof(nvml._MemoryV2) == 40
    assert nvml._MemoryV2.total.offset == 8
    assert ctypes.sizeof(nvml._Process) == 24
    assert nvml._Process.used.offset == 8
    assert nvml._Process.gpu_instance.offset == 16


def test_memory_is_what_can_be_had(library, card):
    library.in_use = {7: 3 * GIB}
    memory = card.memory()
    assert (memory.used, memory.total) == (3 * GIB, 80 * GIB - GIB // 2)
    library.failing["nvmlDeviceGetMemoryInfo_v2"] = NO_FUNCTION
    old = card.memory()
    assert old.free == memory.free
    assert old.total == 80 * GIB


def test_processes(library, card):
    assert card.processes() == {}
    library.in_use = {7: GIB, 8: UNKNOWN}
    assert card.processes() == {7: GIB, 8: None}
    library.in_use = dict.fromkeys(range(1, 500), MIB)
    assert card.processes() == library.in_use
    library.failing["nvmlDeviceGetComputeRunningProcesses_v3"] = NO_FUNCTION
    assert card.processes() == library.in_use
    library.failing["nvmlDeviceGetComputeRunningProcesses_v2"] = LOST
    with pytest.raises(NvmlError, match="the GPU is lost"):
        card.processes()


def test_the_rest_that_doctor_asks(library, card):
    assert card.driver_version() == "580.159.03"
    assert not card.has_mig()
    library.mig = 1
    assert card.has_mig()


@pytest.mark.parametrize("uuid", [UUID, UUID.upper(), f"GPU-{UUID}", f"MIG-{UUID}"])
def test_a_slice_goes_by_another_name(uuid):
    library = FakeNvml(names=(f"MIG-{UUID}",))
    card = open_card(uuid, lambda: library)
    assert card.is_slice
    assert card.has_mig()
    card.close()
    assert library.opened == 0


def test_what_is_not_there_is_an_error_and_leaves_nothing_open(library):
    with pytest.raises(CardError, match="nvmlDeviceGetHandleByUUID: not found"):
        open_card("gpu-00000000", lambda: library)
    library.failing["nvmlInit_v2"] = 9
    with pytest.raises(CardError, match="the driver is not loaded"):
        open_card(UUID, lambda: library)


def test_a_machine_without_the_library(monkeypatch):
    monkeypatch.setattr(nvml, "LIBRARY", "libnonesuch.so.1")
    with pytest.raises(CardError, match="no libnonesuch"):
        open_card(UUID)


# --- the probe ------------------------------------------------------------------------------------


@pytest.fixture
def device():
    return FakeCard(80 * GIB, used=10 * GIB)


@pytest.fixture
def said():
    return []


@pytest.fixture
def probe(device, said):
    probe = NvmlProbe(lambda: device, capacity=79 * GIB, log=said.append)
    probe.wait_until_open()
    return probe


def test_the_dead_are_not_credited_while_the_device_lists_them(device, probe):
    device.pids = {7: 4 * GIB}
    probe.observe(4 * GIB)
    assert not probe.is_back(0, 7)
    device.pids, device.used = {}, 6 * GIB
    assert probe.is_back(0, 7)


def test_the_dead_are_not_credited_while_the_rest_cannot_account_for_what_is_in_use(device, probe):
    assert probe.is_back(0, 0)  # not seen yet what others use
    probe.observe(4 * GIB)  # 6 are others'
    device.used = 9 * GIB
    assert not probe.is_back(2 * GIB, 0)
    assert probe.is_back(3 * GIB, 0)
    device.used = 7 * GIB
    probe.observe(0)
    assert probe.foreign == 7 * GIB
    assert probe.is_back(0, 0)


def test_room_is_what_is_free_less_a_reserve(device, probe, said):
    assert probe.room() == 69 * GIB
    device.used = 80 * GIB - MIB
    assert probe.room() == MIB - GIB
    for capacity, reserve in ((80 * GIB, 0), (90 * GIB, 0), (79.5 * GIB, GIB // 2), (GIB, GIB)):
        other = NvmlProbe(lambda: device, capacity=int(capacity), log=said.append)
        other.wait_until_open()
        assert other.room() == MIB - reserve


def test_a_card_that_does_not_answer_is_told_once_and_counts_as_no_probe(device, probe, said):
    probe.observe(4 * GIB)
    device.silent, device.pids = True, {7: GIB}
    assert probe.is_back(0, 7)
    assert probe.room() is None
    probe.observe(0)
    assert said == ["warning: the GPU is lost; what others use of this device is not seen"]
    device.silent = False
    assert not probe.is_back(0, 7)


def test_until_the_card_is_open_nothing_waits_for_it(device, said):
    may_open = threading.Event()

    def open_slowly():
        may_open.wait(10)
        return device

    probe = NvmlProbe(open_slowly, capacity=GIB, log=said.append)
    probe.observe(0)
    assert probe.foreign is None
    assert probe.room() is None
    assert probe.is_back(0, 7)
    may_open.set()
    probe.wait_until_open()
    assert probe.room() is not None


def test_each_device_has_its_probe(monkeypatch, said):
    monkeypatch.setattr(nvml, "LIBRARY", "libnonesuch.so.1")
    assert isinstance(make_probe("cpu", capacity=1, foreign=5, log=said.append), ShmemProbe)
    probe = make_probe(f"gpu-{UUID}", capacity=1, foreign=5, log=said.append)
    probe.wait_until_open()
    assert probe.foreign == 5
    assert probe.is_back(0, 7)
    (line,) = said
    assert "no libnonesuch" in line
