"""The tests in this folder need vLLM: ``nox -s vllm``."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]


@pytest.fixture
def run_dir():
    """A runtime directory with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="kv-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def stock(model, tmp_path_factory):
    """What stock vLLM says to ``rig.PHASES``."""
    from real_vllm import rig

    folder = tmp_path_factory.mktemp("stock")
    return rig.offline(model, folder, folder / "log", phases=rig.PHASES)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A tiny model with seeded random weights and a tokenizer."""
    from real_vllm.tiny_llama import write

    folder = tmp_path_factory.mktemp("model") / "tiny"
    write(folder)
    return folder
