"""``kvcached doctor --vllm``: seams, plug-in and switches, without a vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata

import pytest
import vllm_sources

from kvcached import cli
from kvcached.cli import doctor, vllm
from kvcached.engines.vllm import seams


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine with vLLM 0.32.0 and our plug-in, whatever this one has."""
    monkeypatch.setattr(seams, "installed_version", lambda: "0.32.0")
    monkeypatch.setattr(seams, "installed_source", vllm_sources.NEW.get)
    ours = metadata.EntryPoint("kvcached", "kvcached.engines.vllm:register", vllm.GROUP)
    monkeypatch.setattr(vllm.metadata, "entry_points", lambda group: [ours])
    monkeypatch.setattr(vllm, "check_package", list)
    for name in ("KVCACHED", "ENABLE_KVCACHED", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def run(capfd):
    def run(*args):
        with pytest.raises(SystemExit) as caught:
            cli.main(["doctor", "--vllm", *args])
        return int(caught.value.code or 0), capfd.readouterr().out

    return run


def by_name(checks, name):
    (found,) = [check for check in checks if check.name == name]
    return found


def test_all_is_there(run):
    code, out = run()
    assert code == 0
    assert out.count("ok    scheduler") == len(seams.SCHEDULER)
    assert out.count("ok    worker") == len(seams.WORKER)
    assert "allocate_kv_cache (kv_cache_config, device, layout, kernel_block_sizes), layout" in out
    assert "info  KVCACHED       off in this shell" in out
    assert out.endswith("no problems; vLLM becomes elastic here, when started with KVCACHED=1\n")


def test_as_json(run):
    code, out = run("--json")
    data = json.loads(out)
    assert (code, data["ok"], data["schema_version"]) == (0, True, 1)
    names = {check["name"] for check in data["checks"]}
    assert {"KVCACHED", "plug-in", "VLLM_PLUGINS", "vllm", "scheduler", "worker"} <= names


@pytest.mark.parametrize(
    ("variable", "value", "status", "text"),
    [
        ("KVCACHED", "1", "ok", "on"),
        ("KVCACHED", "strict", "ok", "strict: elastic, or an error"),
        ("ENABLE_KVCACHED", "true", "ok", "on"),
        ("KVCACHED", "0", "info", "off in this shell"),
        ("KVCACHED", "maybe", "fail", "KVCACHED='maybe' cannot work"),
    ],
)
def test_the_switch(machine, variable, value, status, text):
    machine.setenv(variable, value)
    checks = vllm.run_checks()
    found = by_name(checks, "KVCACHED")
    assert (found.status, found.detail) == (status, text)
    assert vllm.becomes_elastic(checks) is (status != "fail")
    assert ("when started" in vllm.verdict(checks)) is (status == "info")


def test_a_setting_that_would_end_the_engine_is_found_before(machine, run):
    machine.setenv("KVCACHED_LIMIT", "lots")
    code, out = run()
    assert code == 1
    assert "fail  settings       KVCACHED_LIMIT='lots': 'lots' is not a size" in out
    machine.setenv("KVCACHED_LIMIT", "40%")
    code, out = run()
    assert (code, "KVCACHED_LIMIT=40%" in out, "fail" in out) == (0, True, False)


@pytest.mark.parametrize(
    ("value", "status", "fix"),
    [
        ("kvcached", "ok", ""),
        ("other,kvcached", "ok", ""),
        ("other", "fail", "export VLLM_PLUGINS=other,kvcached"),
        ("", "fail", "export VLLM_PLUGINS=kvcached"),
        ("other, kvcached", "fail", "export VLLM_PLUGINS=other, kvcached,kvcached"),
    ],
)
def test_the_allow_list_is_read_as_vllm_reads_it(machine, value, status, fix):
    machine.setenv("VLLM_PLUGINS", value)
    found = by_name(vllm.run_checks(), "VLLM_PLUGINS")
    assert (found.status, found.fix) == (status, fix)


@pytest.mark.parametrize("value", [None, "kvcached.integration:patch"])
def test_a_plug_in_that_vllm_cannot_find(machine, run, value):
    theirs = [] if value is None else [metadata.EntryPoint("kvcached", value, vllm.GROUP)]
    machine.setattr(vllm.metadata, "entry_points", lambda group: theirs)
    code, out = run()
    assert code == 1
    assert "fail  plug-in" in out
    assert "try  pip install kvcached-py" in out


def test_a_seam_that_is_gone(machine, run):
    gone = dict(vllm_sources.NEW)
    del gone["vllm.v1.core.sched.scheduler"]
    machine.setattr(seams, "installed_source", gone.get)
    code, out = run()
    assert code == 1
    assert "fail  scheduler      vllm.v1.core.sched.scheduler.Scheduler.schedule is missing" in out
    assert "pip install -U kvcached-py" in out
    assert out.endswith("4 problems; vLLM cannot become elastic here\n")


def test_an_allocation_that_is_not_known(machine):
    rest = {**vllm_sources.SCHEDULER, **vllm_sources.WORKER,
            "vllm.v1.worker.utils": vllm_sources.OLD["vllm.v1.worker.utils"]}  # fmt: skip
    checks = vllm.run_checks(rest.get)
    assert by_name(checks, "allocation").detail.startswith("none that is known: vllm.v1.worker.")
    assert not vllm.becomes_elastic(checks)


def test_a_release_that_was_never_tried_is_no_failure(machine):
    machine.setattr(seams, "installed_version", lambda: "0.99.0")
    checks = vllm.run_checks()
    assert by_name(checks, "vllm").status == "warn"
    assert vllm.becomes_elastic(checks)


def test_without_vllm(machine, run):
    machine.setattr(seams, "installed_version", lambda: None)
    code, out = run()
    assert code == 1
    assert "fail  vllm           not installed here" in out
    assert "scheduler" not in out


def test_it_starts_light():
    code = (
        "import sys\nfrom kvcached.cli import vllm\nvllm.run_checks()\n"
        "heavy = {'vllm', 'torch', 'numpy', 'numba'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_plain_doctor_is_as_it_was():
    assert doctor.verdict([]) == "device='cpu' works here"
