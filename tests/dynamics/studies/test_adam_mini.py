"""The study of Adam-mini: its cheap parts, and that its claims can fail."""

import pytest
from sharpscope.dynamics.studies import adam_mini
from sharpscope.dynamics.studies.adam_mini import condition_numbers, memory, one_entry_blocks, package, row_block_ratio
from sharpscope.dynamics.studies.laboratory import Laboratory


def test_one_entry_blocks_are_adamw():
    assert one_entry_blocks(2) <= 1e-12


def test_parity_with_the_package():
    pytest.importorskip("adam_mini")
    assert package(2) <= 1e-12


def test_memory_counts_blocks():
    ((width, blocks, share),) = memory([64])
    assert width == 64
    assert share == pytest.approx((1 + blocks) / 2, abs=1e-3)
    assert 0.5 < share < 0.52


def test_the_hessian_is_the_more_block_diagonal_the_more_classes():
    few, many = (sum(row_block_ratio(C, [0, 1, 2])) / 3 for C in (2, 100))
    assert many > 2 * few


def test_condition_numbers():
    assert sum(ratio >= 1 for ratio in condition_numbers(200, 1)) >= 180
    assert sum(ratio < 1 for ratio in condition_numbers(200, 4)) >= 180


class Canned(Laboratory):
    """Gives numbers for the parts that train, runs the others."""

    def __init__(self, losses):
        super().__init__()
        self.losses = losses

    def part(self, name, compute, **settings):
        if not name.startswith(("training", "long")):
            small = {"seeds": [0, 1], "draws": 50, "steps": 1, "widths": [64]}
            return compute(**{**settings, **{key: v for key, v in small.items() if key in settings}})
        if name.startswith("long"):
            return {"held_out": self.losses.get(name, 1.0)}
        loss = self.losses[name.removeprefix("training ")]
        num = len(settings["seeds"])
        return {"lr": 3e-3, "losses": [loss] * num, "curve": [[1, loss]], "at_edge": False}


@pytest.mark.parametrize(("mini", "holds"), [(2.1, True), (2.5, False)])
def test_claims_about_training_can_fail(mini, holds):
    losses = {"AdamW": 2.0, "AdamMini": mini, "whole": 2.2, "SGD": 2.3}
    claims, panels = adam_mini.investigate(Canned(losses))
    by_text = {claim.statement: claim for claim in claims}
    training = [claim for text, claim in by_text.items() if "nearly as well" in text or "better than one" in text]
    assert [claim.holds for claim in training] == [holds, holds]
    assert len(panels) == 2
