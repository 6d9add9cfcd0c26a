"""Where source text defines a name, found without parsing all of it.

vLLM's modules have thousands of lines, and each of its processes looks at a dozen of them before
it does anything else: parsed whole, they take a quarter of a second there. What is found here is
there. What is not may still be, behind text that looks like the end of its class: so whoever finds
nothing parses (``seams.py``).
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterable

_IMPORT = re.compile(r"\nfrom \S+ import (?:\([^)]*\)|[^(\n]*)(?=\n)")
_COLON = re.compile(r":(?= \.\.\.$|[ \t]*(?:#.*)?$)", re.MULTILINE)
_ENDS = [re.compile(rf"\n {{0,{depth}}}[^\s)\]#]") for depth in (0, 4)]
"""A line no deeper than this ends what came before, but for comments and what closes a head."""


def definition(text: str, path: str) -> str | None:
    """The source of ``path`` from its first line on: a class or function, or one of a class."""
    for name, end in zip(path.split("."), _ENDS, strict=False):
        found = _begun(text, name, "" if end is _ENDS[0] else "    ")
        if found is None:
            return None
        last = end.search(found, 1)
        text = found[: last.start()] if last else found
    return text


def _begun(text: str, name: str, indent: str) -> str | None:
    """What follows the line in front of the only definition, that line's end included."""
    found = list(re.finditer(rf"\n{indent}(?:def {name}\(|class {name}[(:])", text))
    return text[found[0].start() :] if len(found) == 1 else None


def has(definition: str, parameters: Iterable[str], methods: Iterable[str]) -> bool:
    """Whether a function has all ``parameters``, or a class of a module all ``methods``."""
    if definition.lstrip().startswith("class"):
        return all(_begun(definition, name, "    ") is not None for name in methods)
    return set(parameters) <= _head(definition)


def _head(function: str) -> set[str]:
    """The names of a function's parameters; none if its head cannot be told from what follows."""
    for colon in _COLON.finditer(function):
        try:
            (parsed,) = ast.parse(textwrap.dedent(function[: colon.start()]) + ": ...").body
        except SyntaxError:
            continue
        return parameters_of(parsed) if isinstance(parsed, ast.FunctionDef) else set()
    return set()


def parameters_of(function: ast.FunctionDef) -> set[str]:
    """The names of a function's parameters, those of ``*`` and ``**`` left out."""
    a = function.args
    return {arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)}


def origin(text: str, name: str) -> ast.ImportFrom | None:
    """The statement by which a module's text imports ``name``."""
    for found in _IMPORT.finditer(text):
        if name in found[0]:
            try:
                (node,) = ast.parse(found[0][1:]).body
            except SyntaxError:
                continue
            if isinstance(node, ast.ImportFrom) and any(
                (alias.asname or alias.name) == name for alias in node.names
            ):
                return node
    return None
