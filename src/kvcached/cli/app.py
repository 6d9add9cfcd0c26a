"""The command line: what each command takes. The work is in the modules beside this one."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from kvcached import __version__
from kvcached.cli.render import note, print_json, terminal_width

_CODES = """Exit codes: 0 done, 1 failed, 2 usage, 3 nothing by that name, 4 not allowed,
5 no broker, 6 out of budget. Settings are environment variables: see doctor."""


def _typer(text: str, *, bare: bool = False) -> typer.Typer:
    # plain help: no colour codes, 80 columns, and rich (40 ms) stays unimported
    return typer.Typer(
        help=text,
        epilog=_CODES,
        no_args_is_help=not bare,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    )


kvcached = _typer("The KV cache of LLM servers as virtual memory.")
kvctl = _typer("Look at the tenants of a device, and limit them.")
kvtop = _typer("Watch the tenants of all devices.", bare=True)


def _print_version(wanted: bool) -> None:  # noqa: FBT001 (typer calls it so)
    if wanted:
        print(f"kvcached-py {__version__} from {os.path.dirname(os.path.dirname(__file__))}")
        raise typer.Exit


def _names() -> list[str]:
    from kvcached.cli import tenants

    return tenants.completions()


Device = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="DEVICE", help="'cpu', or a GPU's UUID or its start; default: all."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Version = Annotated[
    bool,
    typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version),
]


@kvcached.callback()
@kvctl.callback()
def _group(version: Version = False) -> None:
    """What all commands of a group take."""


@kvctl.command("ps")
@kvctl.command("list", hidden=True)
@kvcached.command("ps")
def ps(device: Device = None, json: Json = False) -> None:
    """List who holds memory, on which device, and how much."""
    from kvcached.cli import tenants

    devices = tenants.snapshots(device)
    if json:
        print_json(tenants.devices_to_dict(devices))
        return
    print(tenants.ps_table(devices, width=terminal_width()))
    if not any(snapshot.tenants for snapshot in devices):
        note("Nothing is running. The first engine starts the broker of its device.")
    elif not all(tenant.limit.applied for snapshot in devices for tenant in snapshot.tenants):
        note("* holds more than its limit, and is giving back")
    for line in tenants.lowered(devices):
        note(line)


@kvctl.command("limit")
@kvcached.command("limit")
def limit(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="As shown by ps.", autocompletion=_names)
    ],
    size: Annotated[
        str, typer.Argument(metavar="SIZE", help="512MiB, 8G (= GiB), or 40% of the device.")
    ],
    device: Device = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would change.")] = False,
    json: Json = False,
) -> None:
    """Set the most bytes that a tenant may hold. It gives back what it has above."""
    from kvcached.cli import tenants

    change = tenants.change_limit(name, size, device=device, dry_run=dry_run)
    if json:
        print_json(change)
    else:
        print(tenants.describe_limit(change))


@kvcached.command("doctor")
def doctor(
    vllm: Annotated[bool, typer.Option("--vllm", help="Whether vLLM can become elastic.")] = False,
    json: Json = False,
) -> None:
    """Say what this machine can do and what mends it."""
    from kvcached.cli import doctor as machine

    if vllm:
        from kvcached.cli import vllm as engine

        checks = engine.run_checks()
        works, closing = engine.becomes_elastic(checks), engine.verdict(checks)
    else:
        checks = machine.run_checks()
        works, closing = machine.host_backend_works(checks), machine.verdict(checks)
    if json:
        print_json({"ok": works, "checks": [check.to_dict() for check in checks]})
    else:
        print(machine.report(checks, closing))
    raise typer.Exit(0 if works else 1)


@kvtop.command()
@kvcached.command("top")
def top(
    device: Device = None,
    seconds: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Between two looks.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and leave.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="No colour, no redrawing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    version: Version = False,  # noqa: ARG001 (its callback has printed it and left)
) -> None:
    """Watch the tenants of all devices until q or Ctrl-C."""
    from kvcached.cli import top as work

    work.run(device, seconds=seconds, once=once, plain=plain, json=json)


@kvcached.command("demo")
def demo(
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, or auto.")
    ] = "cpu",
    seconds: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="About how long it may take.")
    ] = 90.0,
    budget: Annotated[
        str, typer.Option(metavar="SIZE", help="KV memory of both engines together.")
    ] = "",
    json: Annotated[str, typer.Option(metavar="FILE", help="Write the figures here.")] = "",
    svg: Annotated[str, typer.Option(metavar="FILE", help="Write the picture here.")] = "",
    seed: Annotated[int, typer.Option(metavar="N", help="Of the workload.")] = 0,
    model: Annotated[str, typer.Option(metavar="DIR", help="A local Hugging Face model.")] = "",
    plain: Annotated[bool, typer.Option("--plain", help="No colour, no redrawing.")] = False,
) -> None:
    """Let two real models share one budget."""
    from kvcached.cli import demo as work

    work.run(
        device=device, seconds=seconds, budget=budget, json=json, svg=svg, seed=seed, model=model,
        plain=plain,
    )  # fmt: skip
