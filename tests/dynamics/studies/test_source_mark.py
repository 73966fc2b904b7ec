import math

import sharpscope.dynamics.studies.source_mark as subject
from sharpscope.dynamics.optimizers.choice import make_optimizer
from sharpscope.dynamics.studies.character_training import trained
from sharpscope.dynamics.studies.digit_problems import half_squares
from sharpscope.dynamics.studies.source_mark import reached, source_mark
from sharpscope.hessian import Hessian

PLACE = "sharpscope.dynamics.studies.digit_problems"


def test_imports_are_followed_to_the_end():
    found = reached(Hessian.__module__)
    assert {"sharpscope.hessian.operator", "sharpscope.landscape.objective", "sharpscope.landscape.batches"} <= found
    assert not any(name.startswith("sharpscope.dynamics") for name in found)
    assert all(name == "sharpscope" or name.startswith("sharpscope.") for name in found)


def test_what_is_loaded_by_name_counts():
    assert "sharpscope.dynamics.optimizers.lion" in reached(make_optimizer.__module__)
    assert "sharpscope.dynamics.optimizers.psgd_kron" in reached(trained.__module__)
    kernels = reached("sharpscope.kernels.codec")
    assert {"sharpscope.kernels.codec_numba", "sharpscope.kernels._dispatch"} <= kernels


def test_other_code_has_another_mark(tmp_path, monkeypatch):
    before = source_mark(half_squares)
    assert source_mark(half_squares) == before
    changed = tmp_path / "changed.py"
    changed.write_text("x = 1\n")
    monkeypatch.setattr(subject, "_BEGAN", math.inf)
    monkeypatch.setattr(subject, "_place", lambda name: changed)
    subject._digest.cache_clear()
    subject._imported.cache_clear()
    after = source_mark(half_squares)
    changed.write_text("x = 2\n")
    subject._digest.cache_clear()
    assert len({before, after, source_mark(half_squares)}) == 3
    subject._digest.cache_clear()
    subject._imported.cache_clear()


def test_a_module_without_imports_is_alone():
    assert reached(PLACE) == {PLACE}


def test_a_file_that_changed_since_the_process_began_leaves_no_mark(monkeypatch):
    assert source_mark(half_squares) is not None
    monkeypatch.setattr(subject, "_BEGAN", 0.0)
    assert source_mark(half_squares) is None
