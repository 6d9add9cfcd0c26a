"""Definitions found by their first lines: never one that parsing would not find."""

from __future__ import annotations

import ast

import pytest
import vllm_sources
from hypothesis import given
from hypothesis import strategies as st

from kvcached.engines.vllm import outline, seams

TRAPS = '''
"""A module."""
from a.b import (  # noqa
    One,
    Two as Three,
)
from .c import One
import os
if os:
    class Hidden: ...

class Big(Base):
    """Words
that begin in the first column end the class for who reads lines.
    """
    def behind_words(self): ...

class Small:
# a comment in the first column
    x = 1

    @decorated
    def method(
        self,
        first: dict[str, int],
        *, second: Callable[[], int] = lambda: (0), third=")",
    ) -> dict[
        str, int
    ]:
        def inner(a, b): ...

    async def later(self): ...

    def other(self, a, /, b): # (why)
        pass

def function(a: int, b="x:y") -> int: ...
'''
"""What misleads who reads lines."""


def parsed(text, path):
    node = ast.parse(text)
    for name in path.split("."):
        node = seams._child(node, name)
    return node


@pytest.mark.parametrize(
    ("path", "parameters"),
    [("Small.method", "self first second third"), ("Small.other", "self a b"), ("function", "a b")],
)
def test_parameters_are_those_of_the_head(path, parameters):
    found = outline.definition(TRAPS, path)
    assert outline.has(found, parameters.split(), ())
    assert not outline.has(found, ["inner"], ())
    assert outline.parameters_of(parsed(TRAPS, path)) == set(parameters.split())


@pytest.mark.parametrize(
    "path", ["Hidden", "Small.inner", "Small.later", "Small.first", "Small.function", "Two",
             "Big.behind_words", "Smal", "Small.metho"],
)  # fmt: skip
def test_what_is_not_there_is_not_found_nor_what_lies_behind_words(path):
    assert outline.definition(TRAPS, path) is None
    assert (parsed(TRAPS, path) is not None) == (path == "Big.behind_words")


def test_methods_are_those_of_the_class():
    small = outline.definition(TRAPS, "Small")
    assert outline.has(small, (), ["method", "other"])
    assert not outline.has(small, (), ["inner"])
    assert not outline.has(small, (), ["function"])


def test_imports_are_found_by_the_name_that_they_give():
    assert outline.origin(TRAPS, "Two") is None
    assert outline.origin(TRAPS, "Three").module == "a.b"
    assert outline.origin(TRAPS, "On") is None


@pytest.mark.parametrize("sources", [vllm_sources.NEW, vllm_sources.OLD])
def test_no_seam_needs_its_module_parsed(sources, monkeypatch):
    monkeypatch.setattr(seams._Reader, "_parsed", lambda *_: False)
    missing = seams.survey("0.32.0", sources.get).missing
    assert [str(seam) for seam in missing] == []


BLOCKS = st.sampled_from([
    "class A: ...", "class A(B):\n    def f(self): ...\n    def g(self, a,\n        b): ...",
    "class B:\n# a word\n    class A:\n        def f(self, a): ...", "# class A:", "x = A",
    "if x:\n    def f(a, b): ...\n    class B:\n        def g(self): ...", "import A",
    "class A:\n    if x:\n        def f(self, a): ...\n    def fg(self, b): ...", "@A",
    "def f(\n    a,\n):\n    def g(b): ...", "def f(a, *, b=1) -> A: ...", "async def f(a): ...",
    "from m import (A,\n    B as f)", "from m import f, B", "from n import A", "class AB: ...",
    "class B(A):\n    'words'\n\n    async def f(self): ...\n    f = g = 1", "A[\n    0\n]",
])  # fmt: skip


@given(
    st.lists(BLOCKS, max_size=6), st.sampled_from(["A", "B", "f", "A.f", "B.g"]),
    st.sampled_from([(), ("a",), ("a", "b")]), st.sampled_from([(), ("f",), ("f", "g")]),
)  # fmt: skip
def test_what_is_seen_is_there(blocks, path, parameters, methods):
    text = "\n".join(["", *blocks, ""])
    try:
        ast.parse(text)
    except SyntaxError:  # a decorator of something else
        return
    name = path.partition(".")[0]
    if outline.definition(text, name) and outline.origin(text, name):  # which of them is it?
        return
    seam = seams.Seam("m", path, parameters, methods)
    reader = seams._Reader({"m": text, "n": text}.get)
    if reader._seen(seam):
        assert reader._parsed(seam)
