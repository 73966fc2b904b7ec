"""The study of block heterogeneity: its parts, and that its claims can fail."""

import json
import math

import pytest
import torch
from sharpscope.dynamics.studies import block_heterogeneity as study
from sharpscope.dynamics.studies import heterogeneity_claims as claims_of
from sharpscope.dynamics.studies.heterogeneity_experiments import grid_sums, known_spectrum, limit_cycles, quadratics
from sharpscope.dynamics.studies.heterogeneity_panels import density_panel, distance_panel, gap_panel
from sharpscope.dynamics.studies.laboratory import Laboratory
from sharpscope.dynamics.studies.optimizer_gap import (
    block_record,
    data,
    half_decade,
    network,
    search,
    spectra_along,
    train,
    trained,
    tuned,
)


def record(ratio, mean=0.3, linear=0.1):
    return {
        "blocks": ["a", "b"],
        "scale": [1.0, ratio],
        "ratio": ratio,
        "mean": mean,
        "max": 2 * mean,
        "linear": linear,
        "spread": math.log10(ratio),
        "js": [[0.0, mean], [mean, 0.0]],
        "grid": [-1.0, 0.0, 1.0],
        "density": [[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]],
    }


def gap(by, seeds=3):
    base = {"lr": 0.1, "held_out": [1.0] * seeds, "accuracy": [0.5] * seeds, "tried": {"0.1": 1}, "inside": True}
    return {"SGD": {**base, "train": [1 + by] * seeds}, "Adam": {**base, "train": [1.0] * seeds}}


class Origins(dict):
    def __missing__(self, name):
        return f"data of {name}"


ORIGINS = Origins()


def by_statement(claims):
    return {claim.statement.rpartition(": ")[2]: claim for claim in claims}


@pytest.mark.parametrize(("least", "tried"), [(2, 4), (3, 5), (5, 7), (0, 5), (-2, 7), (30, 9)])
def test_the_search_goes_on_until_the_best_is_inside(least, tried):
    seen = []

    def run(k):
        seen.append(k)
        return abs(k - least)

    best = search(run, (0, 1, 2, 3), 9)
    assert len(seen) == len(set(seen)) == tried
    assert best == min(max(least, min(seen)), max(seen))
    assert (min(seen) < best < max(seen)) == (least < 30)


def test_half_decades():
    assert [half_decade(k) for k in (-4, -1, 0, 1)] == [0.01, 0.316, 1.0, 3.16]


def test_training_is_a_function_of_its_settings_and_descends():
    first, again = (train("MLP", "Adam", 0.01, seed=1, steps=30) for _ in range(2))
    assert first.losses == again.losses
    assert len(first.losses) == 30
    assert first.losses[-1] < first.losses[0]
    assert train("MLP", "Adam", 0.01, seed=2, steps=3).losses != first.losses[:3]


def test_a_training_that_diverges_ends_and_loses():
    found = trained("MLP", "SGD", 1e20, seed=0, steps=30)
    assert (found["train"], found["held_out"], found["accuracy"], found["curve"]) == (math.inf, math.inf, 0.0, [])
    assert len(train("MLP", "SGD", 1e20, seed=0, steps=30).losses) < 30


def test_tuned_takes_the_best_of_what_it_tried():
    asked = []

    def attempt(lr, seed):
        asked.append((lr, seed))
        return trained("MLP", "SGD", lr, seed=seed, steps=20)

    found = tuned("SGD", attempt, seeds=[0, 1])
    assert asked[-1] == (found["lr"], 1)
    assert [f"{lr:.3g}" for lr, seed in sorted(asked) if seed == 0] == list(found["tried"])
    assert found["train"][0] == min(found["tried"].values()) == found["tried"][f"{found['lr']:.3g}"]
    alone = trained("MLP", "SGD", found["lr"], seed=1, steps=20)
    assert [found[key][1] for key in ("train", "held_out")] == [alone[key] for key in ("train", "held_out")]


def test_a_killed_search_goes_on_where_it_was(tmp_path):
    """A part for each learning rate and seed; models of digits do not depend on the text."""

    def names():
        said = []
        study._gap(Laboratory(tmp_path, quick=True, say=said.append), "MLP")
        return said

    first = names()
    assert set(first) >= {f"mlp-SGD-lr{lr}-0" for lr in ("0.01", "0.0316", "0.1", "0.316")}
    assert names() == []
    (tmp_path / "parts" / "mlp-SGD-lr0.1-0.json").unlink()
    assert names() == ["mlp-SGD-lr0.1-0"]
    settings = json.loads((tmp_path / "parts" / "mlp-SGD-lr0.1-0.json").read_text())["settings"]
    assert settings == {"model": "MLP", "optimizer": "SGD", "lr": 0.1, "seed": 0, "steps": study.SHORT_STEPS}


