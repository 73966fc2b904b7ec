"""CUDA programs compile for every architecture, within their budget of registers, to the arithmetic they state.

With `-s` the table of registers is printed.
"""

import ast
import functools
import importlib
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest
from sharpscope.kernels import _nvrtc
from sharpscope.kernels._launch import FOLDER

MODULES = ("codec", "adamw4", "lanczos", "tridiagonal")
SOURCES = {name: importlib.import_module(f"sharpscope.kernels.{name}_cuda").SOURCES for name in MODULES}
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")
# Every variant on one architecture; on the others the last of each program, and the rest behind the marker `slow`.
LAST = [(name, source) for name in MODULES for source in {source.files: source for source in SOURCES[name]}.values()]
EVERY = [(name, source, arch) for arch in ARCHS for name in MODULES for source in SOURCES[name]]
BUILDS = [(name, source, arch) for name, source, arch in EVERY if arch == "sm_90" or (name, source) in LAST]
SLOW = [pytest.param(*build, marks=pytest.mark.slow) for build in EVERY if build not in BUILDS]
# What is read as PTX: all of the codec, the first and last variant of the others.
READ = [("codec", source) for source in SOURCES["codec"]] + [
    (name, source)
    for name in MODULES[1:]
    for source in dict.fromkeys((SOURCES[name][0], *(last for owner, last in LAST if owner == name)))
]
# The most registers a thread may use, in any variant on sm_80 to sm_100: with blocks of 256 threads, 64 let four of
# them run on a multiprocessor, 80 three, 128 two.
REGISTERS = {
    "adamw4_block": 96,
    "adamw4_encode_ragged": 80,
    "adamw4_encode_upright": 80,
    "adamw4_moments_ragged": 96,
    "adamw4_moments_upright": 96,
    "adamw4_scales": 24,
    "dequantize_block": 32,
    "dequantize_rank1": 40,
    "lanczos_dots": 64,
    "lanczos_finish": 56,
    "lanczos_next": 40,
    "lanczos_reduce": 32,
    "lanczos_update": 64,
    "quantize_block": 40,
    "rank1_columns": 40,
    "rank1_encode": 40,
    "rank1_finish": 16,
    "rank1_rows": 40,
    "tridiagonal_quadrature": 80,
}
# Where 96 would spill: bfloat16 parameters and gradients, nearest rounding.
REGISTERS_ON_SM_120 = {"adamw4_moments_ragged": 128, "adamw4_moments_upright": 128}


class Resources(NamedTuple):
    registers: int
    stack: int
    spills: int
    shared: int


def compiler():
    """ "nvrtc" or "nvcc"; skips without either."""
    try:
        _nvrtc.nvrtc_version()
    except _nvrtc.CudaUnavailable as error:
        if not shutil.which("nvcc"):
            pytest.skip(f"no CUDA compiler: no nvcc on PATH, and {error}")
        return "nvcc"
    return "nvrtc"


@functools.cache
def machine_code_log(source, arch):
    if compiler() == "nvrtc":
        return _nvrtc.compile_cubin(source, arch)[1]
    return nvcc(source, "-cubin", f"-arch={arch}", "--resource-usage")[1]


@functools.cache
def ptx(source):
    if compiler() == "nvrtc":
        return _nvrtc.compile_ptx(source, "sm_90")
    return nvcc(source, "-ptx", "-arch=compute_90")[0].decode()


