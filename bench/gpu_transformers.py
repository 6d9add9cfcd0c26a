"""Hugging Face transformers with our attention and cache beside its own, on a GPU.

``python bench/gpu_transformers.py [--seconds N] [--dry]`` writes ``transformers.json`` (to ``$OUT``
or among the results). A model of the shape of Llama-3.2-1B with random weights, made here, in
bfloat16: what a whole forward pass takes over prompts of one length, and over padded ones. Peers
are transformers' ``sdpa`` and, if it is installed, ``flash_attention_2``, both with its
``DynamicCache``; all on the same weights, one after another in one process. Tokens are compared in
float32, where rounding decides none. ``--dry`` runs a tiny model, on the CPU too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from common import RESULTS, SCHEMA_VERSION, commit
from pass_profile import device_ms, host_us
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, __version__

from kvcached.engines.transformers import NAME, ElasticCache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LLAMA_1B = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 131072, "tie_word_embeddings": True,
}  # fmt: skip
TINY = LLAMA_1B | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96,
                   "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                   "head_dim": 16}  # fmt: skip
Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """Prompts of ``lens`` tokens, each continued by ``steps``; unlike ones are padded in front."""

    name: str
    lens: tuple[int, ...]
    steps: int

    def inputs(self, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(ids, mask or ``None``), ``[B, longest]``."""
        generator = torch.Generator().manual_seed(0)
        longest = max(self.lens)
        ids = torch.randint(0, vocabulary, (len(self.lens), longest), generator=generator)
        if len(set(self.lens)) == 1:
            return ids.to(DEVICE), None
        columns = torch.arange(longest)
        mask = torch.stack([columns >= longest - n for n in self.lens]).long()
        return ids.to(DEVICE), mask.to(DEVICE)


def works(*, dry: bool) -> list[Work]:
    """One prompt, many of one length, many of unlike lengths."""
    if dry:
        return [Work("2 x 9", (9, 9), 3), Work("3 of 3 to 20", (3, 20, 7), 3)]
    draw = random.Random(0)
    unlike = tuple(int(2 ** draw.uniform(7, 13)) for _ in range(16))
    return [Work("1 x 1024", (1024,), 96), Work("16 x 1024", (1024,) * 16, 64),
            Work("64 x 2048", (2048,) * 64, 32),
            Work(f"16 of {min(unlike)} to {max(unlike)}", unlike, 48)]  # fmt: skip


def make_model(sizes: dict[str, Any], dtype: torch.dtype) -> Any:
    """A random model; the same weights each time, whatever the dtype."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.float32)
    return model.to(dtype).eval()


def waited() -> float:
    """The time, when all that is queued is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Run:
    """One pass over a work: seconds of both parts, tokens, the last logits, bytes.

    ``peak_bytes`` is all that was held at once beyond the weights: the cache too.
    """

    prefill_s: float
    decode_s: float
    tokens: torch.Tensor
    logits: torch.Tensor
    cache_bytes: int
    peak_bytes: int


def go(model: Any, work: Work, cache: Any) -> Run:
    """Greedy, by the forward pass itself: ``generate`` would add its own time to both sides."""
    ids, mask = work.inputs(model.config.vocab_size)
    found, more = [], {}
    before = start_counting()
    with torch.inference_mode():
        start = waited()
        if mask is not None:
            more = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        logits = model(ids, past_key_values=cache, logits_to_keep=1, **more).logits[:, -1]
        found.append(logits.argmax(-1))
        filled = waited()
        for step in range(work.steps):
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                more = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
            else:
                place = ids.shape[1] + step
                more = {"position_ids": torch.full((len(ids), 1), place, device=DEVICE)}
            logits = model(found[-1][:, None], past_key_values=cache, **more).logits[:, -1]
            found.append(logits.argmax(-1))
        done = waited()
    peak = peak_since(before) + (nbytes(cache) if isinstance(cache, ElasticCache) else 0)
    return Run(filled - start, done - filled, torch.stack(found, 1), logits.float(), nbytes(cache),
               peak)  # fmt: skip


def start_counting() -> int:
    """Bytes that torch has allocated now; its peak is counted from here."""
    if DEVICE != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_since(before: int) -> int:
    """The most bytes that torch held since, beyond those of ``before``; elastic pages are none."""
    return torch.cuda.max_memory_allocated() - before if DEVICE == "cuda" else 0


def nbytes(cache: Any) -> int:
    """Memory under the keys and values that a cache holds."""
    if isinstance(cache, ElasticCache):
        held = cache.cache
        return 0 if held is None else held.stats().backed_bytes
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