def test_the_text_is_a_setting_and_named(monkeypatch):
    """Another text is another part, another vocabulary, and another name in the claims."""
    monkeypatch.setattr("shutil.which", lambda program: None)
    assert study._text(claims_of.TRANSFORMER) == {"text": "pydoc"}
    assert study._text("MLP") == {}
    assert "pydoc" in study._origins([claims_of.TRANSFORMER])[claims_of.TRANSFORMER]
    asked = []

    class Asked:
        quick = False

        def part(self, name, compute, **settings):
            asked.append((compute, settings))
            return {"train": abs(math.log(settings["lr"])), "held_out": 1.0, "accuracy": 0.5, "curve": []}

    study._gap(Asked(), claims_of.TRANSFORMER)
    assert {compute for compute, _ in asked} == {trained}
    assert {settings["text"] for _, settings in asked} == {"pydoc"}
    monkeypatch.setattr("shutil.which", lambda program: f"/usr/games/{program}")
    assert study._text(claims_of.TRANSFORMER) == {"text": "kjv"}


def test_the_text_decides_vocabulary_and_windows(tmp_path):
    path = tmp_path / "text"
    path.write_text("abcd" * 2**17)
    assert network(claims_of.TRANSFORMER, 0, str(path)).embedding.num_embeddings == 4
    assert data("text", str(path)).source == f"text file {path}"
    done = train(claims_of.TRANSFORMER, "Adam", 0.01, seed=0, steps=3, text=str(path))
    assert done.losses[0] == pytest.approx(math.log(4), rel=0.1)
    record = spectra_along(claims_of.TRANSFORMER, 0.01, seed=0, at=[0], num=2, text=str(path))["0"]
    assert dict(zip(record["blocks"], record["size"], strict=True))["embedding"] == 4 * 16


def test_records_are_those_of_the_block_spectra():
    found = spectra_along("CNN", 0.01, seed=0, at=[0, 3], num=8)
    assert list(found) == ["0", "3"]
    alone = block_record(network("CNN", 0), "CNN", 8)
    assert found["0"] == alone
    assert found["3"]["scale"] != alone["scale"]
    assert alone["blocks"] == ["conv1", "conv2", "head"]
    assert alone["ratio"] == pytest.approx(max(alone["scale"]) / min(alone["scale"]))
    js = torch.tensor(alone["js"])
    assert float(js[torch.triu(torch.ones(3, 3), 1) > 0].mean()) == pytest.approx(alone["mean"])


def test_known_spectra_and_their_errors():
    found = [known_spectrum(seed, num_steps=60, num_probes=8) for seed in range(3)]
    assert all(one["top"] < 1e-6 and one["copies"] == 1 and abs(one["integral"] - 1) < 1e-3 for one in found)
    assert all(abs(one["trace"]) < 5 and abs(one["frobenius"]) < 5 for one in found)


def test_quadratics_favour_adam_where_blocks_differ():
    found = quadratics(20)
    assert sorted(found["heterogeneous"]["adam"])[10] < 500 < 1.5e4 < sorted(found["homogeneous"]["adam"])[10]
    step, gd, adam = found["heterogeneous"]["curves"][0]
    assert (step, gd, adam) == (0, 1.0, 1.0)


def test_cycles_scale_with_the_learning_rate():
    (_, large), (_, small) = limit_cycles([0.1, 0.05], beta2=0.9, steps=1200, draws=2)
    assert large / small == pytest.approx(4, rel=0.2)


def test_sums_over_grids_grow():
    found = grid_sums([1001, 2001])
    assert found["sum"][1] / found["sum"][0] == pytest.approx(2, rel=1e-3)
    assert found["times spacing"][0] == pytest.approx(found["divergence"][0], rel=1e-3)


@pytest.mark.parametrize(("transformer", "plain", "holds"), [(2e3, 20, True), (900, 20, False), (2e3, 40, False)])
def test_claims_about_ratios_can_fail(transformer, plain, holds):
    records = {claims_of.TRANSFORMER: transformer, "CNN": plain, "MLP": 2.0, "mixer": 5.0}
    found = by_statement(
        claims_of.ratio_claims(
            {
                name: [{"0": record(3e3 if name == claims_of.TRANSFORMER else 2.0)}, {"0": record(r)}]
                for name, r in records.items()
            }
        )
    )
    assert all(found[name].holds for name in (claims_of.TRANSFORMER, "CNN")) == holds
    assert found["MLP"].holds
    assert found["mixer"].holds is None


