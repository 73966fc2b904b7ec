"""The replication table as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import pandas as pd

from ..dynamics.studies.replication import (
    INTRODUCTION,
    MISSED_HEAD,
    SUMMARY_HEAD,
    anchor,
    missed_claims,
    not_run,
    summary_rows,
)
from ..dynamics.studies.result import StudyResult

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #111; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; font-size: 13px; }
th, td { border-bottom: 1px solid #d9d9d9; padding: .35rem .5rem; text-align: left; vertical-align: top; }
th { background: #f4f6f8; position: sticky; top: 0; }
img { max-width: 100%; }
.holds { color: #00704f; } .misses { color: #b34700; font-weight: 600; } .reported { color: #6e6e6e; }
.setting, .command { color: #444; font-size: 13px; }
"""
CLASSES = {True: "holds", False: "misses", None: "reported"}


def replication_html(results: Mapping[str, StudyResult]) -> str:
    """A page with the summary and, for each study, its figure and its claims.

    The figures are links to NAME/study.png beside the page.
    """
    sections = "".join(_section(result) for result in results.values())
    summary = pd.DataFrame(_linked_rows(results), columns=list(SUMMARY_HEAD))
    return (
        f"<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n<title>Replication</title>\n"
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>Replication</h1>\n<p>{escape(INTRODUCTION)}</p>\n"
        f"{_table(summary)}\n<p>{escape(not_run(results))}</p>\n{_missed(results)}{sections}</body>\n</html>\n"
    )


def _missed(results: Mapping[str, StudyResult]) -> str:
    rows = [
        [
            f"<a href='#{anchor(r.title)}'>{escape(r.name)}</a>",
            *map(escape, (c.statement, c.expected, c.measured, c.note)),
        ]
        for r, c in missed_claims(results)
    ]
    if not rows:
        return ""
    return f"<h2>What does not hold here</h2>\n{_table(pd.DataFrame(rows, columns=list(MISSED_HEAD)))}\n"


def _linked_rows(results: Mapping[str, StudyResult]) -> list[list[str]]:
    rows = []
    for result, (paper, *numbers, command) in zip(results.values(), summary_rows(results), strict=True):
        link = f"<a href='#{anchor(result.title)}'>{escape(paper)}</a>"
        rows.append([link, *numbers, f"<code>{escape(command)}</code>"])
    return rows


def _section(result: StudyResult) -> str:
    claims = pd.DataFrame(
        [
            (
                escape(c.statement),
                escape(c.source),
                escape(c.expected),
                escape(c.measured),
                f"<span class='{CLASSES[c.holds]}'>{c.verdict}</span>",
                escape(c.note),
            )
            for c in result.claims
        ],
        columns=["claim", "source", "expected", "measured", "verdict", "note"],
    )
    figure = f"<img src='{result.name}/study.png' alt='{escape(result.title)}'>\n" if result.panels else ""
    return (
        f"<h2 id='{anchor(result.title)}'>{escape(result.title)}</h2>\n<p>{escape(result.paper)}</p>\n"
        f"<p class='setting'>{escape(result.setting)}</p>\n{figure}{_table(claims)}\n"
        f"<p class='command'><code>{escape(result.command)}</code>, {result.seconds:.0f} s</p>\n"
    )


def _table(frame: pd.DataFrame) -> str:
    """Its cells are HTML already."""
    with pd.option_context("display.max_colwidth", None):
        return frame.to_html(index=False, escape=False, border=0)
