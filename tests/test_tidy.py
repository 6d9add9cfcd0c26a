"""Whatever would be said twice in review is a test."""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

import kvcached
from kvcached import errors

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "kvcached"
MAX_FUNCTION, MAX_COMPILED, MAX_FILE = 60, 120, 400


def _files(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in found if not path.is_relative_to(PACKAGE / "kernels")]


SOURCES = _files("src", "kernels")
PYTHON = [*SOURCES, *_files("tests", "bench"), ROOT / "noxfile.py"]
TEXT = [
    *PYTHON,
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    ROOT / "pyproject.toml",
    ROOT / ".ci" / "run",
]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), filename=str(path))


every_python_file = pytest.mark.parametrize("path", PYTHON, ids=_name)


@every_python_file
def test_functions_and_files_are_short(path):
    lines = path.read_text("utf-8").count("\n")
    assert lines <= MAX_FILE, f"{_name(path)} has {lines} lines: split it"
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            compiled = any("jit" in ast.unparse(entry) for entry in node.decorator_list)
            most = MAX_COMPILED if compiled else MAX_FUNCTION
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= most, f"{_name(path)}:{node.lineno} {node.name} has {length} lines"


def test_the_median_function_is_short():
    lengths = sorted(
        (node.end_lineno or 0) - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.FunctionDef)
    )
    assert lengths[len(lengths) // 2] < 10


@pytest.mark.parametrize("path", TEXT, ids=_name)
def test_nothing_is_left_open_and_no_machine_is_named(path):
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        left = re.search("FI[X]ME|TO[D]O|X[X]X", line)
        assert left is None, f"{_name(path)}:{number}: {left and left[0]}"
        place = re.search(r"/wo[r]k/|/tmp/de[v]\b|/ro[o]t/|[.]libra[r]y|/ho[m]e/\w", line)
        assert place is None, f"{_name(path)}:{number} names a machine: {place and place[0]}"


@every_python_file
def test_broad_excepts_say_why(path):
    lines = path.read_text("utf-8").splitlines()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = "BaseException" if node.type is None else ast.unparse(node.type)
            broad = caught in {"Exception", "BaseException"}
            reraised = any(isinstance(sub, ast.Raise) for sub in ast.walk(node))
            around = " ".join(lines[max(0, node.lineno - 2) : node.lineno + 1])
            assert not broad or reraised or "#" in around, (
                f"{_name(path)}:{node.lineno}: except {caught} without a reason beside it"
            )


# --- documents --------------------------------------------------------------------------------


def test_every_variable_is_documented_and_every_documented_one_exists():
    ours = [path for path in _files("bench") if path.parent.name != "peers"]  # theirs: same prefix
    tests = [ROOT / "tests" / name for name in ("conftest.py", "engines/test_vllm_seams.py")]
    shipped = [*SOURCES, *ours, *tests, ROOT / "noxfile.py"]
    used = {f"KVCACHED_{field.upper()}" for field in kvcached.Config.__dataclass_fields__}
    for path in [*shipped, ROOT / ".ci" / "run"]:
        used |= set(re.findall(r"\bKVCACHED_[A-Z][A-Z_]*[A-Z]\b", path.read_text("utf-8")))
    documented = set(
        re.findall(r"^\| `(KVCACHED_[A-Z_]+)`", (ROOT / "docs/env.md").read_text(), re.MULTILINE)
    )
    assert used == documented


def test_every_public_name_is_documented():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    words = set(re.findall(r"\w+", "\n".join(page.read_text("utf-8") for page in pages)))
    assert not set(kvcached.__all__) - words


def test_every_error_code_is_documented_and_unique():
    classes = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.KvcachedError)
    }
    assert {cls.__name__ for cls in classes} <= set(kvcached.__all__)
    codes = [cls.code for cls in classes]
    assert len(codes) == len(set(codes))
    page = (ROOT / "docs/errors.md").read_text("utf-8")
    documented = dict(re.findall(r"^\| (KV\d{3}) \| `(\w+)`", page, re.MULTILINE))
    assert {cls.code: cls.__name__ for cls in classes} == documented


def test_links_between_documents_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{_name(page)} links to {target}"


def test_sources_refer_to_documents_that_exist():
    for path in PYTHON:
        for name in re.findall(r"\b[\w/]+\.md\b", path.read_text("utf-8")):
            found = [ROOT / name, *(ROOT / "docs").rglob(name.rpartition("/")[2])]
            assert any(page.exists() for page in found), f"{_name(path)} refers to {name}"


# --- modules ----------------------------------------------------------------------------------


def _module(path: Path) -> str:
    folder = ROOT if path.is_relative_to(ROOT / "kernels") else ROOT / "src"
    parts = path.relative_to(folder).with_suffix("").parts
    name = ".".join(part for part in parts if part != "__init__")
    return f"kvcached.{name}" if folder is ROOT else name


def _mentions(path: Path) -> set[str]:
    """Names of modules that a file imports, at its top, lazily, or by a dotted string."""
    package = _module(path) if path.name == "__init__.py" else _module(path).rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r"^(kvcached(?:\.\w+)+)", node.value))
    return found


def test_no_module_is_unreachable():
    modules = {_module(path): path for path in SOURCES}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tables = [project["scripts"], *project.get("entry-points", {}).values()]
    entries = {entry.partition(":")[0] for table in tables for entry in table.values()}
    todo = {"kvcached", *entries, *(name for name in modules if name.endswith("__main__"))}
    # shipped for users to import: each has tests of its own
    todo |= {name for name in modules if name.startswith(("kvcached.testing", "kvcached.engines"))}
    todo |= {"kvcached.kernels"}
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name in modules and name not in seen:
            seen.add(name)
            todo |= _mentions(modules[name]) | {name.rpartition(".")[0]}
    assert not set(modules) - seen


def test_kernels_are_reached_by_the_committed_link():
    link = PACKAGE / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../../kernels")


def test_import_of_the_package_is_lazy():
    missing = {name for name in kvcached.__all__ if name not in dir(kvcached)}
    assert not missing
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = kvcached.nonsense
