"""The whole demo with a tiny model: real processes, real broker, real kill; nothing stays."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import save_directory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
FIGURES = (
    "requests_done", "preemptions", "ttft_ms", "tokens_per_s", "peak_backed_bytes",
    "idle_backed_bytes", "packed_floor_bytes",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_directory(tmp_path_factory.mktemp("tiny"), num_hidden_layers=2)


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A short path, since that of a socket may have at most 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="kv-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def demo(model, temporary):
    """Start ``kvcached demo`` with a temporary directory of its own; checks it is empty after."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "kvcached", "demo", "--plain", "--seconds", "10",
                   "--model", str(model), *arguments]  # fmt: skip
        environ = {**os.environ, "TMPDIR": str(temporary)}
        # Where a shell started the tests in the background they ignore SIGINT, and what they start
        # inherits that, as it should: but here Ctrl-C is tested.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
        )
        signal.signal(signal.SIGINT, before)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()
        for stream in (process.stdout, process.stderr):
            stream.close()
    _wait_until_alone(temporary)
    assert not list(temporary.glob("kvcached-*"))


def _processes_of(temporary: Path) -> list[str]:
    """Processes that were started with this temporary directory."""
    mark, found = os.fsencode(f"TMPDIR={temporary}"), []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # gone since the listing
            continue
    return found


def _wait_until_alone(temporary: Path) -> None:
    end = time.monotonic() + 20
    while (left := _processes_of(temporary)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left


def _engines(temporary: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if (
                entry.name.isdigit()
                and b"kvcached.demo.worker" in (entry / "cmdline").read_bytes()
                and os.fsencode(f"TMPDIR={temporary}") in (entry / "environ").read_bytes()
            ):
                found.append(int(entry.name))
        except OSError:  # gone since the listing
            continue
    return found


def _wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    for line in process.stderr:
        if text in line:
            return
    pytest.fail(f"the demo ended without saying {text!r}")


def test_the_whole_demo(demo, model, tmp_path):
    figures, picture = tmp_path / "demo.json", tmp_path / "demo.svg"
    process = demo("--json", str(figures), "--svg", str(picture))
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    document = json.loads(figures.read_text())
    assert document["schema_version"] == 1
    assert document["backend"] == "host"
    assert document["model"] == model.name
    budget = document["budget_bytes"]
    for name in ("static", "elastic"):
        run = document[name]
        assert set(FIGURES) <= set(run)
        assert run["requests_done"] == 24
        assert set(run["ttft_ms"]) == {"mean", "p50", "p99"}
        assert 0 < run["peak_backed_bytes"] <= budget
        assert run["peak_kernel_bytes"] <= 1.05 * run["peak_backed_bytes"] + (1 << 20)
    assert document["static"]["requests_queued"] > 0
    assert document["static"]["peak_backed_bytes"] > 0.9 * budget
    elastic = document["elastic"]
    assert elastic["idle_backed_bytes"] <= 1.02 * elastic["packed_floor_bytes"]
    assert document["tokens_identical"] is True
    limit, kill = document["limit"], document["kill"]
    assert limit["held_bytes"] <= limit["requested_bytes"] < limit["before_bytes"]
    assert 0 < limit["ms"] < 10_000
    assert 0 < kill["bytes_returned"] <= budget
    assert 0 < kill["ms"] < 10_000
    assert kill["survivor_bytes"] > budget - kill["bytes_returned"]
    assert "static split" in out
    assert "kill -9" in err
    ET.parse(picture)


def test_ctrl_c_ends_it_and_nothing_stays(demo):
    process = demo()
    _wait_for_line(process, "--- static ---")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_sigterm_while_the_engines_load_ends_it_and_nothing_stays(demo):
    process = demo()
    _wait_for_line(process, "in two processes")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


def test_a_dead_engine_is_reported_and_nothing_stays(demo, temporary):
    process = demo()
    _wait_for_line(process, "--- static ---")
    os.kill(_engines(temporary)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ended with code -9" in err


def test_a_killed_demo_takes_its_engines_with_it(demo, temporary):
    process = demo()
    _wait_for_line(process, "--- static ---")
    process.kill()
    process.wait()
    _wait_until_alone(temporary)
    for left in temporary.glob("kvcached-demo-*"):  # nobody was left to remove it
        assert not list(left.glob("*.sock"))
        shutil.rmtree(left)


def test_a_file_that_cannot_be_written_is_refused_at_once(demo, tmp_path):
    process = demo("--json", str(tmp_path / "none" / "x.json"))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "cannot write" in err
