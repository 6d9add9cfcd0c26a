"""The port of the vLLM server above a process, from command lines."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kvcached.engines.vllm.port import served_port

SERVE = ["/usr/bin/python3", "/venv/bin/vllm", "serve", "some/model"]
MODULE = ["python3", "-m", "vllm.entrypoints.openai.api_server", "--model", "some/model"]
CORE = ["VLLM::EngineCore"]  # it renames itself, and its arguments are gone


@pytest.fixture
def family(tmp_path):
    """A ``/proc`` with these command lines: ours first, then our parent's, and so on."""

    def make(*commands):
        for i, command in enumerate(commands):
            pid = os.getpid() if i == 0 else i
            folder = tmp_path / str(pid)
            folder.mkdir()
            (folder / "cmdline").write_bytes("\0".join([*command, ""]).encode())
            (folder / "stat").write_text(f"{pid} (a) b (c) S {i + 1} 1 1 0 -1")
        return str(tmp_path)

    return make


@pytest.mark.parametrize(
    ("options", "port"),
    [
        (["--port", "8001"], 8001),
        (["--port=8002", "--dtype", "float32"], 8002),
        (["--port", "1", "--port", "8003"], 8003),
        ([], 8000),
        (["--port"], None),
        (["--port", "many"], None),
        (["--port", "70000"], None),
        (["--config", "server.yaml"], None),
        (["--config=server.yaml"], None),
        (["--config", "server.yaml", "--port", "8004"], 8004),
        (["--uds", "/run/vllm.sock"], None),
        (["--headless"], None),
    ],
)
@pytest.mark.parametrize("start", [SERVE, MODULE])
def test_the_port_of_a_server(family, start, options, port):
    assert served_port(proc=family(CORE, [*start, *options])) == port


@pytest.mark.parametrize(
    "command",
    [
        ["vllm", "serve", "m"],
        ["/usr/bin/python3", "-m", "vllm.entrypoints.cli.main", "serve", "m"],
        ["python3", "/site-packages/vllm/entrypoints/openai/api_server.py"],
        ["uv", "run", "vllm", "serve", "m"],
    ],
)
def test_ways_to_start_a_server(family, command):
    assert served_port(proc=family(CORE, command)) == 8000


@pytest.mark.parametrize(
    "command",
    [
        ["jupyter", "lab", "--port", "8888"],
        ["vllm", "bench", "serve", "--port", "9"],
        ["python3", "offline.py", "--port", "9"],
        ["sh", "-c", "vllm serve m --port 9"],
        ["vllm"],
        [""],
    ],
)
def test_what_is_no_server(family, command):
    assert served_port(proc=family(CORE, command, ["systemd"])) is None


def test_the_nearest_server_counts_and_no_more_than_four_ancestors_are_asked(family):
    near = family(CORE, ["VLLM::Worker"], [*SERVE, "--port", "1"], [*SERVE, "--port", "2"])
    assert served_port(proc=near) == 1


def test_a_server_far_above_is_not_ours(family):
    assert served_port(proc=family(CORE, *[["sh"]] * 4, [*SERVE, "--port", "1"])) is None


def test_the_fourth_ancestor_is_asked(family):
    assert served_port(proc=family(CORE, *[["sh"]] * 3, [*SERVE, "--port", "1"])) == 1


def test_without_proc(tmp_path):
    assert served_port(proc=str(tmp_path)) is None


def test_a_real_child_of_a_process_with_that_command_line(tmp_path):
    script = tmp_path / "vllm"
    child = "from kvcached.engines.vllm.port import served_port; print(served_port())"
    script.write_text(
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}], check=True)\n"
    )
    command = [sys.executable, str(script), "serve", "m", "--port", "8123"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "8123\n"
