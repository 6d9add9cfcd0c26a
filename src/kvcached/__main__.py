"""``python -m kvcached``: the same as the ``kvcached`` command."""

from kvcached.cli import main

if __name__ == "__main__":
    main()
