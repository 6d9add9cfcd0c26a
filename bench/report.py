"""Write the generated parts of the documents.

``<!-- bench:NAME -->`` ... ``<!-- /bench:NAME -->`` holds the table of ``bench/results/NAME.json``;
without that file it is left empty. ``<!-- modules:FOLDER -->`` holds the modules of a folder with
the first sentence of each. ``--check`` changes nothing and exits 1 if a document is out of date.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
_BLOCK = re.compile(r"<!-- (bench|modules):([\w/]+) -->\n.*?<!-- /\1:\2 -->", re.DOTALL)


def table(headers: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are flush right."""
    rule = ["---", *["---:"] * (len(headers) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [headers, rule, *rows])


def bench_table(result: dict[str, Any]) -> str:
    """Median and p99 of each case, and below it where they come from."""
    rows = [
        [
            row["case"],
            f"{number(row['median'])} {row['unit']}",
            f"{number(row['p99'])} {row['unit']}",
        ]
        for row in result["rows"]
    ]
    repeats = sorted({row["repeats"] for row in result["rows"]})
    span = str(repeats[0]) if len(repeats) == 1 else f"{repeats[0]} to {repeats[-1]}"
    source = (
        f"{span} repeats, {result['date']}, commit {result['commit']}, {host(result['machine'])}."
    )
    return f"{table([result['title'], 'median', 'p99'], rows)}\n\n{source}"


def gpu_table(result: dict[str, Any]) -> str:
    """Each row with its target, and what was measured beside it in the same run."""
    rows = []
    for row in result["rows"]:
        target = "" if row["target"] is None else f"{number(row['target'])} {row['unit']}"
        beside = "; ".join(f"{who}: {number(value)}" for who, value in row.get("peers", {}).items())
        cells = [f"{number(row[key])} {row['unit']}" if key in row else ""
                 for key in ("value", "p99")]  # fmt: skip
        rows.append([f"`{row['id']}`", *cells, target, beside])
    driver = f"driver {result['driver']}, " if "driver" in result else ""
    source = f"{result['device']}, {driver}{result['date']}, commit {result['commit']}."
    headers = ["row", "median", "p99", "target", "beside it, in the same run"]
    return f"{table(headers, rows)}\n\n{source}"


def _errors(row: dict[str, Any], whose: str) -> str:
    """The largest error of a row, and its root mean square, if it was measured."""
    if row.get(f"{whose}error") is None:
        return ""
    rms = row.get(f"{whose}error_rms")
    return f"{row[f'{whose}error']:.1e}" + ("" if rms is None else f" / {rms:.2e}")


def kernels_table(result: dict[str, Any]) -> str:
    """Each kernel with its share of the limit, its target, its error and the peers' times."""
    units = {"ratio": "of the limit", "us": "us", "tflops": "TFLOP/s", "gb_per_s": "GB/s",
             "speedup": "x flat"}  # fmt: skip
    rows, absent = [], []
    for row in result["rows"]:
        if "us" not in row:
            why = row.get("missing") or row["failed"]
            absent.append(f"`{row['id']}`: {why}")
            continue
        what = row["target_of"]
        value = row[{"ratio": "ratio_to_limit"}.get(what, what or "us")]
        bound = "<=" if what == "us" else ">="
        target = "" if what is None else f"{bound} {number(row['target'])} {units[what]}"
        error = _errors(row, "")
        if row.get("peer_error") is not None:
            error += f" ({_errors(row, 'peer_')})"
        beside = "; ".join(f"{who}: {number(us)}" for who, us in row.get("peers", {}).items())
        beside += "".join(f"; {who}: none ({why.partition(': ')[2] or why})"
                          for who, why in row.get("peers_failed", {}).items())  # fmt: skip
        host = number(row["host_us"])
        if "bound_us" in row:
            host += f" ({number(row['bound_us'])})"
        rows.append([f"`{row['id']}`", number(row["us"]), number(row["p99"]),
                     f"{row['ratio_to_limit']:.3f}", f"{number(value)} {units[what or 'us']}",
                     target, host, error, beside.removeprefix("; ")])  # fmt: skip
    headers = ["row", "us", "p99", "of the limit", "value", "target", "host us (bound)",
               "error / rms (best peer's)", "peers, us"]  # fmt: skip
    limits = ", ".join(f"{name} {number(value)}" for name, value in result["limits"].items())
    source = f"{result['device']}, {result['date']}, commit {result['commit']}; limits: {limits}."
    notes = f"\n\nNot measured: {'; '.join(absent)}." if absent else ""
    return f"{table(headers, rows)}\n\n{source}{notes}"


def compiled_table(result: dict[str, Any]) -> str:
    """What the compiler made of each configuration, for each architecture."""
    archs = sorted({row["arch"] for row in result["rows"]}, key=lambda arch: int(arch[3:]))
    found: dict[str, dict[str, Any]] = {}
    for row in result["rows"]:
        found.setdefault(row["kernel"], {})[row["arch"]] = row
    rows = []
    for name, made in found.items():
        cells = [f"{made[arch]['registers']} / {made[arch]['stack']} / {made[arch]['shared']:,}"
                 if arch in made else "" for arch in archs]  # fmt: skip
        ahead = next(iter(made.values())).get("tiles_ahead")
        rows.append([name, *cells, f"{ahead:,}" if ahead else ""])
    headers = ["registers / stack / shared bytes", *archs, "bytes in flight"]
    reasons: dict[tuple[str, str], list[str]] = {}
    for one in result["refused"]:
        reasons.setdefault((one["arch"], one["why"]), []).append(one["kernel"])
    refused = "".join(f"\n\nNot for {arch}: {', '.join(names)}: {why}."
                      for (arch, why), names in reasons.items())  # fmt: skip
    source = f"Triton {result['triton']}, {result['date']}, commit {result['commit']}."
    return f"{table(headers, rows)}\n\n{source}{refused}"


def demo_table(result: dict[str, Any]) -> str:
    """Static split against elastic, from the JSON of ``kvcached demo``."""
    static, elastic = result["static"], result["elastic"]
    lines: list[tuple[str, Any]] = [
        ("requests done", lambda run: str(run["requests_done"])),
        ("preemptions", lambda run: str(run["preemptions"])),
        ("time to first token, mean", lambda run: f"{number(run['ttft_ms']['mean'])} ms"),
        ("time to first token, p50", lambda run: f"{number(run['ttft_ms']['p50'])} ms"),
        ("time to first token, p99", lambda run: f"{number(run['ttft_ms']['p99'])} ms"),
        ("tokens/s", lambda run: number(run["tokens_per_s"])),
        ("peak memory", lambda run: mib(run["peak_backed_bytes"])),
        ("memory when idle", lambda run: mib(run["idle_backed_bytes"])),
    ]
    rows = [[name, show(static), show(elastic)] for name, show in lines]
    kill, limit = result["kill"], result["limit"]
    same = "the same" if result["tokens_identical"] else "NOT the same"
    notes = " ".join(
        (
            f"{result['model']} in float32, one budget of {mib(result['budget_bytes'])} for two",
            "engines;",
            f"the tokens of both runs are {same}.",
            f"A limit lowered to {mib(limit['requested_bytes'])} was obeyed after",
            f"{number(limit['ms'])} ms; after kill -9 of an engine the other had its",
            f"{mib(kill['bytes_returned'])} in {number(kill['ms'])} ms.",
        )
    )
    where = f"\n{host(result['machine'])}." if "machine" in result else ""
    return f"{table(['', 'static split', 'elastic'], rows)}\n\n{notes}{where}"


def host(machine: dict[str, Any]) -> str:
    """The machine in a few words."""
    memory = machine.get("memory_gib") or round(machine.get("memory_bytes", 0) / (1 << 30), 1)
    gpu = f"{machine['gpu']}, torch {machine['torch']}, " if "gpu" in machine else ""
    return (
        f"{gpu}{machine['cpus']} CPUs, {memory} GiB, {machine['system']}, "
        f"Python {machine['python']}"
    )


def number(value: float) -> str:
    """Three digits that mean something."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def mib(nbytes: int) -> str:
    """Bytes in MiB, which all sizes of one table share."""
    return f"{number(nbytes / (1 << 20))} MiB"


def results_of(name: str) -> str:
    """The table of one result file, or nothing."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return ""
    result = json.loads(path.read_text("utf-8"))
    if "elastic" in result:
        return f"{demo_table(result)}\n"
    known = {"kernels": kernels_table, "kernels_compiled": compiled_table}
    if result.get("bench") in known:
        return f"{known[result['bench']](result)}\n"
    return f"{gpu_table(result) if 'device' in result else bench_table(result)}\n"


def modules_of(folder: str) -> str:
    """A line for each module of a folder: its name and the first sentence of its docstring."""
    lines = []
    for path in sorted((ROOT / folder).glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        first = " ".join(text.partition("\n\n")[0].split()).replace("``", "`")
        if path.name != "__init__.py":
            lines.append(f"- `{path.name}`: {first}\n")
    return "".join(lines)


def render(text: str) -> str:
    """``text`` with every block written anew."""

    def block(match: re.Match[str]) -> str:
        kind, name = match.groups()
        body = results_of(name) if kind == "bench" else modules_of(name)
        return f"<!-- {kind}:{name} -->\n{body}<!-- /{kind}:{name} -->"

    return _BLOCK.sub(block, text)


def main(argv: list[str]) -> int:
    """Rewrite, or with ``--check`` compare; 0 if all is, or now is, up to date."""
    stale = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        before = page.read_text("utf-8")
        after = render(before)
        if after != before:
            stale.append(page)
            if "--check" not in argv:
                page.write_text(after, encoding="utf-8")
    for page in stale:
        print(f"{'out of date' if '--check' in argv else 'wrote'}: {page.relative_to(ROOT)}")
    return int(bool(stale) and "--check" in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
