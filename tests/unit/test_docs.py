"""The examples in the documents run as they stand, on the host backend."""

from __future__ import annotations

import doctest
import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = ["README.md", "docs/api.md"]


@pytest.mark.parametrize("page", PAGES)
def test_examples_in_the_documents_run(page):
    if importlib.util.find_spec("torch") is None:
        pytest.skip("shows tensors, and torch is not installed")
    os.environ["KVCACHED_BROKER"] = "0"  # undone after the test, see conftest
    results = doctest.testfile(
        str(ROOT / page), module_relative=False, optionflags=doctest.ELLIPSIS, encoding="utf-8"
    )
    assert results.attempted > 5
    assert results.failed == 0


@pytest.mark.slow
def test_the_notebook_lines_of_the_readme_run(tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")  # so that the file is read without it too
    from tiny_models import make_model, padded

    text = (ROOT / "README.md").read_text("utf-8").partition("## In a notebook\n")[2]
    lines = text.partition("```\n")[2].partition("```")[0]
    assert lines.count("\n") == 3
    os.environ["KVCACHED_BROKER"] = "0"
    stock = make_model()
    stock.save_pretrained(tmp_path)
    batch = {**padded([5, 20]), "max_new_tokens": 8, "do_sample": False}
    *first, last = lines.strip().split("\n")
    given = {"AutoModelForCausalLM": transformers.AutoModelForCausalLM}
    names = given | {"path": tmp_path, "batch": batch}
    exec("\n".join(first), names)
    tokens = eval(last, names)
    assert tokens.tolist() == stock.generate(**batch).tolist()
    assert names["model"].config._attn_implementation == "kvcached"
