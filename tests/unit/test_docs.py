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
    if page == "README.md" and importlib.util.find_spec("torch") is None:
        pytest.skip("shows tensors, and torch is not installed")
    os.environ["KVCACHED_BROKER"] = "0"  # undone after the test, see conftest
    results = doctest.testfile(
        str(ROOT / page), module_relative=False, optionflags=doctest.ELLIPSIS, encoding="utf-8"
    )
    assert results.attempted > 5
    assert results.failed == 0
