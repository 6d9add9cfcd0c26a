"""The commands: what they print, to whom, and with which exit code; against a real broker."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest
from cli_rig import COMMANDS, MIB, Owner

from kvcached.cli import tenants

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


def test_a_limit_below_the_floor_says_so(run, runtime_dir):
    owner = Owner("sure", floor_bytes=64 * MIB)
    try:
        assert run("kvctl", "limit", "sure", "128MiB")[1].endswith("holds 100.0 MiB\n")
        code, out, _ = run("kvctl", "limit", "sure", "32MiB", "--dry-run")
        assert (code, "below its floor of 64.0 MiB" in out) == (0, True)
        change = json.loads(run("kvctl", "limit", "sure", "96MiB", "--json")[1])
        assert (change["floor_bytes"], change["applied"]) == (64 * MIB, True)
    finally:
        owner.close()


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
    assert "<str>" not in out


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


@pytest.mark.parametrize("command", COMMANDS)
def test_version(run, command):
    code, out, _ = run(command, "--version")
    assert code == 0
    assert out.startswith("kvcached-py 0.")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_shell_completes_commands_options_and_names(run, owners, command, monkeypatch):
    code, out, _ = run(command, "--show-completion", "bash")
    assert code == 0
    assert out.rstrip().endswith(f"complete -o default -F _{command}_completion {command}")
    line, wanted = ("kvtop --dev", "--device") if command == "kvtop" else (
        f"{command} limit q", "qwen3-8b")  # fmt: skip
    monkeypatch.setenv(f"_{command.upper()}_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
    assert run(command)[1].split() == [wanted]


def test_completion_is_silent_about_what_is_wrong(runtime_dir):
    assert tenants.completions() == []
    runtime_dir.chmod(0o777)
    assert tenants.completions() == []
    runtime_dir.chmod(0o700)


def test_what_cannot_be_a_size_needs_no_broker(run):
    code, _, err = run("kvctl", "limit", "qwen", "8X")
    assert (code, err.startswith("error[KV305]: '8X' is not a size")) == (2, True)


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


@pytest.mark.parametrize("terminal", ["dumb", "xterm"])
def test_top_in_a_terminal_that_cannot_redraw_writes_lines(owners, terminal):
    """And with --plain in any; an empty line parts two looks."""
    main, side = pty.openpty()
    command = [sys.executable, "-c", "from kvcached.cli import kvtop; kvtop()", "--seconds", "0.1"]
    command += ["--plain"] * (terminal == "xterm")
    env = {**os.environ, "TERM": terminal, "COLUMNS": "80"}
    process = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, env=env)
    os.close(side)
    try:
        seen = _read_until(main, b"\r\n\r\ncpu: 200.0 MiB")
        assert seen.count(b"qwen3-8b") >= 2
        assert b"\x1b" not in seen
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
