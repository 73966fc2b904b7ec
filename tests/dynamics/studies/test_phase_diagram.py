"""The parts of the study on small nets, and how its claims are judged."""

import math

import pytest
import torch
from sharpscope.dynamics.studies import phase_diagram
from sharpscope.dynamics.studies.phase_diagram import STUDY
from sharpscope.dynamics.studies.phase_limits import linear_unit, recovered, two_layers
from sharpscope.dynamics.studies.phase_panels import diagram, numbers, regime_panels
from sharpscope.dynamics.studies.phase_runs import SATURATION_GRID, regime_claims, saturation_claims
from sharpscope.dynamics.studies.phase_scan import (
    _path,
    digits_data,
    digits_problem,
    early_runs,
    joined,
    long_run,
    saturation,
)


def scan(*settings, **options):
    return joined([early_runs(*settings, **options)])


def test_a_narrow_net_with_zero_output_has_no_reduction():
    found = scan(2, 8, 0, [1.0, 2.0, 2.3, 2.64], zero_output=True)
    assert found["constants"]["c_loss"] in (2.3, 2.64)
    assert found["constants"]["c_sharp"] == 1.0
    assert found["loss_0"] == pytest.approx(0.05)  # half the mean of a one-hot target's squares
    assert found["c"] == [1.0, 2.0, 2.3, 2.64]


def test_the_first_sharpness_is_that_of_the_dense_hessian():
    found = scan(2, 4, 3, [0.5, 1.0])
    data = digits_data()
    model, _ = digits_problem(2, 4, 3, data)
    names = [name for name, _ in model.named_parameters()]

    def loss(*weights):
        prediction = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (data[0],))
        return 0.5 * (prediction - data[1]).square().mean()

    weights = tuple(p.detach() for p in model.parameters())
    blocks = torch.autograd.functional.hessian(loss, weights)
    sizes = [p.numel() for p in weights]
    rows = [torch.cat([b.reshape(n, -1) for b in row], dim=1) for row, n in zip(blocks, sizes, strict=True)]
    assert found["lambda_0"] == pytest.approx(float(torch.linalg.eigvalsh(torch.cat(rows))[-1]), rel=1e-3)


def test_a_scan_stops_at_the_first_divergence():
    found = scan(3, 16, 0, [1.0, 100.0, 1000.0, 2000.0, 1e6, 2e6])
    assert found["sharpness"][-1] is None
    assert all(ratio is not None for ratio in found["sharpness"][:-1])
    assert found["constants"]["c_max"] == found["c"][-2]


