"""Engines over a runtime directory without space, in a mount namespace of its own.

Run as ``unshare ... python full_directory.py TESTS PACKAGE FOLDER CASE``; ends with 0 if all was
as it should be. Mounting needs no more than that namespace, and nothing is left mounted after it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

if __name__ == "__main__":
    sys.path[:0] = sys.argv[1:3]

import pytest
from broker_tenant import MIB, CountingTenant
from fault.broker_rig import until

from kvcached.broker.admin import list_tenants
from kvcached.broker.client import BrokerBudget
from kvcached.config import Config
from kvcached.errors import BrokerUnavailable


def mount(path, options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", path], check=True)


def no_space(path):
    mount(path, "size=16k,mode=0700")
    with contextlib.suppress(OSError), open(f"{path}/fill", "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    config = Config(runtime_dir=path)
    one = CountingTenant("a", config=config)
    one.use(MIB)
    (device,) = list_tenants("cpu", config=config)
    os.kill(device.broker_pid, signal.SIGKILL)
    one.use(100 * MIB)  # the roster is unknown, so after the grace time
    (after,) = list_tenants("cpu", config=config)
    assert after.broker_pid != device.broker_pid
    one.close()
    os.unlink(f"{path}/fill")
    two = CountingTenant("b", config=config)
    two.use(MIB)
    two.close()
    assert until(lambda: not set(os.listdir(path)) - {"cpu.log"}), os.listdir(path)


def no_inode(path):
    mount(path, "nr_inodes=1,mode=0700")
    with pytest.raises(BrokerUnavailable, match="No space left") as caught:
        BrokerBudget("a", device="cpu", limit_bytes=1, config=Config(runtime_dir=path))
    assert "space" in caught.value.hint


if __name__ == "__main__":
    {"no_space": no_space, "no_inode": no_inode}[sys.argv[4]](sys.argv[3])
    sys.stdout.write("as it should be\n")
