"""The HTML report of a diagnosis: findings in plain words, a figure for each, the what-if, what was not checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from polyreward.report.diagnosis_figures import FIGURES, bars, coupling, shares
from polyreward.report.html import (
    Section,
    cards,
    code,
    details,
    figure,
    heading,
    notice,
    table,
    text,
    write_page,
)

if TYPE_CHECKING:
    from polyreward.audit.diagnose import Diagnosis, Finding


_WORDS = (
    "A policy is updated by advantages: how much better a sample's weighted sum of rewards is than those of the "
    "other samples of its group, which answer the same prompt. This report says what in the log distorts them. "
    "Every figure is about differences inside groups, and comes with a 95 % interval. Errors and warnings need "
    "attention; notes do not."
)


def write_diagnosis(path: str | Path, diagnosis: Diagnosis, source: str | Path) -> Path:
    """Write the report of `diagnosis` on the log `source` to `path`, whole or not at all."""
    problems = diagnosis.problems()
    sections = [_headlines(diagnosis)]
    sections += [_finding(diagnosis, finding, k) for k, finding in enumerate(problems)]
    if diagnosis.what_if:
        sections.append(_what_if(diagnosis))
    sections += [_background(diagnosis, problems), _not_checked(diagnosis)]
    lead = [_facts(diagnosis), text(_WORDS)]
    return write_page(path, "What drives this policy's update", sections, f"Diagnosis of {source}", lead)


def _facts(diagnosis: Diagnosis) -> str:
    facts = diagnosis.facts
    shown = [
        ("rollouts", f"{facts['rollouts']:,}"),
        ("groups", f"{facts['groups']:,}"),
        ("rewards", str(len(facts["rewards"]))),
        ("tasks", str(len(facts["tasks"]) or "–")),
        ("steps", f"{facts['steps'][0]:.0f}–{facts['steps'][1]:.0f}" if facts["steps"] else "–"),
        ("trusted reward", facts["reference"] or "none"),
    ]
    return cards(shown)


def _headlines(diagnosis: Diagnosis) -> Section:
    fragments = [
        notice(f"{finding.severity}: {finding.kind}", finding.statement, finding.severity, f"finding-{k}")
        for k, finding in enumerate(diagnosis.problems())
    ]
    if not fragments:
        fragments = [notice("no problem found", "None of the checks below found a problem in this log.", "good")]
    fragments += [notice(f"note: {f.kind}", f.statement) for f in diagnosis.findings if f.severity == "info"]
    return Section("Findings", fragments)


def _finding(diagnosis: Diagnosis, finding: Finding, place: int) -> Section:
    fragments = [text(finding.statement)]
    draw = FIGURES.get(finding.kind)
    plot = draw(diagnosis.tables, finding) if draw else None
    if plot is not None:
        fragments.append(figure(plot[0], plot[1], 520 if finding.kind == "drift" else 340))
    if finding.part:
        fragments.append(heading(f"What addresses it: {finding.part}"))
    if finding.fix:
        fragments.append(code(finding.fix))
    return Section(f"{finding.kind.capitalize()}: {finding.subject}", fragments, f"finding-{place}")


def _what_if(diagnosis: Diagnosis) -> Section:
    change = diagnosis.what_if
    assert change is not None
    fragments = [
        text(
            f"The advantages of {change.rollouts:,} rollouts ({change.steps} steps) were computed again with what "
            f"all the findings call for together. Their cosine with the present ones is {change.cosine:.2f} (1: the "
            f"same update), and {change.sign_flips:.0%} of the samples change sign: what was pushed up is pushed "
            f"down, or the reverse. Of the pairs of samples that the rewards tell apart, {change.lost[0]:.0%} get "
            f"the same advantage now and {change.lost[1]:.0%} with the suggestion."
        ),
        code(change.code),
        heading("The same in a recipe"),
        code(change.recipe),
    ]
    for name, entry in change.tables.items():
        # of a stratum it matters whether it is pushed up or down as a whole; of a task, how much of the update it takes
        now, axis = {"reward": (1, "correlation"), "stratum": (4, "mean advantage")}.get(
            name, (2, "share of the update")
        )
        series = {"now": [row[now] for row in entry.rows], "suggested": [row[now + 1] for row in entry.rows]}
        title = f"Mean advantage by {name}" if name == "stratum" else entry.title
        plot = bars([row[0] for row in entry.rows], series, title, axis)
        if name == "task":
            plot.update_yaxes(tickformat=".0%")
        fragments.append(figure(plot))
        fragments.append(details("The numbers", [table(entry.headers, entry.rows)]))
    return Section("What if: the update with the suggested parts", fragments)


def _background(diagnosis: Diagnosis, problems: Sequence[Finding]) -> Section:
    fragments = []
    tables = diagnosis.tables
    drawn = {f.kind for f in problems}
    if "shares" in tables and len(tables["shares"].rows) > 1 and "drowned" not in drawn:
        plot = shares(tables, None)
        fragments.append(figure(plot[0], plot[1]))
    if "drift" in tables and "drift" not in drawn and tables["drift"].rows:
        plot = coupling(tables)
        fragments.append(figure(plot[0], plot[1]))
    for entry in tables.values():
        fragments.append(details(entry.title, [table(entry.headers, entry.rows)]))
    return Section("All measurements", fragments)


def _not_checked(diagnosis: Diagnosis) -> Section:
    rows = list(diagnosis.not_checked.items())
    facts = diagnosis.facts
    fragments = [table(("not checked", "why"), rows)] if rows else [text("Every check could be made.")]
    fragments.append(
        text(
            f"{facts['tests']} tests were made. A warning needs an effect beyond the size that matters, and "
            "evidence that would come from a log without any problem in fewer than "
            f"{facts['family_wise_level']:.0%} of cases, all tests taken together (Holm). Intervals are jackknife "
            f"intervals over {facts['jackknife_blocks']:,} blocks of groups."
        )
    )
    return Section("What was not checked, and how the rest was", fragments)
