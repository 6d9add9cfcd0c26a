"""Get the peers' Triton files for ``kernels.py --peers FOLDER``, from their wheels.

``python bench/peers/fetch_kernels.py FOLDER [--wheel FILE]``. SGLang's wheel is downloaded by pip,
without dependencies, unless it is given; only two of its files are kept. vLLM needs nothing here:
where it is installed its kernels are imported. The folder is for the run, never to be committed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SGLANG = "sglang==0.5.23"
FILES = ("decode_attention.py", "score_mod.py")
PLACE = "sglang/kernels/ops/attention/"


def download(folder: Path) -> Path:
    """The wheel, fetched by pip."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, SGLANG], check=True)
    return next(folder.glob("sglang-*.whl"))


def main() -> None:
    """Fill the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wheel", type=Path, help="SGLang's wheel, if it is here already")
    options = parser.parse_args()
    target = options.folder / "sglang"
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        wheel = options.wheel or download(Path(temporary))
        with zipfile.ZipFile(wheel) as archive:
            for name in FILES:
                (target / name).write_bytes(archive.read(PLACE + name))
    print(f"{target}: {', '.join(FILES)}")


if __name__ == "__main__":
    main()
