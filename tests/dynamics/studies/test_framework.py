import json

import numpy as np
import pytest
from sharpscope.dynamics.studies import STUDIES, Claim, Line, Panel, StudyResult, laboratory, study_named
from sharpscope.dynamics.studies.laboratory import Laboratory

calls = []


def doubled(x):
    calls.append(x)
    return {"twice": 2 * x, "pair": (x, x)}


def test_a_part_is_computed_once_for_each_setting(tmp_path):
    calls.clear()
    for x in (1, 1, 2):
        assert Laboratory(tmp_path).part("doubled", doubled, x=x) == {"twice": 2 * x, "pair": [x, x]}
    assert calls == [1, 2]
    laboratory = Laboratory(tmp_path)
    laboratory.part("doubled", doubled, x=2)
    kept = json.loads((tmp_path / "parts" / "doubled.json").read_text())
    assert laboratory.seconds == kept["seconds"]


def test_without_a_folder_everything_is_computed_anew():
    calls.clear()
    laboratory = Laboratory()
    for _ in range(2):
        laboratory.part("doubled", doubled, x=1)
    assert calls == [1, 1]


def test_a_result_survives_json_and_shows_every_claim():
    claims = [
        Claim("a | b", "Somebody 2020, eq. 1", "<= 1", "0.5 ± 0.1", True),
        Claim("c", "derived here", "> 2", "1.9", False, "too few steps"),
        Claim("d", "derived here", "-", "7", None),
        Claim("e", "derived here", "> 2", "3", np.float64(3) > 2),
    ]
    panels = [Panel("t", "x", "y", [Line("one", [1, 2], [3.0, 4.0], [0.1, 0.2])], y_log=True, levels={"edge": 1.0})]
    result = StudyResult("name", "Title", "Paper", "Setting", claims, panels, True, 1.5)
    again = StudyResult.from_json(json.loads(json.dumps(result.to_json())))
    assert again.markdown() == result.markdown()
    assert again.panels[0].lines[0].y == [3.0, 4.0]
    rows = result.markdown().splitlines()[-4:]
    assert [row.rsplit("|", 2)[1].strip() for row in rows] == [
        "holds",
        "does not hold: too few steps",
        "reported",
        "holds",
    ]
    assert rows[0].startswith("| a \\| b |")


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_says_what_it_is(name):
    study = study_named(name)
    assert study.name == name
    assert all([study.title, study.paper, study.setting])


def test_an_unknown_study_is_answered_with_those_near():
    with pytest.raises(ValueError, match="`name` is 'adam-mimi'; near it: 'adam-mini'"):
        study_named("adam-mimi")


def test_a_part_is_computed_anew_with_another_library(tmp_path, monkeypatch):
    calls.clear()
    Laboratory(tmp_path).part("doubled", doubled, x=1)
    monkeypatch.setattr(laboratory, "source_mark", lambda function: "another")
    Laboratory(tmp_path).part("doubled", doubled, x=1)
    assert calls == [1, 1]


def test_nothing_is_kept_of_code_that_changed_while_it_ran(tmp_path, monkeypatch):
    calls.clear()
    monkeypatch.setattr(laboratory, "source_mark", lambda function: None)
    for _ in range(2):
        Laboratory(tmp_path).part("doubled", doubled, x=1)
    assert calls == [1, 1]
    assert not (tmp_path / "parts").exists()


def test_a_part_counts_once_and_its_name_stands_for_one_thing(tmp_path):
    found = Laboratory(tmp_path)
    for _ in range(3):
        found.part("doubled", doubled, x=1)
    kept = json.loads((tmp_path / "parts" / "doubled.json").read_text())
    assert found.seconds == kept["seconds"]
    with pytest.raises(ValueError, match="stands for {'x': 1} already"):
        found.part("doubled", doubled, x=2)
