"""What is done ahead while vLLM loads a model."""

from __future__ import annotations

import os

import pytest

from kvcached.engines.vllm import install


@pytest.fixture
def fresh():
    install.compile_ahead.cache_clear()
    yield
    install.compile_ahead.cache_clear()


def test_loops_are_compiled_in_a_process_that_ends_and_is_reaped(fresh):
    child = install.compile_ahead()
    assert install.compile_ahead() is child, "once a process"
    assert child.wait(120) == 0
    with pytest.raises(ChildProcessError):
        os.waitpid(child.pid, os.WNOHANG)
