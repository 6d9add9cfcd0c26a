"""``kvcached demo``: the options, the files it writes, and the result card."""

from __future__ import annotations

import json as json_format
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from kvcached.config import parse_size
from kvcached.errors import InvalidInput


def run(
    *, device: str, seconds: float, budget: str, json: str, svg: str, seed: int, model: str,
    plain: bool,
) -> None:  # fmt: skip
    """Run the demo, print its card, write its files. Raises errors of ``kvcached.errors``."""
    from kvcached.demo.card import card, notes
    from kvcached.demo.live import LiveView, PlainView
    from kvcached.demo.run import Options
    from kvcached.demo.run import run as run_demo

    for name in filter(None, (json, svg)):
        _check_writable(Path(name))
    options = Options(
        device=device,
        seconds=seconds,
        budget=parse_size(budget) if budget else None,
        seed=seed,
        model=Path(model) if model else None,
        cache_home=Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"),
        environ=dict(os.environ),
    )
    signal.signal(signal.SIGTERM, _terminated)
    talk = Console(stderr=True)
    with PlainView(talk) if plain or not talk.is_terminal else LiveView(talk) as view:
        result = run_demo(options, view)
    _write(json, json_format.dumps(result.document, indent=2) + "\n")
    if svg:
        from kvcached.demo.svg import picture

        _write(svg, picture(result.document, result.static, result.elastic))
    _print_card(card(result.document), notes(result.document), plain=plain)


def _print_card(table: Any, notes: list[str], *, plain: bool) -> None:
    out = Console(no_color=plain or None)
    out.print(table)
    for line in notes:
        out.print(line, markup=False, highlight=False, soft_wrap=not out.is_terminal)
    out.print("next: kvcached doctor, kvcached ps, and the notebook lines in the README",
              highlight=False)  # fmt: skip


def _check_writable(path: Path) -> None:
    """Say now that a file cannot be written, not after the run."""
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InvalidInput(f"cannot write {path}", hint="Name a file in a directory of yours.")


def _write(name: str, text: str) -> None:
    if name:
        Path(name).write_text(text, encoding="utf-8")
        sys.stderr.write(f"wrote {name}\n")


def _terminated(number: int, _: FrameType | None) -> None:
    """End as Ctrl-C does, so that the engines are ended and everything is cleaned up."""
    raise SystemExit(128 + number)
