"""`diagnose`: run all checks on a log, keep what survives the correction for many tests, and work out the what-if.

All p-values of all checks go through Holm's step-down correction at 5 %, so the chance that a log without any problem
gets a single warning stays below 5 %, however many rewards, tasks and strata it has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from polyreward.advantages.transform import Transform
from polyreward.audit.diagnose.collapse import check_collapse
from polyreward.audit.diagnose.conflict import check_conflict
from polyreward.audit.diagnose.dead_groups import check_dead_groups
from polyreward.audit.diagnose.diversity import check_diversity
from polyreward.audit.diagnose.drift import check_drift
from polyreward.audit.diagnose.driver import check_driver
from polyreward.audit.diagnose.evidence import BLOCKS, Evidence
from polyreward.audit.diagnose.findings import SEVERITIES, CheckResult, Diagnosis, Finding, Table, Tested
from polyreward.audit.diagnose.length import check_length
from polyreward.audit.diagnose.remedies import remedy
from polyreward.audit.diagnose.scale import check_scale
from polyreward.audit.diagnose.shape import check_shape
from polyreward.audit.diagnose.strata import check_strata
from polyreward.audit.diagnose.what_if import what_if
from polyreward.batch import RewardBatch

CHECKS: dict[str, Callable[[Evidence], CheckResult]] = {
    "which reward drives the advantages": check_driver,
    "combinations of rewards that collapse": check_collapse,
    "scale by task": check_scale,
    "skew and tail by task": check_shape,
    "groups without signal": check_dead_groups,
    "cross-stratum bias": check_strata,
    "conflict between rewards": check_conflict,
    "length dependence": check_length,
    "drift away from the trusted reward": check_drift,
    "loss of diversity": check_diversity,
}
LEVEL = 0.05


def diagnose(
    batch: RewardBatch,
    *,
    weights: Mapping[str, float] | None = None,
    reference: str | None = None,
    task: str = "task",
    stratum: str | None = None,
    transform: Transform | None = None,
    recompute: bool = True,
    progress: Callable[[str, float], None] | None = None,
) -> Diagnosis:
    """Diagnose the rewards of a rollout log.

    Parameters
    ----------
    batch : RewardBatch
        The log. Columns used when present: ``task``, ``stratum`` or ``tool_calls``, ``step``, ``length``, ``logp`` or
        ``entropy``, ``completion`` (or its hash, or ``embedding``).
    weights : mapping of reward name to weight
        Weights of the sum the policy is trained on; a reward that is not named has weight 1.
    reference : str, optional
        Reward or column that is trusted (verifier, held-out score). Default: guessed from the names. A reward that is
        only looked at and not trained on gets weight 0.
    task, stratum : str
        Columns that hold the task and the stratum.
    transform : Transform, optional
        What the run is trained with, for the what-if; default GRPO.
    recompute : bool
        Whether to work out the what-if.
    progress : function of (name of the check, share done), optional

    Returns
    -------
    Diagnosis

    Raises
    ------
    InvalidInputError, MissingColumnError
        An empty log; a weight or reference that names nothing.
    """
    begin = time.perf_counter()
    evidence = Evidence(batch, weights, reference, task, stratum)
    tests: list[Tested] = []
    findings: list[Finding] = []
    tables: dict[str, Table] = {}
    not_checked: dict[str, str] = {}
    for done, (name, check) in enumerate(CHECKS.items()):
        if progress:
            progress(name, done / (len(CHECKS) + 1))
        result = check(evidence)
        tests += result.tests
        findings += result.notes
        tables |= result.tables
        not_checked |= result.not_checked
    findings += [
        test.finding for test, kept in zip(tests, holm([t.p for t in tests]), strict=True) if kept and test.finding
    ]
    findings = [replace(finding, fix=finding.fix or remedy(finding, evidence)) for finding in findings]
    findings.sort(key=lambda finding: (-SEVERITIES.index(finding.severity), _ORDER.index(finding.kind)))
    findings = _condensed(_without_echo(findings))
    if progress:
        progress("what if", len(CHECKS) / (len(CHECKS) + 1))
    change = what_if(evidence, findings, transform) if recompute else None
    facts = _facts(evidence, len(tests)) | {"seconds": round(time.perf_counter() - begin, 2)}
    return Diagnosis(tuple(findings), facts, tables, not_checked, change)


_ORDER = (
    "drift", "cross-stratum bias", "drowned", "conflict", "collapse", "scale", "heavy tail", "skew",
    "length dependence", "groups without signal", "loss of diversity", "driver", "constant reward", "saturation",
)  # fmt: skip


def _without_echo(findings: Sequence[Finding]) -> list[Finding]:
    """Leave out what another finding says: the share of groups without signal, and the tail of a skewed reward."""
    warned = {(finding.kind, finding.subject) for finding in findings if finding.severity != "info"}
    kinds = {kind for kind, _ in warned}
    return [
        finding
        for finding in findings
        if not (finding.kind == "groups without signal" and finding.severity == "info" and finding.kind in kinds)
        and not (finding.kind == "heavy tail" and ("skew", finding.subject) in warned)
    ]


def _condensed(findings: Sequence[Finding]) -> list[Finding]:
    """One finding where a reward has the same problem in several tasks: the furthest one, which names the others."""
    kept: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        by_task = finding.kind in ("scale", "heavy tail", "skew") and " / " in finding.subject
        key = finding.subject.rsplit(" / ", 1)[0] if by_task else finding.subject
        kept.setdefault((finding.kind, key), []).append(finding)
    result = []
    for same in kept.values():
        first = max(same, key=lambda f: (SEVERITIES.index(f.severity), _distance(f)))
        others = [finding.subject.rsplit(" / ", 1)[-1] for finding in same if finding is not first]
        also = f" Tasks of which the same is true: {', '.join(map(repr, others))}." if others else ""
        result.append(replace(first, statement=first.statement + also))
    return result


def _distance(finding: Finding) -> float:
    """How far a figure is from no finding: a ratio of scales from 1, anything else from 0."""
    return abs(float(np.log(finding.figure))) if finding.kind == "scale" else abs(finding.figure)


def holm(p_values: Sequence[float], level: float = LEVEL) -> np.ndarray:
    """Which hypotheses Holm's step-down procedure rejects at family-wise level `level`, bool (tests,)."""
    p = np.asarray(p_values, dtype=np.float64)
    rejected = np.zeros(len(p), dtype=bool)
    order = np.argsort(p, kind="stable")
    passed = p[order] <= level / (len(p) - np.arange(len(p)))
    rejected[order[: len(p) if passed.all() else int(np.argmin(passed))]] = True
    return rejected


def _facts(evidence: Evidence, tests: int) -> dict[str, Any]:
    steps = evidence.steps
    return {
        "rollouts": len(evidence.batch),
        "groups": evidence.groups,
        "rewards": list(evidence.names),
        "weights": {name: float(weight) for name, weight in zip(evidence.names, evidence.weights, strict=True)},
        "tasks": evidence.tasks[1] if evidence.tasks else [],
        "steps": [float(steps.min()), float(steps.max())] if steps is not None else None,
        "reference": evidence.reference,
        "tests": tests,
        "family_wise_level": LEVEL,
        "jackknife_blocks": min(evidence.groups, BLOCKS),
    }
