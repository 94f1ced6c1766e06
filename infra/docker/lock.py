"""Write the exact packages that images are built from, with the hashes of their files: `make lock`.

requirements-cuda.txt has PyTorch as PyPI ships it, with the CUDA libraries that it names; requirements.txt all the
rest, which images without CUDA have too.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

FOLDER = Path(__file__).parent
CUDA = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)")
HEADER = "# Written by `make lock`: {what}, for Linux on x86-64 and Python 3.11.\n"


def main() -> None:
    """Resolve pyproject.toml with the exact Ray and PyTorch of the Dockerfile, and write both lists."""
    pins = dict(
        re.findall(r"^ARG (TORCH_VERSION|RAY_VERSION)=(\S+)$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    )
    project = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["mlflow-server"]]
    wanted += [f"torch=={pins['TORCH_VERSION']}", f"ray=={pins['RAY_VERSION']}"]
    uv = [str(Path(sys.executable).parent / "uv"), "pip", "compile", "-", "--generate-hashes", "--no-annotate"]
    uv += ["--no-header", "--python-version=3.11", "--python-platform=x86_64-manylinux_2_28"]
    text = subprocess.run(uv, input="\n".join(wanted), capture_output=True, text=True, check=True).stdout
    blocks = re.findall(r"^\S.*(?:\n +.*)*", text, re.MULTILINE)
    cuda = [block for block in blocks if CUDA.fullmatch(re.split(r"[=\[ ]", block)[0])]
    rest = [block for block in blocks if block not in cuda]
    for name, what, chosen in (
        ("requirements.txt", "what an image needs beside PyTorch", rest),
        ("requirements-cuda.txt", "PyTorch with CUDA, from PyPI", cuda),
    ):
        (FOLDER / name).write_text(HEADER.format(what=what) + "\n".join(chosen) + "\n")


if __name__ == "__main__":
    main()