def peers() -> list[str]:
    """Attentions of transformers that run here."""
    found = ["sdpa"]
    if importlib.util.find_spec("flash_attn") is not None and DEVICE == "cuda":
        found.append("flash_attention_2")
    return found


@contextmanager
def caches(model: Any) -> Iterator[Callable[[], dict[str, Any]]]:
    """A function that gives each attention its empty cache; ours is kept, as a server keeps it."""
    with closing(ElasticCache(model.config)) as elastic:

        def anew() -> dict[str, Any]:
            elastic.reset()
            return {name: DynamicCache(config=model.config) for name in peers()} | {NAME: elastic}

        yield anew


def alternate(model: Any, repeats: int, run: Callable[[Any, int], T]) -> dict[str, list[T]]:
    """``run(cache, number)`` of each attention in turn: what disturbs one disturbs all.

    Ours comes last: what torch loads at first use is not ours.
    """
    found: dict[str, list[T]] = {name: [] for name in [*peers(), NAME]}
    with caches(model) as anew:
        for number in range(repeats):
            for name, cache in anew().items():
                model.set_attn_implementation(name)
                found[name].append(run(cache, number))
    return found


def row(ident: str, unit: str, runs: dict[str, list[T]], of: Callable[[T], float]) -> Row:
    """A figure of ours with that of the others; the first run of each is a warm-up."""
    figures = {name: sorted(of(run) for run in list_[1:]) for name, list_ in runs.items()}
    middle = {name: round(statistics.median(values), 3) for name, values in figures.items()}
    ends = {name: [round(values[0], 3), round(values[-1], 3)] for name, values in figures.items()}
    return {"id": ident, "value": middle.pop(NAME), "unit": unit, "target": None, "peers": middle,
            "repeats": len(figures[NAME]), "ranges": ends}  # fmt: skip


def timed(model: Any, work: Work, repeats: int) -> tuple[list[Row], dict[str, list[Run]]]:
    """The rows of a work."""
    runs = alternate(model, repeats, lambda cache, _: go(model, work, cache))
    many = len(work.lens) * work.steps
    rows = [
        row(f"prefill, {work.name}", "ms", runs, lambda run: run.prefill_s * 1e3),
        row(f"decode, {work.name}", "tokens/s", runs, lambda run: many / run.decode_s),
        row(f"cache, {work.name}", "MiB", runs, lambda run: run.cache_bytes / (1 << 20)),
    ]  # fmt: skip
    if DEVICE == "cuda":
        rows.append(row(f"peak beyond weights, {work.name}", "MiB", runs,
                        lambda run: run.peak_bytes / (1 << 20)))  # fmt: skip
    return rows, runs


def profiled(model: Any, work: Work, repeats: int) -> list[Row]:
    """Kernels of a prompt and of a step, and what the host spends on a layer in a step."""
    ids, mask = work.inputs(model.config.vocab_size)
    mask = torch.ones_like(ids) if mask is None else mask
    steps = [torch.cat([mask, mask.new_ones(len(ids), n)], 1) for n in range(4)]

    def passes(cache: Any, _: int) -> tuple[float, float, float]:
        def forward(step: int) -> None:
            positions = (steps[step].cumsum(1) - 1).clamp(min=0)[:, -1 if step else 0 :]
            model(ids[:, -1:] if step else ids, attention_mask=steps[step], logits_to_keep=1,
                  position_ids=positions, past_key_values=cache)  # fmt: skip

        with torch.inference_mode():
            prompt = device_ms(lambda: forward(0)) if DEVICE == "cuda" else forward(0) or 0.0
            forward(1)
            host = host_us(model, cache, lambda: forward(2))
            step = device_ms(lambda: forward(3)) if DEVICE == "cuda" else 0.0
        return prompt, step, host

    runs = alternate(model, repeats, passes)
    rows = [row(f"host, a layer's attention and cache in a step, {work.name}", "us", runs,
                lambda found: found[2])]  # fmt: skip
    if DEVICE == "cuda":
        rows += [
            row(f"kernels of the prefill, {work.name}", "ms", runs, lambda found: found[0]),
            row(f"kernels of a step, {work.name}", "ms", runs, lambda found: found[1]),
        ]
    return rows


