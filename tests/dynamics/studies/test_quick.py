"""The short version of every study runs whole: its claims have numbers, its figure can be drawn."""

import matplotlib.pyplot as plt
import pytest
from sharpscope.dynamics.studies import STUDIES, StudyResult, study
from sharpscope.figures import study_figure


@pytest.mark.parametrize("name", STUDIES)
def test_the_short_version_runs_whole(name, tmp_path):
    result = study(name, quick=True, out=tmp_path)
    assert result.quick
    assert result.claims
    for claim in result.claims:
        assert all([claim.statement, claim.source, claim.expected, claim.measured]), claim
    assert any(claim.holds for claim in result.claims)
    # What is exact holds in the short version as in the long one.
    exact = [c for c in result.claims if "1e-12" in c.expected or "bit for bit" in c.expected]
    assert all(claim.holds in (True, None) for claim in exact), exact
    assert StudyResult.from_json(result.to_json()).markdown() == (tmp_path / "study.md").read_text()
    plt.close(study_figure(result).figure)
