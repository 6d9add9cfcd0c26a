"""Whether two runs of the demo gave the same tokens: a stock run tells ties from differences."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tiny_models import make_model, save_directory

from kvcached.demo.figures import Recording
from kvcached.demo.verify import TIE, compare
from kvcached.demo.workload import Request
from kvcached.errors import EngineUnsupported

PROMPT = (7, 8, 9)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return save_directory(tmp_path_factory.mktemp("tiny"))


def _ranked(after: int) -> tuple[list[int], list[float]]:
    """Tokens and their logits after ``PROMPT`` and one more, the best first, in a stock run."""
    with torch.inference_mode():
        logits = make_model()(input_ids=torch.tensor([[*PROMPT, after]])).logits[0, -1]
    values, tokens = logits.sort(descending=True)
    return tokens.tolist(), values.tolist()


def _near_tie() -> tuple[int, int, int, float]:
    """A token, two that may follow it and whose logits nearly tie, and the gap of those."""
    for after in range(50):
        tokens, values = _ranked(after)
        for i in range(len(tokens) - 1):
            if values[i] - values[i + 1] <= TIE / 2:  # far enough from TIE for other rounding
                return after, tokens[i], tokens[i + 1], values[i] - values[i + 1]
    pytest.fail("no two logits nearly tie")


def _recording(name: str, tokens: list[list[int]]) -> Recording:
    requests = tuple(Request(i, "chat", 0.0, PROMPT, 8) for i in range(len(tokens)))
    recording = Recording(name, requests, start=0.0)
    for i, generated in enumerate(tokens):
        recording.on_event({"event": "first", "engine": "chat", "id": i, "t": 1.0})
        recording.on_event({
            "event": "done", "engine": "chat", "id": i, "t": 2.0, "tokens": generated,
            "preemptions": 0, "queued": False,
        })  # fmt: skip
    return recording


def _compare(static, elastic, directory: Path):
    return compare(
        _recording("static", static), _recording("elastic", elastic), directory, "cpu", os.environ
    )


def test_a_tie_is_excused_and_a_real_difference_is_not(directory):
    after, a, b, gap = _near_tie()
    best, *_, worst = _ranked(6)[0]
    static = [[1, 2], [after, a, 3], [6, best], [4, 4, 4]]
    elastic = [[1, 2], [after, b, 9], [6, worst], [4, 4]]

    only_ties = _compare(static[:2], elastic[:2], directory)
    assert only_ties["tokens_identical"] is True
    assert only_ties["tokens_compared"]["equal"] == 1

    result = _compare(static, elastic, directory)
    assert result["tokens_identical"] is False
    compared = result["tokens_compared"]
    assert (compared["requests"], compared["equal"]) == (4, 1)
    tie, real, short = compared["differences"]
    assert (tie["request"], tie["tie"]) == (1, True)
    assert tie["logit_gap"] == pytest.approx(gap, abs=1e-5)
    assert (real["request"], real["tie"]) == (2, False)
    assert real["logit_gap"] > 1
    assert short == {"request": 3, "logit_gap": -1.0, "tie": False}


def test_equal_runs_need_no_stock_run(tmp_path):
    result = _compare([[1, 2], [3]], [[1, 2], [3]], tmp_path / "nothing is here")
    assert result["tokens_identical"] is True
    assert result["tokens_compared"] == {"requests": 2, "equal": 2, "differences": []}


def test_a_stock_run_that_fails_says_its_last_words(tmp_path):
    static, elastic = (_recording(name, [[1, n]]) for n, name in enumerate(("static", "elastic")))
    no_library = {**os.environ, "PYTHONHOME": str(tmp_path)}  # Python itself cannot start
    with pytest.raises(EngineUnsupported, match=r"ended with code 1; its last\s+words:\s+\S"):
        compare(static, elastic, tmp_path, "cpu", no_library)
