"""The demo's requests: real prompts, in bursts that alternate between the engines, then both."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from kvcached.layout import cdiv

ENGINES = ("chat", "code")
ROUND_SECONDS = 12.0
"""A round is one burst for each engine in turn."""

SYSTEM = {
    "chat": "You are a friendly assistant. Answer at length, with examples.",
    "code": "You are a careful programmer. Explain each step at length.",
}
PROMPTS = {
    "chat": (
        "Write a short story about a lighthouse keeper who finds a letter.",
        "Explain why the sky is blue to a ten-year-old.",
        "Give me five ideas for a rainy Sunday with two small children.",
        "What should I pack for a week of hiking in the mountains?",
        "Describe the taste of a ripe mango to someone who never had one.",
        "How do bees make honey? Tell it step by step.",
        "Write a polite letter that asks a neighbour to play music less loudly.",
        "Compare living in a big city with living in a small village.",
        "Tell me about the history of bread.",
        "Plan a three-course dinner for friends who eat no meat.",
        "What makes a good teacher? Name several qualities.",
        "Describe an ordinary day in ancient Rome.",
        "Why do cats purr, and what does it mean?",
        "Write a poem about the first snow of winter.",
        "How can I learn to play the guitar without a teacher?",
        "Explain how a rainbow forms after a storm.",
    ),
    "code": (
        "Write a Python function that reverses a linked list.",
        "Explain the difference between a list and a tuple in Python.",
        "How does binary search work, and when does it fail?",
        "Write a SQL query that finds the three largest orders of each customer.",
        "What is a race condition? Give an example and a remedy.",
        "Explain recursion with the factorial function.",
        "Write a regular expression that matches an email address.",
        "How does a hash table handle collisions?",
        "Describe how git stores a commit.",
        "Write a shell script that deletes files older than a week.",
        "What does the keyword yield do in Python?",
        "Explain how TCP makes sure that no data is lost.",
        "Write a function that checks whether a string is a palindrome.",
        "How would you test a function that depends on the current time?",
        "What is the difference between a process and a thread?",
        "Explain Big O notation with three examples.",
    ),
}


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is asked, so that a burst keeps the device busy for seconds.

    Most of a burst's memory is that of its prompts, so that a split makes requests wait.

    ``burst`` requests at once, each of ``questions`` prompts, for at least and at most
    ``output_tokens``; an engine runs up to ``max_batch`` together and admits no further one to a
    step that computes ``step_tokens``.
    """

    burst: int = 8
    questions: int = 1
    output_tokens: tuple[int, int] = (14, 24)
    max_batch: int = 16
    step_tokens: int = 128


CPU = Scale()
GPU = Scale(burst=64, questions=12, output_tokens=(40, 80), max_batch=64, step_tokens=2048)


def scale_of(device: str) -> Scale:
    """What is asked of a device."""
    return CPU if device == "cpu" else GPU


@dataclass(frozen=True, slots=True)
class Request:
    """One request: ``tokens`` is the prompt; it arrives ``at_s`` seconds after the run starts."""

    id: int
    engine: str
    at_s: float
    tokens: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """All requests of a run in order of arrival, and the seconds after which the run is idle."""

    requests: tuple[Request, ...]
    seconds: float

    def burst_blocks(self, block_size: int) -> int:
        """Blocks that the largest burst of an engine holds at most; a common prefix counts once."""
        bursts: dict[tuple[str, float], list[Request]] = {}
        for request in self.requests:
            bursts.setdefault((request.engine, request.at_s), []).append(request)
        return max(_blocks(burst, block_size) for burst in bursts.values())


def _blocks(burst: list[Request], block_size: int) -> int:
    columns = zip(*(request.tokens for request in burst), strict=False)
    common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    whole = [cdiv(len(r.tokens) + r.max_new_tokens, block_size) for r in burst]
    return sum(whole) - common // block_size * (len(burst) - 1)


def make_workload(
    tokenizer: Any, *, seed: int, seconds: float, burst_seconds: float = 0.0, scale: Scale = CPU
) -> Workload:
    """Bursts for about ``seconds`` seconds: in turn, then half a burst for both, then idle.

    ``burst_seconds`` is how long this machine needs for a burst. On a slow one the bursts lie
    further apart, so that they still come in turn; what is asked stays the same.
    """
    rng = random.Random(seed)
    rounds = max(1, int(seconds // ROUND_SECONDS))
    slot = max(seconds / (2 * rounds + 1.6), burst_seconds)
    bursts = [(i * slot, ENGINES[i % 2], scale.burst) for i in range(2 * rounds)]
    bursts += [(2 * rounds * slot, engine, scale.burst // 2) for engine in ENGINES]
    requests: list[Request] = []
    for at, engine, count in bursts:
        for prompt in _prompts(rng, engine, count, scale):
            made = _request(tokenizer, rng, len(requests), engine, at, prompt, scale)
            requests.append(made)
    return Workload(tuple(requests), (2 * rounds + 1.6) * slot)


def extra_burst(
    tokenizer: Any, *, seed: int, engine: str, first_id: int, scale: Scale = CPU
) -> list[Request]:
    """A burst with long outputs, for the phases after the measured workload."""
    rng = random.Random(seed + 1)
    prompts = _prompts(rng, engine, scale.burst, scale)
    made = [_request(tokenizer, rng, first_id + i, engine, 0.0, prompt, scale)
            for i, prompt in enumerate(prompts)]  # fmt: skip
    return [Request(r.id, r.engine, r.at_s, r.tokens, 4 * r.max_new_tokens) for r in made]


def _prompts(rng: random.Random, engine: str, count: int, scale: Scale) -> list[str]:
    """``count`` prompts: one question each, no two the same, or several in any order."""
    questions = PROMPTS[engine]
    if scale.questions == 1:
        return rng.sample(questions, count)
    return [" ".join(rng.sample(questions, scale.questions)) for _ in range(count)]


def _request(
    tokenizer: Any, rng: random.Random, number: int, engine: str, at: float, prompt: str,
    scale: Scale,
) -> Request:  # fmt: skip
    messages = [{"role": "system", "content": SYSTEM[engine]}, {"role": "user", "content": prompt}]
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    output = rng.randint(*scale.output_tokens)
    return Request(number, engine, at, tuple(encoded["input_ids"]), output)
