"""Tables of documents come from result files, and only between their markers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent.parent / "bench"
MACHINE = {"cpus": 2, "memory_gib": 24.0, "system": "Linux 6.1", "python": "3.11.7"}


@pytest.fixture
def report(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_report", BENCH / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


PAGE = "before\n<!-- bench:alloc -->\nold\n<!-- /bench:alloc -->\nafter\n"


def test_without_a_file_the_block_is_emptied(report):
    assert report.render(PAGE) == "before\n<!-- bench:alloc -->\n<!-- /bench:alloc -->\nafter\n"


def test_a_result_becomes_a_table(report, tmp_path):
    result = {
        "title": "alloc and free", "date": "2026-11-25", "commit": "abc", "machine": MACHINE,
        "rows": [{"case": "k = 16", "unit": "us", "repeats": 50, "median": 3.14159, "p99": 1234.5}],
    }  # fmt: skip
    (tmp_path / "alloc.json").write_text(json.dumps(result))
    text = report.render(PAGE)
    assert "| alloc and free | median | p99 |" in text
    assert "| k = 16 | 3.14 us | 1,234 us |" in text or "| k = 16 | 3.14 us | 1,235 us |" in text
    assert "50 repeats, 2026-11-25, commit abc, 2 CPUs, 24.0 GiB, Linux 6.1" in text
    assert "old" not in text
    assert report.render(text) == text


def test_the_demo_becomes_two_columns(report, tmp_path):
    def run(peak):
        return {
            "requests_done": 40, "preemptions": 3, "tokens_per_s": 55.5, "peak_backed_bytes": peak,
            "ttft_ms": {"mean": 10.0, "p50": 9.0, "p99": 99.0}, "idle_backed_bytes": 1 << 20,
        }  # fmt: skip

    result = {
        "model": "SmolLM2", "budget_bytes": 256 << 20, "tokens_identical": True, "machine": MACHINE,
        "static": run(200 << 20), "elastic": run(120 << 20),
        "limit": {"requested_bytes": 64 << 20, "held_bytes": 64 << 20, "ms": 2.5},
        "kill": {"bytes_returned": 90 << 20, "ms": 12.0},
    }  # fmt: skip
    (tmp_path / "demo.json").write_text(json.dumps(result))
    text = report.render("<!-- bench:demo -->\n<!-- /bench:demo -->")
    assert "| peak memory | 200 MiB | 120 MiB |" in text
    assert "the tokens of both runs are the same" in text
    assert "had its 90 MiB in 12 ms" in text


def test_of_a_gpu_the_name_comes_first(report):
    machine = {**MACHINE, "gpu": "NVIDIA H100", "torch": "2.11.0"}
    assert report.host(machine).startswith("NVIDIA H100, torch 2.11.0, 2 CPUs, 24.0 GiB")


def test_the_documents_are_up_to_date(report, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", BENCH / "results")
    assert report.main(["--check"]) == 0, "run: python bench/report.py"
