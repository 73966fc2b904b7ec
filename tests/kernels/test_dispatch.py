"""Which path runs: the fastest that can, with one warning where it is not the first, and never silently another."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from sharpscope.kernels import KernelWarning, _dispatch, capabilities, quantize_m
from sharpscope.kernels._dispatch import FUNCTIONS, choice, choose
from sharpscope.kernels.capabilities import verification

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("SHARPSCOPE_KERNELS", raising=False)
    caches = (_dispatch.why_unavailable, _dispatch._chosen)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def without(monkeypatch, **missing):
    """The machine lacks these paths."""
    real = _dispatch._module

    class Missing:
        def __init__(self, reason):
            self.why_unavailable = lambda: reason

    monkeypatch.setattr(
        _dispatch, "_module", lambda f, path: Missing(missing[path]) if path in missing else real(f, path)
    )


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_slower_path_is_taken_with_one_warning_that_says_why(function, monkeypatch):
    without(monkeypatch, c="no compiler found; install gcc", numba="numba is not installed")
    with pytest.warns(KernelWarning, match="slower path 'torch'.*no compiler found; install gcc") as seen:
        module = choose(function, CPU)
    assert len(seen) == 1
    assert module.__name__ == f"sharpscope.kernels.{function}_torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(function, CPU) is module


def test_numba_comes_before_torch(monkeypatch):
    without(monkeypatch, c="no compiler")
    assert choice("codec", "cpu").path == "numba" or "numba" in choice("codec", "cpu").reasons
    assert choice("codec", "cpu").reasons["c"] == "no compiler"


def test_the_environment_forces_a_path(monkeypatch):
    for path in ("reference", "torch"):
        monkeypatch.setenv("SHARPSCOPE_KERNELS", path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert choose("codec", CPU).__name__.endswith(f"codec_{path}")


def test_a_forced_path_that_cannot_run_is_an_error(monkeypatch):
    without(monkeypatch, c="no compiler found")
    monkeypatch.setenv("SHARPSCOPE_KERNELS", "c")
    with pytest.raises(RuntimeError, match="asks for 'c', which cannot run here: no compiler found"):
        quantize_m(torch.ones(3))


def test_a_path_of_the_other_device_is_no_answer(monkeypatch):
    monkeypatch.setenv("SHARPSCOPE_KERNELS", "cuda")
    assert choice("codec", "cpu").path in ("c", "numba", "torch")
    monkeypatch.setenv("SHARPSCOPE_KERNELS", "numba")
    assert choice("lanczos", "cpu").path in ("c", "torch")


def test_an_unknown_path_is_an_error(monkeypatch):
    monkeypatch.setenv("SHARPSCOPE_KERNELS", "fortran")
    with pytest.raises(ValueError, match="'fortran'; it must be auto or one of"):
        quantize_m(torch.ones(3))


def test_capabilities_cover_every_function_and_say_what_was_verified():
    found = {(c.function, c.device): c for c in capabilities()}
    assert set(found) == {(f, d) for f in FUNCTIONS for d in ("cpu", "cuda")}
    for (_, device), capability in found.items():
        assert capability.path in ("c", "numba", "torch", "cuda", "none")
        assert ("verified on" in capability.verified) == (device == "cuda")
        assert capability.path != "none" or capability.why
        assert device == "cuda" or capability.path == "c" or capability.why


def test_importing_the_kernels_compiles_nothing_and_imports_no_optional_library():
    code = (
        "import sys, sharpscope.kernels; from sharpscope.kernels import _native; "
        "print(sorted({'cupy', 'numba'} & set(sys.modules)), _native._built.cache_info().currsize)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert result.stdout.strip() == "[] 0"


def test_the_documents_say_what_was_verified():
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    for function in FUNCTIONS:
        assert f"| {function} | {verification(function)} |" in page
