"""What is done ahead while vLLM loads a model."""

from __future__ import annotations

import logging
import subprocess
import sys

from kvcached.engines.vllm import install

SCRIPT = """
import os, sys, time
from kvcached.engines.vllm import install

assert "numba" not in sys.modules, "then there is nothing to do ahead"
loader = install.compile_ahead()
assert install.compile_ahead() is loader, "once a process"
while "numba" not in sys.modules and loader.is_alive():
    time.sleep(0.0005)
assert loader.is_alive(), "the fork is to come in the middle of it"
child = os.fork()
if not child:
    import kvcached._bound, kvcached._scan
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert not loader.is_alive(), "the fork waited for it"
assert all("kvcached." + name in sys.modules for name in install._LOOPS)
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:  # the process that compiled has ended, and was reaped
    print("loaded")
"""


def test_loops_are_loaded_in_a_thread_that_a_fork_waits_for():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True,
                          timeout=100, check=False)  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, "loaded"), done.stderr[-2000:]


def test_what_is_said_goes_where_vllm_logs_by_then(monkeypatch):
    for name in ("kvcached", "vllm"):  # others than those of this process, until the test ends
        monkeypatch.delitem(logging.getLogger().manager.loggerDict, name, raising=False)
    ours, theirs, heard = logging.getLogger("kvcached"), logging.getLogger("vllm"), []
    install._log_as_vllm_does()
    install._log_as_vllm_does()

    class Theirs(logging.Handler):
        def emit(self, record):
            heard.append((record.levelname, record.getMessage()))

    theirs.addHandler(Theirs())  # after ours: vLLM 0.32 configures its log once plug-ins are loaded
    theirs.setLevel("WARNING")
    ours.info("not yet")
    theirs.setLevel("INFO")
    ours.info("elastic")
    ours.debug("no")
    assert heard == [("INFO", "elastic")]
    assert not ours.propagate  # or a root with handlers would say it twice
