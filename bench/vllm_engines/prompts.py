"""Prompts in plain language, for models that have learnt one: a question about a story.

All begin with the same instruction, longer than any block, so a prefix cache has something to find.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

_INSTRUCTION = (
    "You are a careful reader. You get a short story and a question about it. Read the story to "
    "its end before you answer. Answer in whole sentences, say first what the question asks for, "
    "and then where the story says so. If the story does not say it, then say that it does not, "
    "and tell what would have to be known. Do not invent people, places or things that are not in "
    "the story. Names are to be spelled as they are in the story. If two people in the story do "
    "the same thing, then name both of them, in the order in which they come. Numbers are to be "
    "written as words, and days by their names. When the answer is a list, put the items into one "
    "sentence, with commas between them. Stay friendly, and do not repeat the question."
)
_PEOPLE = ("Ada", "Bruno", "Chiara", "Dmitri", "Esther", "Femi", "Greta", "Hugo", "Ines", "Jonas",
           "Kenji", "Lucia", "Maya", "Nils", "Olga", "Pedro")  # fmt: skip
_DEEDS = ("carried a basket of apples to", "painted the old door of", "lost a red scarf near",
          "taught a song to the children of", "repaired the clock of", "saw a heron fly over",
          "baked bread for everybody at", "wrote a long letter about", "planted three trees behind",
          "told a story about the ghost of")  # fmt: skip
_PLACES = ("the mill", "the harbour", "the market square", "the lighthouse", "the station",
           "the library", "the bakery", "the bridge", "the school", "the island")  # fmt: skip
_DAYS = ("On Monday", "On Tuesday", "One rainy evening", "Before sunrise", "After the storm",
         "In the first week of May", "At noon", "Late at night")  # fmt: skip
_QUESTIONS = ("Who was there first, and what did they do?", "What happened last?",
              "Which places are named, and who was at each of them?",
              "Tell the story again from the view of one of its people.",
              "What could happen on the next day?",
              "Who would you like to meet, and why?")  # fmt: skip


def texts(count: int, sentences: int, seed: int) -> list[str]:
    """``count`` prompts in the chat format of SmolLM2 (ChatML), each of its own."""
    rng = random.Random(seed)
    return [_text(rng, sentences) for _ in range(count)]


def _text(rng: random.Random, sentences: int) -> str:
    story = " ".join(
        f"{rng.choice(_DAYS)}, {rng.choice(_PEOPLE)} {rng.choice(_DEEDS)} {rng.choice(_PLACES)}."
        for _ in range(sentences)
    )
    return (
        f"<|im_start|>system\n{_INSTRUCTION}<|im_end|>\n"
        f"<|im_start|>user\n{story} {rng.choice(_QUESTIONS)}<|im_end|>\n<|im_start|>assistant\n"
    )


def as_ids(folder: Path, count: int, sentences: int, seed: int) -> list[dict[str, Any]]:
    """The same as token ids of the model in ``folder``, as vLLM takes them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = tokenizer.encode_batch(texts(count, sentences, seed))
    return [{"prompt_token_ids": list(one.ids)} for one in encoded]
