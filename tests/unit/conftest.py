"""Fixtures of the unit tests."""

from __future__ import annotations

import pytest
from cli_rig import COMMANDS, Owner
from fake_nvml import FakeNvml


@pytest.fixture
def library():
    library = FakeNvml()
    yield library
    assert library.opened == 0


@pytest.fixture
def owners(runtime_dir):
    made = [Owner("qwen3-8b"), Owner("llama-8b")]
    yield made
    for owner in made:
        owner.close()


@pytest.fixture
def run(capfd):
    def run(command: str, *args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            COMMANDS[command](args)
        out, err = capfd.readouterr()
        return int(caught.value.code or 0), out, err

    return run