@pytest.mark.parametrize(("cnn", "worst", "expected"), [(0.2, 0.3, [True, True]), (0.32, 0.36, [False, False])])
def test_claims_about_divergences_can_fail(cnn, worst, expected):
    records = {"MLP": [{"0": record(2, 0.1)}], "CNN": [{"0": record(2, cnn)}], "x": [{"0": record(2, worst)}]}
    records[claims_of.TRANSFORMER] = [{"0": record(1e4, 0.31)}]
    assert [claim.holds for claim in claims_of.divergence_claims(records)] == [*expected, None]


def test_claims_about_gaps_can_fail():
    for by, holds in ((0.25, (True, False)), (0.01, (False, True))):
        losses = {name: gap(by) for name in (claims_of.TRANSFORMER, "CNN")}
        losses["CNN"]["SGD"]["accuracy"] = [0.45] * 3
        found = by_statement(claims_of.gap_claims(losses, steps=10, quick=False, origins=ORIGINS))
        assert (found[claims_of.TRANSFORMER].holds, found["CNN"].holds) == holds
        assert all(claim.holds is None for claim in claims_of.gap_claims(losses, steps=10, quick=True, origins=ORIGINS))
    fewer_points = {"CNN": gap(0.25)}
    assert by_statement(claims_of.gap_claims(fewer_points, steps=10, quick=False, origins=ORIGINS))["CNN"].holds, (
        "accuracy is equal"
    )
    assert found["CNN"].note.endswith("data of CNN")
    scaled = {"MLP": gap(0.1), claims_of.SCALED: gap(0.05)}
    assert claims_of.gap_claims(scaled, steps=10, quick=False, origins=ORIGINS)[-1].holds is False


def test_a_seed_that_diverges_is_no_gap():
    losses = {name: gap(0.25) for name in ("MLP", claims_of.TRANSFORMER, claims_of.SCALED)}
    for name in losses:
        losses[name]["SGD"]["train"][1] = math.inf
    claims = claims_of.gap_claims(losses, steps=10, quick=False, origins=ORIGINS)
    assert [claim.holds for claim in claims] == [False, False, None, False]
    assert all(claim.measured.startswith("diverged") for claim in claims)


@pytest.mark.parametrize(("gaps", "rho"), [((0, 1, 2, 3, 4), 1.0), ((4, 3, 2, 1, 0), -1.0), ((0, 1, 2, 4, 3), 0.9)])
def test_the_rank_correlation_decides(gaps, rho):
    names = "abcde"
    records = {name: [{"0": record(10.0**i, 0.05 * i, 0.01 * i)}] * 3 for i, name in enumerate(names, 1)}
    main, others = claims_of.correlation_claims(records, {n: gap(g) for n, g in zip(names, gaps, strict=True)})
    assert main.holds == (rho >= 0.7)
    assert main.measured.startswith(f"{rho:+.2f} (by seed {rho:+.2f}, {rho:+.2f}, {rho:+.2f})")
    assert others.holds is None
    assert all(f"{name} {1.0 * g:+.4f} ± 0.0000" in main.note for name, g in zip(names, gaps, strict=True))


def test_ties_share_their_rank():
    assert claims_of.rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(math.sqrt(0.9))


def test_training_claims_compare_start_and_end():
    [claim] = claims_of.training_claims({"MLP": [{"0": record(5.0), "40": record(2.0)}], "mixer": [{"0": record(3.0)}]})
    assert "5 -> 2 by seed after 40 steps" in claim.measured


def test_panels():
    density = density_panel("x", record(10.0))
    assert [line.label for line in density.lines] == ["a", "b"]
    assert list(density.lines[1].x) == [0.1]
    heat = distance_panel("x", record(10.0)).heat
    assert (heat.x, heat.values) == ([1, 2], [[0.0, 0.3], [0.3, 0.0]])
    assert gap_panel({"m": ([1.0, 2.0], [0.1, 0.2])}).lines[0].points


def test_the_spectra_of_a_network_under_training_are_those_of_its_copy():
    """Taking a record changes neither the weights nor the statistics of BatchNorm."""
    plain = train("CNN", "Adam", 0.01, seed=0, steps=4)
    watched = train("CNN", "Adam", 0.01, seed=0, steps=4, at=[0, 2], record=lambda model: block_record(model, "CNN", 8))
    assert plain.losses == watched.losses
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.model.state_dict().values(), watched.model.state_dict().values(), strict=True)
    )
