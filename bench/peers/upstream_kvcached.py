"""The C++ peer, ``kvcached==0.1.6`` of the package index, on the rows of the GPU bench.

It has our import name, so it is never installed beside us: ``build`` unpacks its sdist (and the
wheels it imports) into a folder and compiles its extension there; ``run`` starts one process for
each layout and part, with that folder first on ``PYTHONPATH``, and prints one JSON document:

    {"peer": ..., "rows": {ID: {"contiguous": {"median", "p99", ...}, "per_layer": ...}}, "notes"}

The ids are the bench's, so a row merges into the bench's ``peers``. What the peer cannot do is a
note with its error; a part that crashes or hangs keeps the rows it had.

    python bench/peers/upstream_kvcached.py build DEST --sdist kvcached-0.1.6.tar.gz --wheels DIR
    python bench/peers/upstream_kvcached.py run DEST --out peer.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from upstream_part import BLOCK_BYTES, BLOCK_TOKENS, BUNDLE_BYTES, shorten

PEER = "kvcached==0.1.6"
PART = Path(__file__).resolve().with_name("upstream_part.py")
LAYOUTS = {"contiguous": "true", "per_layer": "false"}
NOTHING_SPARE = {
    "KVCACHED_MIN_RESERVED_PAGES": "0",
    "KVCACHED_MAX_RESERVED_PAGES": "0",
    "KVCACHED_PAGE_PREALLOC_ENABLED": "false",
}
DEFAULTS: dict[str, str] = {}
PARTS: dict[str, tuple[dict[str, str], int]] = {  # settings, seconds before it is given up
    "setup": (DEFAULTS, 75),
    "alloc_free": (DEFAULTS, 45),
    "growth": (NOTHING_SPARE, 75),
}

# A statement that starts its line; string literals in it must hold no semicolon, which
# ``drop_print`` checks by wanting exactly one match.
PRINT_FILE = "csrc/page_allocator.cpp"
PRINT = re.compile(r"^[ \t]*std::cout\b[^;]*;", re.MULTILINE)

# --- build ------------------------------------------------------------------------------------


def build(dest: Path, sdist: Path, wheels: Path | None, seconds: int) -> int:
    """Unpack, take the crashing print out, compile in place; the compiler's exit status."""
    if dest.exists():
        if any(dest.iterdir()) and not (dest / "build.log").exists():
            raise SystemExit(f"{dest}: not empty, and not a folder that build made")
        shutil.rmtree(dest)
    dest.mkdir(parents=True)
    source = unpack_sdist(sdist, dest)
    notes = [drop_print(source / PRINT_FILE)]
    site = dest / "site"
    unpack_wheels(sorted(wheels.glob("*.whl")) if wheels else [], site)
    start = time.monotonic()
    status = compile_extension(source, site, dest / "build.log", seconds)
    taken = time.monotonic() - start
    built = [path.name for path in (source / "kvcached").glob("_C*.so")]
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    facts = {
        "source": str(source),
        "site": str(site),
        "sdist_sha256": digest,
        "build_s": round(taken, 1),
        "notes": notes,
    }
    (dest / "peer.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(f"compiled in {taken:.1f} s, exit status {status}, extension {built}; {notes[0]}")
    if status or not built:
        print(tail(dest / "build.log", 40), file=sys.stderr)
        return status or 1
    return 0


def unpack_sdist(sdist: Path, dest: Path) -> Path:
    """The folder that held ``setup.py`` in the archive."""
    with tarfile.open(sdist) as archive:
        archive.extractall(dest, filter="data")
    found = sorted(dest.glob("*/setup.py"))
    if len(found) != 1:
        raise SystemExit(f"{sdist.name}: expected one setup.py, found {len(found)}")
    return found[0].parent


def unpack_wheels(wheels: Iterable[Path], site: Path) -> None:
    """What the peer imports, on a path of its own: no installer, no network."""
    site.mkdir(exist_ok=True)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)  # noqa: S202 - zipfile drops .. and absolute names


def drop_print(path: Path) -> str:
    """Remove the one statement that writes to ``std::cout``; what was done, for the notes."""
    text = path.read_text(encoding="utf-8")
    found = PRINT.findall(text)
    if len(found) != 1:
        return f"{path.name}: {len(found)} prints to std::cout found, none removed"
    path.write_text(PRINT.sub("", text), encoding="utf-8")
    return f"{path.name}: one print to std::cout removed, it crashed with CUDA 13.0"


