"""Real vLLM engines for tests: one offline engine a process, or ``vllm serve`` and its HTTP."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import openai
from real_vllm.offline import descendants

ENGINE = {
    "dtype": "float32",
    "max_model_len": 1024,
    "enforce_eager": True,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 256 << 20,
}
PHASES = [(2, 160), (32, 160), (4, 160), (48, 120), (1, 100)]  # requests, and tokens of each
BLOCK = 512 << 10  # of the tiny model: 128 tokens, 4 layers, float32
_ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "PYTHONSAFEPATH": "1",
}
RUNNER = Path(__file__).with_name("offline.py")


def environment(runtime_dir, **more):
    """What engines need beside the test's own environment."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("KVCACHED")}
    return ours | _ENV | {"KVCACHED_RUNTIME_DIR": str(runtime_dir)} | more


def offline(model, runtime_dir, log, *, phases, engine=None, texts=None, more=None, **env):
    """Run one engine to its end: what ``offline.py`` says. ``texts``: prompts of each phase."""
    engine = ENGINE | {"disable_log_stats": False} | (engine or {})
    job = {"model": str(model), "phases": phases, "texts": texts, "engine": engine} | (more or {})
    order = Path(log).with_suffix(".job")
    order.write_text(json.dumps(job), encoding="utf-8")
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, str(RUNNER), str(order)], check=False, text=True, timeout=600,
            stdout=subprocess.PIPE, stderr=file, env=environment(runtime_dir, **env),
        )  # fmt: skip
    assert done.returncode == 0, Path(log).read_text(encoding="utf-8")[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def free_port():
    """A port that nobody listens on, from below those that the kernel gives to others meanwhile."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


class Server:
    """One ``vllm serve``; ended with all its processes. ``more``: of its command line."""

    def __init__(self, model, runtime_dir, log, *more, **env):
        self.port = free_port()
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items()
                     if name != "enforce_eager"]  # fmt: skip
        self.log = log
        with open(log, "w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model),
                 "--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "tiny",
                 "--enforce-eager", "--api-server-count=1", *arguments, *more],
                stdout=file, stderr=file, env=environment(runtime_dir, **env),
                start_new_session=True,
            )  # fmt: skip

    def wait(self, seconds=400):
        """Until it answers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, Path(self.log).read_text(encoding="utf-8")[-3000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(self.url("/health")):
                return
            time.sleep(0.5)
        raise AssertionError(f"{self.log}: not ready after {seconds} s")

    def url(self, path):
        return f"http://127.0.0.1:{self.port}{path}"

    def post(self, path, body, seconds=120):
        request = urllib.request.Request(
            self.url(path), json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            data = answer.read()
        return json.loads(data) if data else None

    def complete(self, prompt, max_tokens):
        """Greedy text of a completion, by OpenAI's client; ``OSError`` if there is none."""
        try:
            done = self.client.completions.create(
                model="tiny", prompt=prompt, max_tokens=max_tokens, temperature=0,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
        except openai.APIError as error:
            raise ConnectionError(f"{self.log}: {error}") from error
        return done.choices[0].text

    @functools.cached_property
    def client(self):
        """OpenAI's, which may be used by many threads; a request is sent once."""
        return openai.OpenAI(base_url=self.url("/v1"), api_key="none", max_retries=0, timeout=120)

    def metrics(self):
        with urllib.request.urlopen(self.url("/metrics")) as answer:
            return answer.read().decode()

    def kill(self):
        """SIGKILL to the whole session: nothing is cleaned up but for what Linux keeps of vLLM."""
        shared = shared_files([self.process.pid, *descendants(self.process.pid)])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)
        remove(shared)

    def end(self):
        """SIGTERM, and SIGKILL to what is left of the session."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(40)
        self.kill()


def shared_files(pids):
    """Files of vLLM's shared memory that these processes have mapped."""
    lines = []
    for pid in pids:
        with contextlib.suppress(OSError):
            lines += Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if " /dev/shm/" in line}


def remove(files):
    """Remove what is still there of these files."""
    for file in files:
        Path(file).unlink(missing_ok=True)


def tenants(runtime_dir):
    """What ``kvcached ps`` lists."""
    done = subprocess.run(
        [sys.executable, "-m", "kvcached", "ps", "--json"], check=True, text=True,
        stdout=subprocess.PIPE, env=environment(runtime_dir),
    )  # fmt: skip
    return [t for device in json.loads(done.stdout)["devices"] for t in device["tenants"]]
