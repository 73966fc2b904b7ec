"""What a study ends with: claims, each with its source and what was measured, and curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Claim:
    """One statement put to the test.

    Attributes:
        statement: What is claimed, in words.
        source: Who claims it: paper with section, table or theorem; "derived here" for what follows from its equations.
        expected: The rule, with its tolerance, e.g. "<= 0.3 nats".
        measured: The number or numbers found, with their error where randomness matters.
        holds: Whether `measured` obeys `expected`; None for a number that is reported without a claim.
        note: Why it does not hold, or what must be known to read it.
    """

    statement: str
    source: str
    expected: str
    measured: str
    holds: bool | None
    note: str = ""

    def __post_init__(self) -> None:
        if self.holds is not None:  # comparisons of numpy numbers give a type that JSON does not know
            object.__setattr__(self, "holds", bool(self.holds))

    @property
    def verdict(self) -> str:
        return {True: "holds", False: "does not hold", None: "reported"}[self.holds]


@dataclass(frozen=True)
class Line:
    """A curve y(x) with an optional half-width of its band; with `points` dots that no line joins."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    marker: bool = False
    points: bool = False


@dataclass(frozen=True)
class Heat:
    """Cells of colour: values[j][i] at (x[i], y[j]), None for an empty one; `label` names the colour bar."""

    x: Sequence[float]
    y: Sequence[float]
    values: Sequence[Sequence[float | None]]
    label: str
    log: bool = False

    def __post_init__(self) -> None:
        if len(self.values) != len(self.y) or any(len(row) != len(self.x) for row in self.values):
            shape = (len(self.values), *{len(row) for row in self.values})
            raise ValueError(f"`values` is {shape} for {len(self.y)} y and {len(self.x)} x; give a row of x for each y")


@dataclass(frozen=True)
class Panel:
    """One pair of axes: lines over the cells of `heat`. `levels` are named horizontal lines."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    x_log: bool = False
    y_log: bool = False
    levels: Mapping[str, float] = field(default_factory=dict)
    heat: Heat | None = None


@dataclass(frozen=True)
class StudyResult:
    """Everything a study found.

    Attributes:
        name, title, paper: Of the study.
        setting: Model, data, seeds and steps in a sentence; the caption of the figure.
        claims: In the order of the study.
        panels: Of its figure.
        quick: Whether it was the short version.
        seconds: Processor time of all parts, those of earlier processes too.
        origin: Versions, time and command of the process that wrote it.
    """

    name: str
    title: str
    paper: str
    setting: str
    claims: Sequence[Claim]
    panels: Sequence[Panel]
    quick: bool
    seconds: float
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def held(self) -> int:
        """Claims that hold."""
        return sum(claim.holds is True for claim in self.claims)

    @property
    def judged(self) -> int:
        """Claims that hold or do not; the others are numbers that are reported."""
        return sum(claim.holds is not None for claim in self.claims)

    @property
    def command(self) -> str:
        """What makes it again."""
        return f"sharpscope study {self.name}" + (" --quick" if self.quick else "")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> StudyResult:
        panels = [_panel(panel) for panel in content["panels"]]
        claims = [Claim(**claim) for claim in content["claims"]]
        return cls(**{**content, "claims": claims, "panels": panels})

    def markdown(self) -> str:
        """The claims as a Markdown table under a heading."""
        rows = [
            (c.statement, c.source, c.expected, c.measured, c.verdict + (f": {c.note}" if c.note else ""))
            for c in self.claims
        ]
        head = ("claim", "source", "expected", "measured", "verdict")
        return f"## {self.title}\n\n{self.paper}\n\n{self.setting}\n\n{markdown_table(head, rows)}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells may hold anything."""
    return "".join(f"{_row(cells)}\n" for cells in (head, ["---"] * len(head), *rows))


def _panel(content: Mapping[str, Any]) -> Panel:
    heat = content.get("heat")
    lines = [Line(**line) for line in content["lines"]]
    return Panel(**{**content, "lines": lines, "heat": None if heat is None else Heat(**heat)})


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
