"""`import sharpscope` from a checkout that is not installed, and the hashes of its CUDA files."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNEL = r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\('


def make_importable(folder: Path, root: Path = ROOT) -> Path:
    """Fill `folder` with a package `sharpscope` of links into the checkout; put `folder` on PYTHONPATH.

    The links follow [tool.setuptools.package-dir]: the files of `api` are the package, the other folders lie in it.
    """
    folders = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    package = folder / "sharpscope"
    package.mkdir(parents=True)
    for path in sorted((root / folders.pop("sharpscope")).iterdir()):
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    for name, directory in folders.items():
        (folder / Path(*name.split("."))).symlink_to(root / directory, target_is_directory=True)
    return folder


def environment(importable: Path, **more: str) -> dict[str, str]:
    """Environment variables of a process that imports the checkout, whatever is installed."""
    paths = [str(importable), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1", **more}


def cuda_hashes(root: Path = ROOT) -> dict[str, str]:
    """SHA-256 of every CUDA file of the kernels, by name."""
    files = sorted(path for path in (root / "kernels").iterdir() if path.suffix in (".cu", ".cuh"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kernel_names(root: Path = ROOT) -> set[str]:
    """Every kernel of the CUDA files."""
    found: set[str] = set()
    for path in (root / "kernels").glob("*.cu*"):
        found.update(re.findall(KERNEL, path.read_text()))
    return found


def commit(root: Path = ROOT) -> str | None:
    """The commit that is checked out, with "+" after it where files differ from it; None without git."""
    try:
        head, changes = (
            subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True, timeout=20).stdout
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.strip() + ("+" if changes.strip() else "")