def test_a_scan_in_parts_is_the_scan(monkeypatch):
    """And a part after a rise does without what has risen."""
    from sharpscope.dynamics.studies.laboratory import Laboratory

    grid = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
    whole = scan(3, 16, 0, grid)
    assert whole["constants"]["c_sharp"] in grid[1:-2]
    monkeypatch.setattr(phase_diagram, "PART_LENGTH", 2)
    said = []
    parted = phase_diagram._scan(Laboratory(say=said.append), "x", grid, depth=3, width=16, seed=0)
    assert parted == whole
    assert len(said) == -(-len(whole["c"]) // 2) >= 2
    later = early_runs(3, 16, 0, [2.0], risen=["sharpness"])
    assert later["runs"][0]["sharpness"] is None
    assert later["runs"][0]["path"] is not None
    assert "sharpness" in later["risen"]


def test_the_path_goes_from_the_start_to_the_present_weights():
    data = digits_data(30)
    model, objective = digits_problem(2, 8, 0, data)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = objective.loss()
    with torch.no_grad():
        model[2].weight.mul_(3.0)
    losses = _path(model, data, start)
    assert len(losses) == 101
    assert losses[0] == pytest.approx(first, rel=1e-12)
    assert losses[-1] == pytest.approx(objective.loss(), rel=1e-12)
    with torch.no_grad():
        model[2].weight.mul_(2.0 / 3.0)
    assert losses[50] == pytest.approx(objective.loss(), rel=1e-12)


def test_saturation_starts_at_one_and_falls():
    ratios = saturation(3, 32, 0, [0.01, 4.0], 2.0)["ratio"]
    assert ratios[0] > ratios[1]
    # At c = 0.01 two units of time are 200 steps, at c = 4 one.
    assert all(0 < ratio < 1.5 for ratio in ratios)


def test_a_long_run_goes_on_from_stage_to_stage():
    whole = long_run(2, 8, 0, 0.5, 20, [[12, 2]])
    staged = long_run(2, 8, 0, 0.5, 20, [[6, 2], [6, 2]])
    assert whole["step"] == staged["step"] == [0, 2, 4, 6, 8, 10, 12]
    assert whole["loss"] == pytest.approx(staged["loss"], rel=1e-12)
    assert whole["sharpness"][0] * 4 == pytest.approx(whole["threshold"], rel=1e-3)  # 2 / η = 2 λ_0 / c
    assert long_run(2, 8, 0, 0.5, 20, [[2, 1]], shuffled=True)["loss"][1] != pytest.approx(whole["loss"][1])


def test_known_limits():
    unit = linear_unit([0], [1.0, 1.999, 2.0, 2.001, 2.1])
    assert unit["brackets"] == [(2.0, 2.001)]
    assert unit["c_sharp"] == [None]
    assert unit["error"] < 1e-12
    pair = two_layers(16, [0], [1.0, 2.5, 3.9], 40)
    assert pair["trained"] == pair["mapped"]
    assert pair["loss"] < 1e-10
    assert recovered(50, 1) == 50


# The claims


def cell(c_loss, c_sharp, c_barrier, c_max):
    constants = {"c_loss": c_loss, "c_sharp": c_sharp, "c_barrier": c_barrier, "c_max": c_max}
    return {"constants": constants, "c": [1.0, 2.0, 4.0], "sharpness": [0.9, 0.5, None], "active": [0.5, 0.5, None]}


def test_the_order_is_judged_in_wide_nets_and_a_break_is_named():
    good, bad = cell(2.0, 3.0, 4.0, 5.0), cell(4.0, 3.0, 4.0, 5.0)
    order, barrier, lowest = phase_diagram._order({(4, 64): [good], (4, 16): [bad]})
    assert order.holds
    assert barrier.holds
    assert lowest.holds
    order, *_ = phase_diagram._order({(4, 64): [good, bad]})
    assert not order.holds
    assert order.note == "c_loss ≤ c_sharp ≤ c_max broken at d = 4, w = 64: 4, 3, 5"
    assert not phase_diagram._order({(4, 64): [cell(1.5, 3.0, 4.0, 5.0)]})[2].holds
    # What the grid does not reach is larger than what it does.
    assert phase_diagram._order({(4, 64): [cell(2.0, 3.0, None, None)]})[0].holds


def test_the_trend_is_judged_by_every_seed_and_by_the_median_in_the_narrow_net():
    cells = {
        (2, 128): [cell(2.64, 3, 4, 5)] * 3,
        (4, 128): [cell(4.0, 5, 6, 12), cell(3.0, 5, 6, 12)],
        (8, 128): [cell(None, None, None, None)],
        (4, 16): [cell(c, 20, 30, 40) for c in (4.0, 7.0, 9.0, 12.0, None)],
    }
    claims = {claim.statement: claim for claim in phase_diagram._trend(cells, quick=False)}
    assert claims["c_loss at depth 2, width 128"].holds
    assert claims["c_loss at depth 4, width 128"].holds is False
    assert claims["c_loss at depth 8, width 128"].holds
    assert claims["c_loss at depth 4, width 16"].holds
    assert claims["c_loss at depth 4, width 16"].measured == "4, 7, 9, 12, > 64 (seeds 0 to 4)"
    assert all(claim.holds is None for claim in phase_diagram._trend(cells, quick=True))


class Kept:
    """A laboratory that returns what it is told, by the beginning of a part's name."""

    quick = False

    def __init__(self, **values):
        self.values = values

    def part(self, name, compute, **settings):
        return self.values[name.rsplit("-", 1)[0]]


def record(sharpness):
    steps = list(range(len(sharpness)))
    return {"step": steps, "loss": [1 / (1 + s) for s in steps], "sharpness": sharpness, "threshold": 10.0}


FALL = [8.0, 6.0, 4.0, 3.0] + [2.0] * 60
RISE = [2.0 * 1.03**i for i in range(55)]
EDGE = [10.1, 9.9] * 100


def test_the_edge_is_judged_by_every_record_of_the_last_tenth():
    """The mean of 9 and 11 is at the edge, a record of 9 is not."""
    run = FALL + RISE + EDGE
    run[-3] = 9.0
    claims, panels = regime_claims(Kept(run=record(run), shuffled=record(run)))
    assert [claim.holds for claim in claims] == [True, True, True, False, True, False]
    assert claims[3].measured.startswith("1.800 to 2.020, mean 1.99")
    assert panels[0].title.endswith("seed 0 of 3: the first with all four regimes")
    assert regime_claims(Kept(run=record(FALL), shuffled=record(FALL)))[1][0].title.endswith(
        "none has all four regimes"
    )


def test_a_run_that_diverges_is_not_at_the_edge():
    run = [*FALL, *RISE, *EDGE, math.nan]
    claims, _ = regime_claims(Kept(run=record(run), shuffled=record(run)))
    assert [claims[i].holds for i in (0, 3, 5)] == [True, False, False]
    assert claims[3].measured == "diverged; diverged; diverged"


@pytest.mark.parametrize(("run", "holds"), [(FALL + RISE + EDGE, [True] * 6), (FALL, [True, True, *[False] * 4])])
def test_regimes_are_judged_by_labels_and_by_the_end(run, holds):
    claims, panels = regime_claims(Kept(run=record(run), shuffled=record(run)))
    assert [claim.holds for claim in claims] == holds
    assert panels[0].levels == {"edge": 2.0}
    assert len(panels) == 3


@pytest.mark.parametrize(
    ("at", "holds"), [(2.2, [True] * 3), (0.6, [False, False, True]), (7.0, [False, False, False])]
)
def test_saturation_is_judged_by_drop_and_place(at, holds):
    ratios = [1 / (1 + math.exp((c - at) / 0.2)) for c in SATURATION_GRID]
    claims, panel = saturation_claims(Kept(saturation={"ratio": ratios}), 128, [4.0, 4.0, None])
    assert [claim.holds for claim in claims] == holds
    assert panel.x_log


@pytest.mark.parametrize(
    ("first", "holds"),
    [(10.0, [True] * 3), (3.0, [False] * 3), (SATURATION_GRID[0], [False] * 3), (0.0, [False] * 3)],
)
def test_a_saturation_that_diverges_is_judged_up_to_there(first, holds):
    ratios = [1 / (1 + math.exp((c - 2.2) / 0.2)) if c < first else math.nan for c in SATURATION_GRID]
    if not first:
        ratios = [1.0 + c for c in SATURATION_GRID]  # falls nowhere
    claims, panel = saturation_claims(Kept(saturation={"ratio": ratios}), 128, [4.0, 4.0, None])
    assert [claim.holds for claim in claims] == holds
    assert all(math.isfinite(y) for line in panel.lines for y in line.y)
    if first == 3.0:
        assert [claims[0].measured, claims[1].measured] == ["diverged, diverged, diverged", "never"]
    if first:
        assert "diverges at c = " in claims[1].note


def test_units_die_only_where_few_are_active():
    def beyond(active):
        return {**cell(2.0, 3.0, 4.0, None), "active": [0.5, active]}

    [claim] = phase_diagram._largest({(2, 128): [beyond(0.0), beyond(0.2), cell(2.0, 3.0, 4.0, 12.0)]})
    assert claim.holds is False
    assert claim.note.endswith("seed 0 a share of 0 (they die), seed 1 a share of 0.2")
    [claim] = phase_diagram._largest({(2, 128): [cell(2.0, 3.0, 4.0, 12.0)]})
    assert claim.holds
    assert not claim.note


# The figure


def test_the_diagram_has_widths_in_the_order_of_their_shape_and_blank_cells():
    cells = {(4, 16): [cell(4.0, 5.0, 6.0, None)] * 2, (4, 64): [cell(2.0, 3.0, 4.0, 5.0)], (2, 64): [cell(2, 3, 4, 5)]}
    [panel] = diagram(cells, 4)
    assert panel.heat.x == [4 / 64, 4 / 16]
    assert panel.heat.values == [[0.9, 0.9], [0.5, 0.5], [None, None]]
    assert [line.label for line in panel.lines] == ["c = 2", "c_loss", "c_sharp", "c_barrier", "c_max"]
    assert panel.lines[1].y == [2.0, 4.0]
    assert panel.lines[-1].x == [4 / 64]
    assert diagram(cells, 2) == []
    assert numbers([2.6390, None]) == "2.64, > 64"


def test_the_lines_of_regimes_meet():
    from sharpscope.dynamics.regimes import regimes

    run = record(FALL + RISE + EDGE)
    found = regimes(run["step"], run["loss"], run["sharpness"], run["threshold"])
    panel, loss = regime_panels(run, found, "title")
    assert len(panel.lines) == len(found) == 4
    for before, after in zip(panel.lines, panel.lines[1:], strict=False):
        assert before.x[-1] == after.x[0]
    assert panel.lines[-1].y[-1] == pytest.approx(2 * 9.9 / 10)
    assert loss.lines[0].y[0] == 1.0


def test_the_study_says_what_it_is():
    assert STUDY.name == "phase-diagram"
    assert "digits" in STUDY.setting
