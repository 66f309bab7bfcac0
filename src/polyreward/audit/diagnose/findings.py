"""What a diagnosis consists of: findings, what could not be checked, tables, and facts about the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from polyreward.audit.diagnose.what_if import WhatIf

Severity = Literal["info", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """One thing the log shows.

    Attributes
    ----------
    kind : str
        Identifier of the problem, such as ``"drowned"``.
    severity : "info", "warning" or "error"
    subject : str
        The reward, task, stratum or pair it is about.
    figure : float
        The measured quantity.
    interval : (low, high)
        Its 95 % interval.
    statement : str
        The finding in plain words, with the figure.
    part : str
        Name of the part of polyreward that addresses it; empty when nothing needs to be done.
    fix : str
        The line of code or the recipe lines that apply it.
    """

    kind: str
    severity: Severity
    subject: str
    figure: float
    interval: tuple[float, float]
    statement: str
    part: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Tested:
    """One hypothesis test: its p-value, and the finding it yields if it survives the correction for many tests."""

    p: float
    finding: Finding | None = None


@dataclass(frozen=True)
class Table:
    """A table of the report; `figure` names how the report draws it."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class CheckResult:
    """What one check hands back."""

    tests: Sequence[Tested] = ()
    notes: Sequence[Finding] = ()
    tables: Mapping[str, Table] = field(default_factory=dict)
    not_checked: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Diagnosis:
    """The result of `diagnose`.

    Attributes
    ----------
    findings : Finding sequence
        Most severe first.
    facts : mapping
        Rows, groups, rewards, tasks, steps, the reference reward, and how many tests were made.
    tables : mapping of name to Table
    not_checked : mapping of check to the reason
    what_if : WhatIf or None
        What the update would be with the suggested parts; None when no finding changes the advantages.
    """

    findings: Sequence[Finding]
    facts: Mapping[str, Any]
    tables: Mapping[str, Table]
    not_checked: Mapping[str, str]
    what_if: WhatIf | None = None

    def worst(self) -> Severity | None:
        """Highest severity among the findings."""
        present = {finding.severity for finding in self.findings}
        return next((severity for severity in reversed(SEVERITIES) if severity in present), None)

    def problems(self) -> list[Finding]:
        """Findings of severity warning or error."""
        return [finding for finding in self.findings if finding.severity != "info"]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; NaN becomes None."""
        return _plain(
            {
                "schema": "polyreward.diagnosis/1",
                "worst": self.worst(),
                "facts": dict(self.facts),
                "findings": [asdict(finding) for finding in self.findings],
                "not_checked": dict(self.not_checked),
                "what_if": asdict(self.what_if) if self.what_if else None,
                "tables": {name: asdict(table) for name, table in self.tables.items()},
            }
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
