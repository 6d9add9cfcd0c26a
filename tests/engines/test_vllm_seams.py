"""Whether a vLLM can be made elastic: read from its source, of invented and of real releases."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

import pytest
import vllm_sources

from kvcached.engines.vllm import seams
from kvcached.engines.vllm.seams import SCHEDULER, WORKER, survey

WHEELS = os.environ.get("KVCACHED_VLLM_WHEELS", "")
PACKED = ["0.24.0", "0.25.0", "0.25.1", "0.26.0", "0.27.0", "0.27.1", "0.28.0"]
LAYOUT = ["0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0"]
REAL = dict.fromkeys(PACKED, "packed") | dict.fromkeys(LAYOUT, "layout")


def without(sources, module, text, instead=""):
    assert text in sources[module]
    return {**sources, module: sources[module].replace(text, instead)}


# --- invented ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sources", "allocation"), [(vllm_sources.NEW, "layout"), (vllm_sources.OLD, "packed")]
)
def test_what_has_every_seam_can_be_made_elastic(sources, allocation):
    found = survey("0.32.0", sources.get)
    assert (found.missing, found.allocation, found.untested) == ((), allocation, False)
    assert found.problem == ""


def test_of_two_ways_to_allocate_the_newer_one_is_taken():
    assert survey("0.32.0", {**vllm_sources.OLD, **vllm_sources.NEW}.get).allocation == "layout"


@pytest.mark.parametrize("module", [*vllm_sources.SCHEDULER, *vllm_sources.WORKER])
def test_a_module_that_is_gone_takes_its_seams_with_it(module):
    rest = {name: text for name, text in vllm_sources.NEW.items() if name != module}
    gone = tuple(seam for seam in (*SCHEDULER, *WORKER) if seam.module == module)
    assert set(gone) <= set(survey("0.32.0", rest.get).missing)


@pytest.mark.parametrize("seam", [*SCHEDULER, *WORKER], ids=str)
def test_each_seam_is_missed(seam):
    name = seam.path.rpartition(".")[2]
    sources = {**vllm_sources.NEW}
    sources[seam.module] = sources[seam.module].replace(name, f"{name}_of_old")
    found = survey("0.32.0", sources.get)
    assert seam in found.missing
    assert str(seam) in found.problem
    assert found.problem.startswith("vLLM 0.32.0 has no ")


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("vllm.v1.core.block_pool", "num_gpu_blocks: int, "),
        ("vllm.v1.core.block_pool", ", block: KVCacheBlock"),
        ("vllm.v1.worker.worker_base", "vllm_config, "),
    ],
)
def test_a_parameter_that_is_gone_is_a_seam_that_is_gone(module, text):
    (seam,) = survey("0.32.0", without(vllm_sources.NEW, module, text).get).missing
    assert seam.module == module
    assert seam.parameters


@pytest.mark.parametrize("method", ["popleft_n", "prepend_n", "get_all_free_blocks"])
def test_a_method_of_the_queue_that_is_gone(method):
    gone = without(vllm_sources.NEW, "vllm.v1.core.kv_cache_utils", f"def {method}(", "def other(")
    (seam,) = survey("0.32.0", gone.get).missing
    assert method in seam.methods


@pytest.mark.parametrize("text", ["def request_memory(", "cache_config, "])
def test_what_is_imported_is_looked_at_where_it_is_defined(text):
    gone = without(vllm_sources.NEW, "vllm.v1.worker.utils", text, "def other(" * ("(" in text))
    (seam,) = survey("0.32.0", gone.get).missing
    assert seam.path == "request_memory"


def test_imports_that_go_round_lead_nowhere():
    circle = {**vllm_sources.NEW, "vllm.v1.worker.utils": "from .gpu_worker import request_memory"}
    assert [seam.path for seam in survey("0.32.0", circle.get).missing] == ["request_memory"]


@pytest.mark.parametrize("module", [*vllm_sources.LAYOUT, *vllm_sources.PACKED])
def test_half_of_a_way_to_allocate_is_none(module):
    sources = vllm_sources.NEW if module in vllm_sources.LAYOUT else vllm_sources.OLD
    found = survey("0.32.0", {**sources, module: vllm_sources.OLD["vllm.v1.worker.utils"]}.get)
    assert (found.missing, found.allocation) == ((), "")
    assert "allocates its KV cache in a way that is not known" in found.problem


def test_other_parameters_are_another_way_to_allocate():
    gone = without(vllm_sources.NEW, "vllm.v1.worker.utils", "layout, ")
    assert survey("0.32.0", gone.get).allocation == ""


@pytest.mark.parametrize(
    ("version", "untested"),
    [("0.23.1", True), ("0.24.0", False), ("0.32.2", False), ("0.33.0rc1", False),
     ("0.33.0", False), ("0.34.0", True), ("1.0", True), ("unknown", True)],
)  # fmt: skip
def test_versions_that_were_never_tried_are_named(version, untested):
    assert survey(version, vllm_sources.NEW.get).untested is untested


def test_what_is_installed_is_read_and_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "vllm"
    for module, text in vllm_sources.NEW.items():
        file = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for folder in [package, *(path for path in package.rglob("*") if path.is_dir())]:
        (folder / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    assert survey("0.32.0").problem == ""
    assert seams.installed_source("vllm.v1").startswith("raise")
    assert seams.installed_source("vllm.v1.nonsense") is None
    assert seams.installed_source("vllm_of_old.v1") is None
    assert "vllm" not in sys.modules


# --- real -------------------------------------------------------------------------------------


def wheel_of(version):
    found = sorted(Path(WHEELS).glob(f"vllm*-{version}*.whl"))
    if not found:
        pytest.skip(f"no wheel of vLLM {version} in {WHEELS}")
    return zipfile.ZipFile(found[0])


@pytest.mark.slow
@pytest.mark.skipif(not WHEELS, reason="KVCACHED_VLLM_WHEELS names no folder of wheels")
@pytest.mark.parametrize(("version", "allocation"), REAL.items())
def test_real_releases_have_every_seam(version, allocation):
    with wheel_of(version) as wheel:
        names = set(wheel.namelist())

        def source(module):
            base = module.replace(".", "/")
            for name in (f"{base}.py", f"{base}/__init__.py"):
                if name in names:
                    return wheel.read(name).decode()
            return None

        found = survey(version, source)
    assert found.problem == ""
    assert (found.allocation, found.untested) == (allocation, False)