def nvcc(source, *options):
    flags = ("-std=c++17", "-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true")
    with tempfile.TemporaryDirectory() as folder:
        text, made = Path(folder) / "program.cu", Path(folder) / "made"
        text.write_text(source.text)
        command = ["nvcc", *flags, *options, "-o", str(made), str(text)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return made.read_bytes(), result.stdout + result.stderr


def resources(log):
    """What ptxas says of every kernel."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        numbers = {
            key: int(match[1]) if (match := re.search(pattern, part)) else 0
            for key, pattern in {
                "registers": r"Used (\d+) registers",
                "stack": r"(\d+) bytes stack frame",
                "spills": r"(\d+) bytes spill stores",
                "shared": r"(\d+) bytes smem",
            }.items()
        }
        found[part.split("'")[0]] = Resources(**numbers)
    return found


def described(value):
    if isinstance(value, str):
        return value
    return "-".join(f"{name}={value}" for name, value in value.defines) or "plain"


@pytest.mark.parametrize(("name", "source", "arch"), BUILDS + SLOW, ids=described)
def test_compiles_within_its_budget(name, source, arch):
    log = machine_code_log(source, arch)
    assert "warning" not in log.lower(), log
    kernels = resources(log)
    limits = REGISTERS | REGISTERS_ON_SM_120 if arch == "sm_120" else REGISTERS
    assert set(kernels) == entries(source)
    for kernel, used in kernels.items():
        assert used.stack == 0, f"{kernel}: {used}"
        assert used.spills == 0, f"{kernel}: {used}"
        assert used.shared <= 48 * 1024, f"{kernel}: {used}"
        assert 0 < used.registers <= limits[kernel], f"{kernel}: {used}"


def entries(source):
    return set(re.findall(r'extern "C" __global__[^;{]*?(\w+)\((?=[^()]*\)\s*\{)', source.text))


@pytest.mark.parametrize("name", MODULES)
def test_exported_kernels_are_those_that_are_launched(name):
    calls = [
        node for node in ast.walk(ast.parse((FOLDER / f"{name}_cuda.py").read_text())) if isinstance(node, ast.Call)
    ]
    launches = [c for c in calls if getattr(c.func, "attr", getattr(c.func, "id", "")) in ("launch", "_launch")]
    patterns = {name_pattern(a) for launch in launches for a in launch.args} - {None}
    assert patterns
    kernels = set().union(*map(entries, SOURCES[name]))
    assert all(any(re.fullmatch(pattern, kernel) for pattern in patterns) for kernel in kernels)
    assert all(any(re.fullmatch(pattern, kernel) for kernel in kernels) for pattern in patterns)


def name_pattern(node):
    """Of the string that an argument is, with anything where it is formatted; None for other arguments."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(re.escape(part.value) if isinstance(part, ast.Constant) else r"\w+" for part in node.values)
    return None


@pytest.mark.parametrize(("name", "source"), READ, ids=described)
def test_arithmetic_is_what_was_written(name, source):
    """No flushed subnormals, approximations or float atomics; a fused operation only where the text asks for one."""
    text = ptx(source)
    assert ".entry" in text
    assert not re.search(r"\.ftz\b", text)
    assert not re.search(r"\.(approx|full)\b", text)
    assert not re.search(r"\b(atom|red)\.[\w.]*\.f(16|32|64)\b", text)
    if "fma" not in source.text:
        assert not re.search(r"\b(fma|mad)\.[\w.]*f(32|64)\b", text)


@pytest.mark.parametrize(("name", "element"), [("codec", "x"), ("adamw4", "p")])
def test_numbers_are_loaded_and_stored_four_at_a_time(name, element):
    text = ptx(SOURCES[name][0])
    assert re.search(r"ld\.global[\w.]*\.v4\.[fbu]32", text), f"{element} is not loaded in 16 bytes"
    assert re.search(r"st\.global[\w.]*\.v4\.[fbu]32", text), f"{element} is not stored in 16 bytes"


def test_table_of_registers_is_complete():
    """And printed: the most registers over all variants."""
    table = defaultdict(dict)
    for _, source, arch in BUILDS:
        for kernel, used in resources(machine_code_log(source, arch)).items():
            table[kernel][arch] = max(used.registers, table[kernel].get(arch, 0))
    print("\n" + f"{'kernel':24}" + "".join(f"{arch:>8}" for arch in ARCHS) + "   limit")
    for kernel, columns in sorted(table.items()):
        print(f"{kernel:24}" + "".join(f"{columns[arch]:8}" for arch in ARCHS) + f"{REGISTERS.get(kernel, 0):8}")
    assert set(table) == set(REGISTERS)
