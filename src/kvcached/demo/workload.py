"""The demo's requests: real prompts, in bursts that alternate between the engines, then both."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

ENGINES = ("chat", "code")
BURST = 12
"""Requests of one burst."""
OUTPUT_TOKENS = (18, 30)
"""Fewest and most tokens that a request may generate."""
ROUND_SECONDS = 13.0
"""A round of one burst an engine takes about this long on one core an engine."""

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

    def burst_tokens(self) -> int:
        """Tokens that the largest burst of one engine holds at most, prompts and outputs."""
        sums: dict[tuple[str, float], int] = {}
        for r in self.requests:
            key = (r.engine, r.at_s)
            sums[key] = sums.get(key, 0) + len(r.tokens) + r.max_new_tokens
        return max(sums.values())


def make_workload(tokenizer: Any, *, seed: int, seconds: float) -> Workload:
    """Bursts for about ``seconds`` seconds: in turn, then half a burst for both, then idle."""
    rng = random.Random(seed)
    rounds = max(1, int(seconds // ROUND_SECONDS))
    slot = seconds / (2 * rounds + 1.6)
    bursts = [(i * slot, ENGINES[i % 2], BURST) for i in range(2 * rounds)]
    bursts += [(2 * rounds * slot, engine, BURST // 2) for engine in ENGINES]
    requests: list[Request] = []
    for at, engine, count in bursts:
        for prompt in rng.sample(PROMPTS[engine], count):
            requests.append(_request(tokenizer, rng, len(requests), engine, at, prompt))
    return Workload(tuple(requests), seconds)


def extra_burst(tokenizer: Any, *, seed: int, engine: str, first_id: int) -> list[Request]:
    """A burst with long outputs, for the phases after the measured workload."""
    rng = random.Random(seed + 1)
    prompts = rng.sample(PROMPTS[engine], BURST)
    made = [_request(tokenizer, rng, first_id + i, engine, 0.0, p) for i, p in enumerate(prompts)]
    return [Request(r.id, r.engine, r.at_s, r.tokens, 4 * r.max_new_tokens) for r in made]


def _request(
    tokenizer: Any, rng: random.Random, number: int, engine: str, at: float, prompt: str
) -> Request:
    messages = [{"role": "system", "content": SYSTEM[engine]}, {"role": "user", "content": prompt}]
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return Request(number, engine, at, tuple(encoded["input_ids"]), rng.randint(*OUTPUT_TOKENS))
