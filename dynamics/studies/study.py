"""A study: the claims of one paper, put to the test with the parts of this library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..provenance import origin
from .laboratory import Laboratory
from .result import Claim, Panel, StudyResult


@dataclass(frozen=True)
class Study:
    """What a file of this package defines as `STUDY`.

    Attributes:
        name: On the command line.
        title: A line.
        paper: Authors, title, year.
        setting: Model, data, seeds and steps, in a sentence.
        investigate: Runs the parts in a laboratory; returns the claims and the panels of the figure. With
            `laboratory.quick` it takes less than a minute, otherwise at most ten, on two cores.
    """

    name: str
    title: str
    paper: str
    setting: str
    investigate: Callable[[Laboratory], tuple[Sequence[Claim], Sequence[Panel]]]

    def run(self, laboratory: Laboratory) -> StudyResult:
        """The whole study."""
        claims, panels = self.investigate(laboratory)
        setting = self.setting + (" Short version: fewer seeds and steps than that." if laboratory.quick else "")
        return StudyResult(
            self.name, self.title, self.paper, setting, claims, panels, laboratory.quick, laboratory.seconds, origin()
        )
