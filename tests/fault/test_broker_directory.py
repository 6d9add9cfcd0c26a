"""A runtime directory that is full, or belongs to somebody else."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from fault.broker_rig import PACKAGE

from kvcached.broker.client import BrokerBudget
from kvcached.config import Config
from kvcached.errors import UnsafeRuntimeDir

HERE = Path(__file__).parent
NAMESPACES = [["unshare", "-rm"], ["unshare", "-m"]]
"""A user namespace needs no rights; where there are none, root needs no user namespace."""


@cache
def namespace():
    """A command that starts another where it may mount, or ``None`` if this machine lets nobody."""
    for command in NAMESPACES:
        probe = [*command, "mount", "-t", "tmpfs", "none", "/mnt"]
        try:
            if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
                return command
        except FileNotFoundError:
            pass
    return None


@pytest.mark.parametrize("case", ["no_space", "no_inode"])
def test_a_full_runtime_directory(runtime_dir, case):
    command = namespace()
    if command is None:
        assert not os.environ.get("CI"), "this machine can mount nothing: the case is not tested"
        pytest.skip("nobody may mount a file system here")
    small = runtime_dir / "small"
    small.mkdir(mode=0o700)
    script = [sys.executable, str(HERE / "full_directory.py"), str(HERE.parent), PACKAGE]
    done = subprocess.run(
        [*command, *script, str(small), case], capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "as it should be"


def test_a_runtime_directory_of_somebody_else(runtime_dir):
    foreign = runtime_dir / "foreign"
    foreign.mkdir(mode=0o700)
    owner = 65534
    if os.geteuid() == 0:
        os.chown(foreign, owner, owner)
    else:  # only root can give a directory away, but root's are everywhere
        foreign, owner = Path("/usr"), 0
    before = sorted(os.listdir(foreign))
    with pytest.raises(UnsafeRuntimeDir, match=f"belongs to user {owner}"):
        BrokerBudget("a", device="cpu", limit_bytes=1, config=Config(runtime_dir=str(foreign)))
    assert sorted(os.listdir(foreign)) == before
