"""The demo on a GPU, with a small random model: real processes, one broker, a real kill."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from tiny_models import save_directory

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(500)]
FIGURES = (
    "requests_done", "preemptions", "ttft_ms", "tokens_per_s", "peak_backed_bytes",
    "idle_backed_bytes", "packed_floor_bytes",
)  # fmt: skip
# 12 KiB a token, so that a block of 16 tokens is a tenth of a page and a burst some hundred pages
SIZES = {"num_hidden_layers": 6, "num_key_value_heads": 4, "head_dim": 64, "hidden_size": 128}


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """What a short demo wrote; and its picture is one."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    place = tmp_path_factory.mktemp("demo")
    model = save_directory(place / "model", **SIZES)
    short = tempfile.mkdtemp(prefix="kv-", dir="/tmp")
    figures, picture = place / "demo.json", place / "demo.svg"
    command = [sys.executable, "-m", "kvcached", "demo", "--plain", "--device", "cuda",
               "--seconds", "40", "--model", str(model), "--json", str(figures),
               "--svg", str(picture)]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, "TMPDIR": short}, capture_output=True, text=True, check=False,
        timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    assert not list(Path(short).glob("kvcached-*")), "the demo left its runtime directory"
    shutil.rmtree(short, ignore_errors=True)
    ET.parse(picture)
    return json.loads(figures.read_text())


def test_the_document_has_its_fields(document):
    assert document["schema_version"] == 1
    assert document["backend"] == "cuda"
    assert document["dtype"] == "float32"
    assert document["machine"]["gpu"] == torch.cuda.get_device_name(0)
    assert document["budget_bytes"] % (2 * document["page_bytes"]) == 0
    for run in (document["static"], document["elastic"]):
        assert set(FIGURES) <= set(run)
        assert set(run["ttft_ms"]) == {"mean", "p50", "p99"}
        assert 0 < run["peak_backed_bytes"] <= document["budget_bytes"]


def test_a_split_makes_requests_wait_and_one_budget_fewer(document):
    static, elastic = document["static"], document["elastic"]
    assert static["requests_done"] == elastic["requests_done"]
    waits = [run["requests_queued"] + run["preemptions"] for run in (static, elastic)]
    assert waits[1] < waits[0]
    assert static["peak_backed_bytes"] > 0.9 * document["budget_bytes"]
    assert elastic["idle_backed_bytes"] <= 1.02 * elastic["packed_floor_bytes"]


def test_tokens_are_the_same_in_both_runs(document):
    assert document["tokens_identical"] is True, document["tokens_compared"]


def test_a_lowered_limit_is_obeyed(document):
    limit = document["limit"]
    assert limit["held_bytes"] <= limit["requested_bytes"] < limit["before_bytes"]


def test_a_killed_engines_bytes_go_to_the_other(document):
    kill = document["kill"]
    assert 0 < kill["bytes_returned"] <= document["budget_bytes"]
    assert 0 < kill["ms"] < 10_000
    assert kill["survivor_bytes"] > document["budget_bytes"] - kill["bytes_returned"]
