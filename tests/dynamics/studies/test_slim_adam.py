"""The study of SlimAdam: its cheap parts."""

import pytest
from sharpscope.dynamics.studies.character_training import CharacterTraining
from sharpscope.dynamics.studies.slim_adam import SWAPPED, TABLE, errors, estimators, identities, profile, saved


def test_it_is_adamw_and_adam_mini_where_averages_agree():
    assert max(identities(2).values()) <= 1e-12


def test_the_snr_of_known_distributions():
    for measured, exact in estimators(20_000).values():
        assert measured == pytest.approx(exact, rel=0.05)


def test_a_profile_separates_embeddings_at_once():
    found = profile(lr=3e-4, seed=0, steps=25, after=0)
    assert found["roles"]["token embedding"]["outputs"] < 0.3
    assert found["roles"]["head"]["outputs"] < 0.3 < found["roles"]["head"]["inputs"]
    assert 0 <= found["saved"] < 1


def test_savings_and_errors_of_the_table():
    model = CharacterTraining(0, tied=False).model
    assert saved(model, {}) == 0.0
    assert 0.95 < saved(model, TABLE) < 0.97
    assert SWAPPED["value"] == "inputs"
    wrong, right = errors(SWAPPED, 3e-3, 5), errors(TABLE, 3e-3, 5)
    assert errors({}, 3e-3, 1) == pytest.approx([0.0, 1.0])
    assert right[0] < wrong[0]