def new_lengths(model: Any, longest: int) -> Row:
    """Prompts of a length that never came before, as those of people are."""

    def once(cache: Any, number: int) -> float:
        ids = torch.randint(0, model.config.vocab_size, (1, longest - 7 * number), device=DEVICE)
        start = waited()
        with torch.inference_mode():
            model(ids, past_key_values=cache, logits_to_keep=1)
        return (waited() - start) * 1e3

    runs = alternate(model, 9, once)
    return row(f"prefill, one prompt of a new length near {longest}", "ms", runs, lambda ms: ms)


def generated(model: Any, work: Work, repeats: int) -> Row:
    """``generate`` itself, greedy, whole calls."""
    ids, mask = work.inputs(model.config.vocab_size)
    mask = torch.ones_like(ids) if mask is None else mask

    def once(cache: Any, _: int) -> float:
        start = waited()
        out = model.generate(
            ids, attention_mask=mask, past_key_values=cache, do_sample=False, pad_token_id=0,
            max_new_tokens=work.steps, min_new_tokens=work.steps,
        )  # fmt: skip
        return (out.shape[1] - ids.shape[1]) * len(ids) / (waited() - start)

    runs = alternate(model, repeats, once)
    return row(f"generate, {work.name}, {work.steps} new", "tokens/s", runs, lambda rate: rate)


def first_use(work: Work, runs: dict[str, list[Run]]) -> Row:
    """What the first run took longer than those after it: ours compiles its kernels then."""
    extra = {}
    for name, (first, *others) in runs.items():
        usual = statistics.median(run.prefill_s + run.decode_s for run in others)
        extra[name] = round(first.prefill_s + first.decode_s - usual, 2)
    return {"id": f"longer at first use, {work.name}", "value": extra.pop(NAME), "unit": "s",
            "target": None, "peers": extra}  # fmt: skip


def compared(sizes: dict[str, Any], work: Work) -> list[Row]:
    """Share of tokens that are those of ``sdpa``, in float32 with products in full."""
    torch.set_float32_matmul_precision("highest")
    model = make_model(sizes, torch.float32)
    runs = alternate(model, 1, lambda cache, _: go(model, work, cache))
    mine, other = runs[NAME][0], runs["sdpa"][0]
    share = float((mine.tokens == other.tokens).float().mean())
    apart = float((mine.logits - other.logits).abs().max())
    return [{"id": f"tokens like sdpa's in float32, {work.name}", "value": round(100 * share, 2),
             "unit": "%", "target": 100, "peers": {}, "logits_apart": apart}]  # fmt: skip


def write(rows: list[Row], *, dry: bool) -> None:
    """``transformers.json``; of a dry run only in ``$OUT``."""
    name = torch.cuda.get_device_name(0) if DEVICE == "cuda" else "CPU"
    document = {
        "schema_version": SCHEMA_VERSION, "bench": "transformers", "dry": dry,
        "commit": os.environ.get("COMMIT") or commit(),
        "device": f"{name}, torch {torch.__version__}, transformers {__version__}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"), "rows": rows,
    }  # fmt: skip
    if not dry or "OUT" in os.environ:
        folder = Path(os.environ.get("OUT") or RESULTS)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "transformers.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")


def main() -> None:
    """Measure; what has no time left is left out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--repeats", type=int, default=4, help="the first is a warm-up")
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    sizes = TINY if options.dry else LLAMA_1B
    os.environ.setdefault("KVCACHED_BROKER", "0")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # empty: the first use compiles
        measure(options, sizes, end)


def measure(options: argparse.Namespace, sizes: dict[str, Any], end: float) -> None:
    """Every work until the ``end``, then the tokens; written after each."""
    rows: list[Row] = []

    def put(found: list[Row]) -> None:
        rows.extend(found)
        for line in found:
            print(line["id"], line["value"], line["unit"], line["peers"], flush=True)
        write(rows, dry=options.dry)

    model = make_model(sizes, torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    todo = works(dry=options.dry)
    for work in todo:
        if time.monotonic() > end:
            print(f"no time: {work.name}")
            continue
        found, runs = timed(model, work, options.repeats)
        put(found if rows else [*found, first_use(work, runs)])
    short = Work("4 of 20 to 200", (200, 20, 90, 150), 32)
    if time.monotonic() < end:
        put([new_lengths(model, 100 if options.dry else 1000)])
        put([generated(model, short, options.repeats)])
    for work in todo:
        if time.monotonic() < end:
            put(profiled(model, work, options.repeats))
    del model
    if time.monotonic() < end:
        put(compared(sizes, Work(todo[-1].name, tuple(n // 8 + 1 for n in todo[-1].lens), 32)))


if __name__ == "__main__":
    main()
