"""hostinfo: what the machine and its control groups leave us."""

import pytest

from kvcached import hostinfo
from kvcached.broker.capacity import default_capacity
from kvcached.config import Config
from kvcached.errors import BackendUnavailable
from kvcached.memory.host import HostBackend

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 1 GiB, 800 MiB of it available; writes the files of control groups."""
    (tmp_path / "meminfo").write_text("MemTotal: 1048576 kB\nMemAvailable:  819200 kB\n")
    monkeypatch.setattr(hostinfo, "MEMINFO", str(tmp_path / "meminfo"))
    monkeypatch.setattr(hostinfo, "OWN_CGROUPS", str(tmp_path / "own"))
    monkeypatch.setattr(hostinfo, "CGROUP_ROOT", str(tmp_path / "cgroup"))

    def write(own, **files):
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name.replace("__", "/").replace("_DOT_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")

    return write


def amounts():
    return [n // MIB for n in (hostinfo.total_bytes(), hostinfo.available_bytes())]


def test_without_control_groups_the_machine_decides(machine):
    assert amounts() == [1024, 800]
    assert hostinfo.cgroup_limit() is None


def test_version_2_counts_use_but_not_idle_files(machine):
    machine(
        "0::/a/b\n",
        a__b__memory_DOT_max=600 * MIB, a__b__memory_DOT_current=500 * MIB,
        a__b__memory_DOT_stat=f"anon 7\ninactive_file {300 * MIB}",
    )  # fmt: skip
    assert amounts() == [600, 400]


def test_the_tightest_group_above_decides(machine):
    machine(
        "0::/a/b\n",
        a__b__memory_DOT_max="max", a__memory_DOT_max=500 * MIB, a__memory_DOT_current=600 * MIB,
        memory_DOT_max=900 * MIB,
    )  # fmt: skip
    assert amounts() == [500, 0]
    assert hostinfo.cgroup_limit() == 500 * MIB


def test_a_container_sees_its_own_group_as_the_root(machine):
    machine("0::/host/name\n", memory_DOT_max=256 * MIB, memory_DOT_current=56 * MIB)
    assert amounts() == [256, 200]


def test_version_1(machine):
    machine(
        "3:cpu:/x\n7:memory:/x\n",
        memory__x__memory_DOT_limit_in_bytes=512 * MIB,
        memory__x__memory_DOT_usage_in_bytes=112 * MIB,
        memory__x__memory_DOT_stat=f"total_inactive_file {12 * MIB}",
        memory__memory_DOT_limit_in_bytes=(1 << 63) - 4096,  # no limit
    )
    assert amounts() == [512, 412]


def test_a_backend_and_a_broker_stay_within_the_group(machine):
    machine("0::/\n", memory_DOT_max=512 * MIB, memory_DOT_current=112 * MIB)
    backend = HostBackend(MIB)
    assert backend.capacity_bytes == 512 * MIB
    assert backend.available() == 400 * MIB
    backend.shutdown()
    assert default_capacity(Config(headroom="100MiB"), "cpu") == 300 * MIB
    assert default_capacity(Config(budget="50%"), "cpu") == 256 * MIB


def test_files_that_are_missing(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(hostinfo, "HUGE_PAGE", str(tmp_path / "none"))
    assert hostinfo.huge_page_bytes() == 2 * MIB
    with pytest.raises(BackendUnavailable, match="no Nonsense"):
        hostinfo.meminfo_bytes("Nonsense")
