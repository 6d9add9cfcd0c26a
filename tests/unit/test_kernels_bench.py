"""The bench of the kernels runs on tiny shapes, and its table is what the file says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.timeout(400)
ROOT = Path(__file__).parents[2]


def _bench(folder, *args):
    env = os.environ | {"OUT": str(folder), "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [sys.executable, "bench/kernels.py", "--dry", *args], cwd=ROOT, env=env, timeout=380,
        check=False, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_every_row_runs_or_says_what_it_lacks(tmp_path):
    done = _bench(tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert result["failed"] == [] == result["left"]
    rows = {row["id"]: row for row in result["rows"]}
    assert {"D0", "D3_strided", "D13", "S2", "C1", "X1", "M4", "P7", "W1_b256", "G1_compact",
            "O1_both"} <= set(rows)  # fmt: skip
    for ident, row in rows.items():
        if "missing" in row:  # what runs on GPUs only is no mistake here
            assert (
                "kvcached.kernels has no" in row["missing"]
                or "GPU" in row["missing"]
                or ("not supported yet" in row["missing"])
            )
            continue
        assert row["error"] < 0.02, (ident, row)
        assert row.get("error_rms", 0) <= row["error"], (ident, row)
        assert row.get("runs_equal", True), ident
        assert row["us"] > 0 and row["p99"] >= row["us"]
    ways = {"FlexAttention", "FlexAttention, contiguous"}
    assert rows["D0"]["peers"].keys() == {"torch, contiguous"} | ways
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import report
    finally:
        sys.path.remove(str(ROOT / "bench"))
    table = report.kernels_table(result)
    for ident, row in rows.items():
        assert f"`{ident}`" in table
        if "peers" in row and ident[0] in "DSMP":
            assert f"{row['error']:.1e} / {row['error_rms']:.2e}" in table


@pytest.mark.slow
def test_rows_are_run_once_in_other_processes_and_parts_of_a_run_are_merged(tmp_path):
    """As on two GPUs: what one lacks comes from the other, and a row that ran wins."""
    for name, rows in (("a", ["D0", "M2"]), ("b", ["W1_b256", "D0"])):
        done = _bench(tmp_path / name, *rows, "--processes", "1")
        assert done.returncode == 0, done.stderr
        assert "compiled in" in done.stdout
    one = json.loads((tmp_path / "a/kernels.json").read_text())
    two = json.loads((tmp_path / "b/kernels.json").read_text())
    one["rows"][0] = {"id": "D0", "failed": "it did"}
    one["left"], one["failed"] = ["W1_b256", "S1"], ["D0"]
    (tmp_path / "a/kernels.json").write_text(json.dumps(one))
    parts = [str(tmp_path / name / "kernels.json") for name in "ab"]
    assert _bench(tmp_path / "whole", "--merge", *parts).returncode == 0
    whole = json.loads((tmp_path / "whole/kernels.json").read_text())
    assert [row["id"] for row in whole["rows"]] == ["D0", "M2", "W1_b256"]
    assert whole["rows"][0] == two["rows"][1]
    assert (whole["left"], whole["failed"]) == (["S1"], [])
    assert [run["rows"] for run in whole["runs"]] == [["D0", "M2"], ["W1_b256", "D0"]]
    (tmp_path / "b/kernels.json").write_text(json.dumps(two | {"device": "another"}))
    refused = _bench(tmp_path / "whole", "--merge", *parts)
    assert refused.returncode == 1
    assert "device differs" in refused.stderr


def test_rows_are_chosen_by_name_or_beginning_and_others_refused(tmp_path):
    done = _bench(tmp_path, "W1", "D3_page1", "--seconds", "0")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "kernels.json").read_text())["left"] == [
        "W1_b256", "W1_8192", "D3_page1"]  # fmt: skip
    refused = _bench(tmp_path, "Z9")
    assert refused.returncode == 1
    assert "no row is or starts with 'Z9'" in refused.stderr
