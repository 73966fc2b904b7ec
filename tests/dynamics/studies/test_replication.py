import json
from pathlib import Path

import pytest
from sharpscope.dynamics.studies import STUDIES, Claim, Line, Panel, catalogue, replication
from sharpscope.dynamics.studies.replication import kept_results, replicate, replication_markdown, summary_rows
from sharpscope.dynamics.studies.study import Study
from sharpscope.figures.replication import replication_html

pytest.importorskip("joblib")


def counted(x):
    return x


def studied(name, value):
    def investigate(laboratory):
        if value is None:
            laboratory.part("before", counted, x=1)
            raise RuntimeError("a part broke")
        found = laboratory.part("number", counted, x=value)
        claims = [
            Claim("a | positive <number>", "Euclid", "> 0", str(found), found > 0),
            Claim("an even number", "Euclid", "even", str(found), found % 2 == 0, "it is odd"),
            Claim("the number", "here", "-", str(found), None),
        ]
        return claims, [Panel("p", "x", "y", [Line("", [0, 1], [0, found])])]

    return Study(name, f"Title of {name}", f"Paper of {name}", "One number", investigate)


@pytest.fixture
def three(monkeypatch):
    """Three studies, of which one breaks, run in this process."""
    known = {"one": studied("one", 1), "two": studied("two", 2), "broken": studied("broken", None)}
    for module in (catalogue, replication):
        monkeypatch.setattr(module, "STUDIES", dict.fromkeys(known, ""))
    monkeypatch.setattr(catalogue, "study_named", known.get)


def test_every_study_is_run_and_one_that_breaks_stops_no_other(tmp_path, three, capsys):
    found = dict(replicate(tmp_path, jobs=1))
    assert list(found) == ["one", "two", "broken"]
    assert (found["one"].held, found["one"].judged, found["two"].held) == (1, 2, 2)
    assert found["broken"] == "RuntimeError: a part broke"
    assert "a part broke" in (tmp_path / "broken" / "failure.txt").read_text()
    assert list(kept_results(tmp_path)) == ["one", "two"]
    assert "one: number" in capsys.readouterr().out
    list(replicate(tmp_path, jobs=1))
    assert "number" not in capsys.readouterr().out  # kept
    assert [name for name, _ in replicate(tmp_path, ["two"], jobs=1)] == ["two"]


def test_the_tables_hold_every_claim(tmp_path, three):
    list(replicate(tmp_path, jobs=1))
    results = kept_results(tmp_path)
    assert summary_rows(results)[0][:4] == ("Paper of one", "1", "1", "1")
    text = replication_markdown(results)
    assert text.count("| a \\| positive <number> | Euclid | > 0 | 1 | holds |") == 1
    assert "| [one](#title-of-one) | an even number | even | 1 | it is odd |" in text
    assert "![Title of two](two/study.png)" in text
    assert "`sharpscope study two`" in text
    assert "Not run whole: broken." in text
    page = replication_html(results)
    assert "Not run whole: broken." in page
    assert page.count("an even number") == 3  # one of them in the list of what does not hold
    assert page.count("a | positive &lt;number&gt;") == 2
    assert "<img src='one/study.png'" in page
    assert page.count("class='misses'") == 1
    assert "<h2 id='title-of-one'>" in page
    assert "<a href='#title-of-one'>" in page


def test_a_study_whose_last_run_failed_is_not_shown_with_its_earlier_result(tmp_path, three):
    list(replicate(tmp_path, ["one"], jobs=1))
    (tmp_path / "one" / "failure.txt").write_text("RuntimeError")
    assert kept_results(tmp_path) == {}
    list(replicate(tmp_path, ["one"], jobs=1))
    assert list(kept_results(tmp_path)) == ["one"]


def test_a_result_says_where_it_comes_from(tmp_path, three):
    list(replicate(tmp_path, ["one"], jobs=1))
    content = json.loads((tmp_path / "one" / "study.json").read_text())
    assert "torch" in content["origin"]["versions"]


def test_the_number_of_processes_is_checked(tmp_path):
    with pytest.raises(ValueError, match="`jobs` is 0"):
        list(replicate(tmp_path, [], jobs=0))


def test_studies_run_in_processes_of_their_own(tmp_path):
    [(name, result)] = replicate(tmp_path, ["no-such-study"], jobs=2)
    assert name == "no-such-study"
    assert "near it" in result


def test_the_tables_of_the_repository_are_those_of_its_results():
    root = Path(__file__).resolve().parents[3]
    results = kept_results(root / "docs" / "studies")
    assert list(results) == list(STUDIES)
    assert not any(result.quick for result in results.values())
    assert (root / "docs" / "studies" / "replication.md").read_text() == replication_markdown(results)
    assert (root / "docs" / "studies" / "replication.html").read_text() == replication_html(results)
    readme = (root / "README.md").read_text()
    for name, result in results.items():
        assert f"](docs/studies/{name}/study.png) | {result.held} of {result.judged} |" in readme
    held, judged = (sum(getattr(r, which) for r in results.values()) for which in ("held", "judged"))
    assert f"of {judged} claims {held} hold" in readme
