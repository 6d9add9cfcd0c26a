"""What is done ahead while vLLM loads a model, and where the plug-in logs."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
from types import SimpleNamespace as Thing

import pytest

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


@pytest.fixture
def loggers():
    """Ours and vLLM's: others than those of this process, until the test ends."""
    known = logging.getLogger().manager.loggerDict
    names = ("kvcached", "kvcached.pages", "vllm", "vllm.kvcached")
    before = {name: known.pop(name) for name in names if name in known}
    yield Thing(**{name.replace(".", "_"): logging.getLogger(name) for name in names})
    for name in names:
        del known[name]
    known.update(before)


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.said = []

    def emit(self, record):
        self.said.append((record.levelname, record.getMessage()))


def test_what_is_said_goes_where_vllm_logs_by_then(loggers):
    """Of the plug-in, and of the rest: vLLM 0.32 configures its log once plug-ins are loaded."""
    install._log_as_vllm_does()
    install._log_as_vllm_does()
    heard = Heard()
    loggers.vllm.addHandler(heard)
    loggers.vllm.setLevel("WARNING")
    loggers.kvcached.info("not yet")
    loggers.vllm.setLevel("INFO")
    loggers.kvcached_pages.info("a page")
    loggers.vllm_kvcached.info("elastic")
    loggers.kvcached_pages.debug("no")
    assert heard.said == [("INFO", "a page"), ("INFO", "elastic")]
    assert not loggers.kvcached.propagate  # or a root with handlers would say it twice


CONFIGURED = """
import logging.config
from kvcached.engines.vllm import install

other = logging.getLogger("kvcached.broker")
logging.config.dictConfig({"version": 1, "loggers": {"vllm": {"level": "INFO"}}})
assert other.disabled, "as Python does"
assert not install._log.disabled
"""


def test_what_the_plugin_says_survives_a_log_configuration_of_the_users():
    """Python disables loggers that such a file does not name, unless they are below one it does.

    In a process of its own, since that goes for all of this one's too.
    """
    subprocess.run([sys.executable, "-c", CONFIGURED], check=True, timeout=100)


@pytest.mark.parametrize("fails", [False, True])
def test_garbage_is_looked_for_afterwards_as_before(monkeypatch, fails):
    before, enabled, seen = gc.get_threshold(), gc.isenabled(), []

    def load(name):
        seen.append((name, *gc.get_threshold(), gc.isenabled()))
        if fails:
            raise OSError("a library that does not load")

    monkeypatch.setattr(install, "import_module", load)
    install._load("numba", "another")
    during = (*before[:2], install._NEVER, enabled)
    assert seen == [("numba", *during)] if fails else [("numba", *during), ("another", *during)]
    assert (gc.get_threshold(), gc.isenabled()) == (before, enabled)
