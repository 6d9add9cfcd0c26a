"""Wheel and sdist, built from a clean copy, looked into, and installed where nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
_OURS = {"PYTHONPATH", "PYTHONHOME", "COVERAGE_PROCESS_START"}


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    env = {name: value for name, value in os.environ.items() if name not in _OURS}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _build(source: Path, out: Path, *what: str) -> Path:
    _run(sys.executable, "-m", "build", "--no-isolation", *what, "--outdir", out, source)
    suffix = "*.whl" if "--wheel" in what else "*.tar.gz"
    (built,) = out.glob(suffix)
    return built


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """What git would hand to somebody else, the link still a link; else all that is not ignored."""
    target = tmp_path_factory.mktemp("clean") / "kvcached"
    target.mkdir()
    listed = _run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        source, copy = ROOT / name, target / name
        if source.is_symlink() or source.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            if source.is_symlink():
                copy.symlink_to(source.readlink())
            else:
                copy.write_bytes(source.read_bytes())
    return target


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory) -> Path:
    return _build(checkout, tmp_path_factory.mktemp("sdist"), "--sdist")


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    return _build(checkout, tmp_path_factory.mktemp("wheel"), "--wheel")


def _expected() -> set[str]:
    """The modules of the source tree, by the names they have in a wheel."""
    found = {
        str(Path("kvcached/kernels") / path.relative_to(ROOT / "kernels"))
        for path in (ROOT / "kernels").rglob("*.py")
    }
    package = ROOT / "src" / "kvcached"
    for path in package.rglob("*.py"):
        if not path.is_relative_to(package / "kernels"):
            found.add(str(path.relative_to(ROOT / "src")))
    return found | {"kvcached/py.typed"}


def _names(archive: Path) -> set[str]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            return set(file.namelist())
    with tarfile.open(archive) as file:
        return {member.name.partition("/")[2] for member in file.getmembers()}


def test_wheel_holds_all_modules_kernels_among_them_and_nothing_else(wheel):
    names = _names(wheel)
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == _expected()
    assert "kvcached/kernels/__init__.py" in inside
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert wheel.name.endswith("-py3-none-any.whl")


def test_sdist_builds_the_same_wheel(sdist, wheel, tmp_path):
    names = _names(sdist)
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names
    with tarfile.open(sdist) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    again = _build(source, tmp_path / "out", "--wheel")
    assert _names(again) == _names(wheel)


def test_metadata_is_what_an_installer_and_a_reader_need(wheel):
    with zipfile.ZipFile(wheel) as file:
        (name,) = (n for n in file.namelist() if n.endswith("/METADATA"))
        (points,) = (n for n in file.namelist() if n.endswith("/entry_points.txt"))
        metadata, entries = file.read(name).decode(), file.read(points).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    core = {line.split()[1].split(">")[0] for line in required if "extra ==" not in line}
    assert core == {"numpy", "numba", "typer", "rich"}
    assert "License-Expression: Apache-2.0" in metadata
    assert {"kvcached", "kvctl", "kvtop"} <= {
        line.partition(" ")[0] for line in entries.split("\n")
    }


# --- installed where nothing else is ----------------------------------------------------------


@pytest.fixture(scope="module")
def empty_venv(wheel, tmp_path_factory) -> Path:
    """A new environment with the wheel alone: no dependency is installed."""
    place = tmp_path_factory.mktemp("venv") / "empty"
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    _run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel)
    return python


def test_import_works_without_any_other_package(empty_venv):
    code = (
        "import sys; before = set(sys.modules); import kvcached; kvcached.CacheSpec; "
        "kvcached.OutOfPages; new = {m.partition('.')[0] for m in set(sys.modules) - before}; "
        "print(*sorted(new - sys.stdlib_module_names))"
    )
    assert _run(empty_venv, "-I", "-c", code).split() == ["kvcached"]


def test_import_costs_next_to_nothing(empty_venv):
    """15 ms over bare Python is the promise. The fastest of 15 has met no other process."""
    code = "import time; a = time.perf_counter(); {}; print(time.perf_counter() - a)"

    def seconds(statement: str) -> float:
        command = (empty_venv, "-I", "-c", code.format(statement))
        return min(float(_run(*command)) for _ in range(15))

    assert seconds("import kvcached") - seconds("pass") <= 0.015


def test_commands_start_in_an_environment_with_the_dependencies(wheel, tmp_path):
    """What ``pip install`` of the wheel gives a person, core dependencies and all."""
    place = tmp_path / "venv"
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    _run(python, "-m", "pip", "install", "-q", wheel)
    for command in ("kvcached", "kvctl", "kvtop"):
        assert "Usage:" in _run(place / "bin" / command, "--help")
    assert "host backend" in _run(place / "bin" / "kvcached", "doctor")
