"""Beside scikit-learn, which brings an OpenMP library of its own, the threads are those of torch's."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

CODE = """
import ctypes, pathlib, re
import {first}
import torch
import {second}
from sharpscope.kernels import _native

mapped = {{line.split()[-1] for line in pathlib.Path("/proc/self/maps").read_text().splitlines() if "/" in line}}
print(len([path for path in mapped if re.match(r"lib(gomp|iomp5|omp)\\b", pathlib.Path(path).name)]), "loaded")
torch_cpu = next(path for path in mapped if pathlib.Path(path).name == "libtorch_cpu.so")
try:
    theirs = ctypes.CDLL(torch_cpu).GOMP_parallel
except AttributeError:
    print("without OpenMP")
else:
    address = lambda function: ctypes.cast(function, ctypes.c_void_p).value
    ours = _native._openmp()
    print("none" if ours is None else "same" if address(ours) == address(theirs) else "another")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what is loaded is read from /proc")
@pytest.mark.parametrize("order", ["before", "after"])
def test_the_library_is_that_of_torch(order):
    if find_spec("sklearn") is None:
        pytest.skip("scikit-learn is not installed; pip install scikit-learn")
    first, second = ("sklearn.utils", "sys") if order == "before" else ("sys", "sklearn.utils")
    code = CODE.format(first=first, second=second)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    loaded, found = result.stdout.splitlines()
    if found == "without OpenMP":
        pytest.skip("torch was built without OpenMP")
    if int(loaded.split()[0]) < 2:
        pytest.skip("scikit-learn brought no OpenMP library of its own, so there is no choice")
    assert found == "same"
