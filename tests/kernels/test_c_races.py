"""The C kernels under ThreadSanitizer: two threads whose ranges share rows and columns, and a planted race."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from sharpscope.kernels._launch import FOLDER

DRIVER = Path(__file__).parent / "two_threads.c"
SOURCES = {"adamw4": ("-DADAMW4",), "codec": ()}
FORMS = {"native": ("-march=native",), "portable": ("-DPORTABLE",)}
WARNING = "WARNING: ThreadSanitizer: data race"


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """`sanitized(source, form, *arguments)` runs the driver; skips where ThreadSanitizer does not."""
    folder = tmp_path_factory.mktemp("races")
    if not shutil.which("gcc"):
        pytest.skip("no gcc on PATH: nothing can be built for ThreadSanitizer")

    def built(target, *what, text=None):
        command = ["gcc", "-std=gnu11", "-O1", "-g", "-w", "-ffp-contract=off", "-fsanitize=thread", "-pthread", *what]
        result = subprocess.run([*command, "-o", target, "-lm"], input=text, capture_output=True, text=True)
        return result.stderr if result.returncode else ""

    empty = folder / "empty"
    if said := built(empty, "-xc", "-", text="int main(void) { return 0; }"):
        pytest.skip(f"gcc has no ThreadSanitizer: {said[:300]}")
    # Some kernels place memory so randomly that ThreadSanitizer cannot start: then without randomness.
    attempts = [[], ["setarch", platform.machine(), "-R"]]
    works = [a for a in attempts if (not a or shutil.which(a[0])) and not subprocess.run([*a, empty]).returncode]
    if not works:
        pytest.skip("a program does not start under ThreadSanitizer")

    def run(source, form, *arguments):
        program = folder / f"{source}-{form}"
        if not program.exists():
            said = built(program, *FORMS[form], *SOURCES[source], f"-I{FOLDER}", DRIVER)
            assert not said, said
        return subprocess.run([*works[0], program, *arguments], capture_output=True, text=True, timeout=120)

    return run


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", SOURCES)
def test_ranges_do_not_race(sanitized, source, form):
    result = sanitized(source, form)
    assert WARNING not in result.stderr, result.stderr[:6000]
    assert (result.returncode, result.stdout) == (0, "finished\n"), result.stderr[:3000]


@pytest.mark.parametrize("source", SOURCES)
def test_a_planted_race_is_found(sanitized, source):
    result = sanitized(source, "portable", "planted")
    assert WARNING in result.stderr
    assert "in race_half" in result.stderr
