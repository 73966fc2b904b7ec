"""All studies side by side: run on several cores, put together in one table."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .catalogue import STUDIES, kept_result, study
from .result import Claim, StudyResult, markdown_table

TABLE = "replication"  # .md and .html
FAILURE = "failure.txt"
INTRODUCTION = (
    "Claims of papers, put to the test on CPU cores by small experiments with the parts of this library. Each claim "
    "has its source, the rule it has to obey with its tolerance, what was measured and the verdict. What does not "
    "hold here stays so; a number that is not judged is reported. Seconds are processor time; of studies "
    "without a date, wall time."
)


def replicate(
    folder: Path, names: Sequence[str] | None = None, *, quick: bool = False, jobs: int = -1
) -> Iterator[tuple[str, StudyResult | str]]:
    """Runs studies in as many processes as there are cores; what an earlier call has finished is not run again.

    Args:
        folder: Gets a folder for each study.
        names: Of studies; None takes all.
        quick: Short versions.
        jobs: Processes; -1 for one per core.

    Yields:
        The name and the result of each study as it ends; in place of the result the error of one that failed, whose
        traceback is then in its folder.
    """
    try:
        from joblib import Parallel, delayed
    except ImportError as error:
        raise ImportError("studies run side by side with joblib: pip install 'sharpscope[data]'") from error

    if jobs == 0 or jobs < -1:
        raise ValueError(f"`jobs` is {jobs}; give a number of processes >= 1, or -1 for one per core")
    calls = (delayed(_attempt)(name, folder / name, quick) for name in (STUDIES if names is None else names))
    parallel: Any = Parallel(n_jobs=jobs, return_as="generator_unordered", pre_dispatch="all")
    yield from parallel(calls)


def _attempt(name: str, folder: Path, quick: bool) -> tuple[str, StudyResult | str]:
    torch.set_num_threads(1)
    failure = folder / FAILURE
    failure.unlink(missing_ok=True)
    try:
        return name, study(name, quick=quick, out=folder, say=lambda part: print(f"{name}: {part}", flush=True))
    except Exception as error:  # the other studies go on
        folder.mkdir(parents=True, exist_ok=True)
        failure.write_text(traceback.format_exc())
        return name, f"{type(error).__name__}: {error}"


def kept_results(folder: Path) -> dict[str, StudyResult]:
    """The results that the studies' folders in `folder` hold, in the order of the catalogue.

    One whose last run failed is left out, though its earlier result is still there.
    """
    found = {name: kept_result(folder / name) for name in STUDIES if not (folder / name / FAILURE).exists()}
    return {name: result for name, result in found.items() if result is not None}


def missed_claims(results: Mapping[str, StudyResult]) -> list[tuple[StudyResult, Claim]]:
    """Every claim that does not hold, with its study."""
    return [(result, claim) for result in results.values() for claim in result.claims if claim.holds is False]


def not_run(results: Mapping[str, StudyResult]) -> str:
    """A sentence that names the studies without a result, or nothing."""
    absent = [name for name in STUDIES if name not in results]
    return f"Not run whole: {', '.join(absent)}." if absent else ""


def summary_rows(results: Mapping[str, StudyResult]) -> list[tuple[str, str, str, str, str, str]]:
    """Paper, claims that hold, do not hold, are reported; seconds; command; for each study."""
    return [
        (
            r.paper,
            str(r.held),
            str(r.judged - r.held),
            str(len(r.claims) - r.judged),
            f"{r.seconds:.0f}",
            r.command,
        )
        for r in results.values()
    ]


SUMMARY_HEAD = ("paper", "hold", "do not hold", "reported", "seconds", "command")
MISSED_HEAD = ("study", "claim", "expected", "measured", "why, or what must be known")


def replication_markdown(results: Mapping[str, StudyResult]) -> str:
    """The replication table: a summary, what does not hold, and every claim under its figure."""
    rows = ((*row[:5], f"`{row[5]}`") for row in summary_rows(results))
    missed = [
        (f"[{r.name}](#{anchor(r.title)})", c.statement, c.expected, c.measured, c.note)
        for r, c in missed_claims(results)
    ]
    parts = [f"# Replication\n\n{INTRODUCTION}\n\n{markdown_table(SUMMARY_HEAD, rows)}"]
    if absent := not_run(results):
        parts.append(f"{absent}\n")
    if missed:
        parts.append(f"## What does not hold here\n\n{markdown_table(MISSED_HEAD, missed)}")
    for r in results.values():
        figure = f"\n![{r.title}]({r.name}/study.png)\n" if r.panels else ""
        parts.append(f"{r.markdown()}{figure}\n`{r.command}`{_made(r)}\n")
    return "\n".join(parts)


def anchor(title: str) -> str:
    """How Markdown viewers name a heading in links."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _made(result: StudyResult) -> str:
    versions = result.origin.get("versions", {})
    when = str(result.origin.get("started", ""))[:10]
    return f", {when}, torch {versions['torch']}" if versions else ""