def compile_extension(source: Path, site: Path, log: Path, seconds: int) -> int:
    """Run its own ``setup.py build_ext --inplace``; exit status, 124 if out of time."""
    env = {
        **os.environ,
        "PYTHONPATH": join_paths(str(site), os.getenv("PYTHONPATH")),
        "LIBRARY_PATH": join_paths(*map(str, stub_folders()), os.getenv("LIBRARY_PATH")),
        "TORCH_CUDA_ARCH_LIST": "9.0",
        "MAX_JOBS": "16",
    }
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    with log.open("wb") as out:
        try:
            done = subprocess.run(
                command, cwd=source, env=env, stdout=out, stderr=out, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return 124
    return done.returncode


def join_paths(*paths: str | None) -> str:
    """Search paths as an environment variable holds them, those that are none left out."""
    return os.pathsep.join(path for path in paths if path)


def stub_folders() -> list[Path]:
    """Where ``libcuda.so`` is linked from: the toolkit's stubs, for the driver has only .so.1."""
    nvcc = shutil.which("nvcc")
    home = os.getenv("CUDA_HOME") or (
        Path(nvcc).resolve().parents[1] if nvcc else "/usr/local/cuda"
    )
    inside = ("lib64/stubs", "targets/x86_64-linux/lib/stubs", "lib/stubs")
    return [Path(home) / folder for folder in inside if (Path(home) / folder).is_dir()]


# --- run, in our process ----------------------------------------------------------------------


def run(dest: Path, layouts: Sequence[str], parts: Sequence[str], scale: float) -> dict[str, Any]:
    """Every part in every layout, one after the other; rows and notes together."""
    facts = json.loads((dest / "peer.json").read_text(encoding="utf-8"))
    document: dict[str, Any] = {
        "peer": PEER,
        "sdist_sha256": facts["sdist_sha256"],
        "build_s": facts["build_s"],
        "rows": {},
        "notes": [
            *facts["notes"],
            f"{BLOCK_TOKENS} tokens over all layers: {BLOCK_BYTES} bytes",
            f"the peer's smallest growth: {BUNDLE_BYTES} bytes",
            "growth and shrink: " + " ".join(f"{k}={v}" for k, v in NOTHING_SPARE.items()),
            "set-up and alloc_free: the peer's default reserve; one process, async_sched off",
        ],
    }
    for layout in layouts:
        for part in parts:
            for record in run_part(dest, facts, layout, part, scale):
                merge(document, layout, record)
    return document


def merge(document: dict[str, Any], layout: str, record: Mapping[str, Any]) -> None:
    """One record of a part: a row, a note, or a fact about the machine."""
    if "id" in record:
        row = {key: value for key, value in record.items() if key != "id"}
        document["rows"].setdefault(record["id"], {})[layout] = row
    elif "note" in record:
        document["notes"].append(f"{layout}: {record['note']}")
    else:
        document.update(record)


def run_part(
    dest: Path, facts: Mapping[str, Any], layout: str, part: str, scale: float
) -> list[dict[str, Any]]:
    """The records of one part, run in a process of the peer's own."""
    settings, seconds = PARTS[part]
    log = dest / f"{layout}_{part}.log"
    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        out = Path(folder, "records.jsonl")
        command = [sys.executable, str(PART), part, str(out)]
        env = peer_environment(facts, layout, settings, f"peer_{os.getpid()}_{layout}_{part}")
        start = time.monotonic()
        with log.open("wb") as err:
            try:
                done = subprocess.run(
                    command, env=env, cwd=folder, stdin=subprocess.DEVNULL,
                    stdout=err, stderr=err, timeout=seconds * scale, check=False,
                )  # fmt: skip
                failure = died(done.returncode)
            except subprocess.TimeoutExpired:
                failure = f"given up after {seconds * scale:.0f} s"
        lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
        sweep(env["KVCACHED_IPC_NAME"])
    print(f"{layout} {part}: {time.monotonic() - start:.1f} s {failure}", file=sys.stderr)
    records = [json.loads(line) for line in lines]
    if failure:
        last = failure_text(log)
        records.append({"note": f"{part}: {failure}" + (f": {last}" if last else "")})
    return records


def sweep(name: str) -> None:
    """Remove what a peer that was killed leaves: its segment and its folder of sockets."""
    Path("/dev/shm", name).unlink(missing_ok=True)  # noqa: S108 - where the peer puts it
    for folder in Path("/tmp").glob(f"kvcached-tp-{name}-*"):  # noqa: S108 - likewise
        shutil.rmtree(folder, ignore_errors=True)


def peer_environment(
    facts: Mapping[str, Any], layout: str, settings: Mapping[str, str], name: str
) -> dict[str, str]:
    """Our environment without our own settings, which share the peer's prefix."""
    env = {key: value for key, value in os.environ.items() if "KVCACHED" not in key}
    return {
        **env,
        **settings,
        "PYTHONPATH": join_paths(facts["source"], facts["site"], env.get("PYTHONPATH")),
        "PYTHONUNBUFFERED": "1",
        "KVCACHED_CONTIGUOUS_LAYOUT": LAYOUTS[layout],
        "KVCACHED_IPC_NAME": name,
        "KVCACHED_LOG_LEVEL": "WARNING",
    }


def died(status: int) -> str:
    """Why a process ended, nothing if it ended well."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}" if status else ""


def failure_text(log: Path) -> str:
    """The last line of a log that says what went wrong, nothing if none does."""
    says, epilogue = (
        re.compile("error|fail|abort|terminate", re.IGNORECASE),
        "Fatal Python|Extension",
    )
    lines = [line.strip() for line in tail(log, 80).splitlines()]
    telling = [line for line in lines if says.search(line) and not re.match(epilogue, line)]
    return shorten(telling[-1]) if telling else ""


def tail(path: Path, lines: int) -> str:
    """The last lines of a file."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return "\n".join(text.splitlines()[-lines:])


# --- command line -----------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("build", help="unpack and compile the peer")
    one.add_argument("dest", type=Path, help="a folder of its own; emptied first")
    one.add_argument("--sdist", type=Path, required=True, help="its archive of sources")
    one.add_argument("--wheels", type=Path, help="folder of the wheels that it imports")
    one.add_argument("--timeout", type=int, default=300, help="seconds for the compiler")
    one = commands.add_parser("run", help="measure, in processes of the peer's own")
    one.add_argument("dest", type=Path, help="where build left it")
    one.add_argument("--out", type=Path, help="file for the JSON document (else stdout)")
    one.add_argument("--layout", action="append", choices=list(LAYOUTS))
    one.add_argument("--part", action="append", choices=list(PARTS))
    one.add_argument("--patience", type=float, default=1.0, help="factor on every time limit")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Build or run."""
    args = parse(argv)
    if args.command == "build":
        return build(args.dest.resolve(), args.sdist, args.wheels, args.timeout)
    dest = args.dest.resolve()
    document = run(dest, args.layout or list(LAYOUTS), args.part or list(PARTS), args.patience)
    text = json.dumps(document, indent=2) + "\n"
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
