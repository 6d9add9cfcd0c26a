"""The commands ``kvcached``, ``kvctl`` and ``kvtop``.

Data goes to stdout, talk to stderr. Exit codes: 0 done, 1 failed, 2 usage, 3 nothing by that name,
4 not allowed, 5 no broker, 6 out of budget. An error of ours is never a traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from kvcached.errors import KvcachedError

if TYPE_CHECKING:
    import typer


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run ``kvcached``."""
    from kvcached.cli.app import kvcached as app

    _run(app, "kvcached", argv)


def kvctl(argv: Sequence[str] | None = None) -> NoReturn:
    """Run ``kvctl``: ``ps``/``list`` and ``limit``."""
    from kvcached.cli.app import kvctl as app

    _run(app, "kvctl", argv)


def kvtop(argv: Sequence[str] | None = None) -> NoReturn:
    """Run ``kvtop``."""
    from kvcached.cli.app import kvtop as app

    _run(app, "kvtop", argv)


def _run(app: typer.Typer, name: str, argv: Sequence[str] | None) -> NoReturn:
    from kvcached.cli.render import exit_code, format_error

    try:
        app(args=None if argv is None else list(argv), prog_name=name)
    except KvcachedError as error:
        sys.stderr.write(format_error(error) + "\n")
        sys.exit(exit_code(error))
    except BrokenPipeError:
        # the reader (head, less) has enough; keep the interpreter from writing at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
