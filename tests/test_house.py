"""The house keeps its shape: what is on disk is packaged, imports go one way, importing is light."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {
    "api": "sharpscope",
    **{name: f"sharpscope.{name}" for name in ("landscape", "hessian", "dynamics", "kernels", "figures")},
}
# Who may import whom; a package may always import itself.
MAY_IMPORT = {
    "kernels": set(),
    "landscape": set(),
    "hessian": {"kernels", "landscape"},
    "dynamics": {"kernels", "landscape", "hessian"},
    "figures": {"kernels", "landscape", "hessian", "dynamics"},
    "api": {"kernels", "landscape", "hessian", "dynamics", "figures"},
}


def sources(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def test_every_package_on_disk_is_listed_and_typed():
    on_disk = {
        ".".join([package, *path.parent.relative_to(ROOT / folder).parts])
        for folder, package in FOLDERS.items()
        for path in sources(folder)
        if path.name == "__init__.py"
    }
    assert on_disk == set(PROJECT["tool"]["setuptools"]["packages"])
    assert all((ROOT / folder / "py.typed").exists() for folder in FOLDERS)


def test_every_module_belongs_to_a_package():
    for folder in FOLDERS:
        for path in sources(folder):
            assert (path.parent / "__init__.py").exists(), path


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_one_way_and_are_relative(folder):
    for path in sources(folder):
        depth = len(path.relative_to(ROOT / folder).parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == "sharpscope" for alias in node.names), path
            if not isinstance(node, ast.ImportFrom):
                continue
            assert (node.module or "").split(".")[0] != "sharpscope", f"{path}: import relatively"
            climbs_out = node.level == depth + 1 or (folder == "api" and node.level == depth)
            if not climbs_out:
                continue
            targets = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            for target in targets:
                if target in MAY_IMPORT:
                    assert target == folder or target in MAY_IMPORT[folder], f"{path} imports {target}"


def test_no_file_is_two_subjects_long():
    long = {
        str(path.relative_to(ROOT)): n
        for folder in FOLDERS
        for path in sources(folder)
        if (n := len(path.read_text().splitlines())) > 450
    }
    assert not long


def test_importing_sharpscope_leaves_heavy_libraries_alone():
    code = (
        "import sys, sharpscope; heavy = {'matplotlib.pyplot', 'pandas', 'sklearn', 'typer', 'torchvision', 'cupy', "
        "'torch._dynamo'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert result.stdout.strip() == "[]"


def test_bare_names_are_not_exposed():
    code = "import importlib.util as u; print([n for n in ('kernels', 'landscape', 'hessian') if u.find_spec(n)])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert result.stdout.strip() == "[]"


def test_constraints_pin_what_pyproject_asks_for():
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    asked = {req.split(">")[0].split("[")[0] for req in PROJECT["project"]["dependencies"]}
    assert asked <= pinned


def test_optimizers_are_listed_once_and_loaded_when_asked_for():
    import sharpscope.dynamics.optimizers as optimizers

    assert set(optimizers.__all__) == set(optimizers._MODULES)
    for name in optimizers.__all__:
        assert getattr(optimizers, name).__name__ == name
    code = "import sys, sharpscope; print('sharpscope.dynamics.optimizers.psgd' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert result.stdout.strip() == "False"
