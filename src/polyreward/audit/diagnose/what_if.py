"""The what-if: one chain that answers all findings, and how the update changes with it.

The suggested chain is built from the presets: per-reward normalisation (GDPO) for drowned or collapsing rewards,
blended
with normalisation inside strata for cross-stratum bias, a moving scale per task for differences of scale, Gaussian
normalisation for heavy tails and skew. Advantages before and after are computed step by step, as training does, on up
to
100,000 rollouts of evenly spaced steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from polyreward.advantages.parts import Center, Scale, WeightedSum
from polyreward.advantages.transform import Transform, blend, chain, compute_advantages
from polyreward.audit.diagnose.collapse import TOLERANCE, fingerprint, same_pairs
from polyreward.audit.diagnose.findings import Finding, Table
from polyreward.batch import RewardBatch

if TYPE_CHECKING:
    from polyreward.audit.diagnose.evidence import Evidence

ROWS = 100_000
STRATA_BLEND = 0.8


@dataclass(frozen=True)
class WhatIf:
    """How the update changes with the suggested parts.

    Attributes
    ----------
    code : str
        Python that builds the suggested transform.
    recipe : str
        Lines of a recipe (TOML) for `polyreward train`.
    rollouts, steps : int
        On how much of the log the advantages were computed again.
    cosine : float
        Between the advantages before and after, -1 to 1.
    sign_flips : float
        Share of samples (with an advantage before and after) whose advantage changes sign.
    lost : (now, suggested)
        Share of the pairs of a group that the rewards tell apart and that get the same advantage.
    tables : mapping of name to Table
        Shares of the squared advantages by task and stratum, mean advantage by stratum, correlation with each reward.
    """

    code: str
    recipe: str
    rollouts: int
    steps: int
    cosine: float
    sign_flips: float
    lost: tuple[float, float]
    tables: Mapping[str, Table]


@dataclass(frozen=True)
class Suggestion:
    """A transform with the code that builds it and its recipe lines."""

    transform: Transform
    code: str
    recipe: str


def suggest(findings: Sequence[Finding], evidence: Evidence) -> Suggestion | None:
    """One chain that answers every finding about the advantages; None when no finding is about them."""
    from polyreward.advantages import presets

    kinds = {finding.kind for finding in findings if finding.severity != "info"}
    each = bool(kinds & {"drowned", "collapse"})
    strata, scale, shape = "cross-stratum bias" in kinds, "scale" in kinds, bool(kinds & {"heavy tail", "skew"})
    weights = (
        None if np.all(evidence.weights == 1) else dict(zip(evidence.names, evidence.weights.tolist(), strict=True))
    )
    by, task = evidence.stratum_name, evidence.task_name
    given = f"weights={weights!r}" if weights else ""
    with_task = evidence.tasks is not None
    if not (each or strata or scale or shape):
        return None
    if strata and not each:
        code = f"stratified_grpo({_arguments(f'blend={STRATA_BLEND}', f'by={by!r}', given)})"
        stratified = presets.stratified_grpo(blend=STRATA_BLEND, by=by, **_weights(weights))
        if not (scale or shape):
            recipe = f'[advantage]\npreset = "stratified-grpo"\noptions = {{ blend = {STRATA_BLEND}, by = "{by}" }}'
            return Suggestion(
                stratified, f"from polyreward.advantages.presets import stratified_grpo\n\nadvantage = {code}", recipe
            )
    if each or strata:
        sum_code = f"WeightedSum({weights!r})" if weights else "WeightedSum()"
        inside = ("group", by)
        scale_by = (task,) if scale and with_task else None

        def one(keys: str | tuple[str, ...]) -> tuple[Transform, str]:
            divisor: str | tuple[str, ...] = scale_by[0] if scale_by else keys
            # population deviation, so that a stratum of one comes out as 0
            scale_part = Scale(divisor) if keys == "group" else Scale(divisor, ddof=0)
            scale_code = f"Scale({divisor!r})" if keys == "group" else f"Scale({divisor!r}, ddof=0)"
            if each:
                part = chain(Center(keys), scale_part, WeightedSum(weights))
                return part, f"chain(Center({keys!r}), {scale_code}, {sum_code})"
            part = chain(WeightedSum(weights), Center(keys), scale_part)
            return part, f"chain({sum_code}, Center({keys!r}), {scale_code})"

        plain, plain_code = one("group")
        names = "from polyreward.advantages.parts import Center, Scale, WeightedSum\n"
        if strata:
            san, san_code = one(inside)
            mixture = blend(STRATA_BLEND * san, (1 - STRATA_BLEND) * plain)
            code = f"blend(\n    {STRATA_BLEND} * {san_code},\n    {1 - STRATA_BLEND:.1f} * {plain_code},\n)"
            recipe = (
                "# a recipe's chain has no blend: give the advantage in Python, or take the part for strata alone\n"
                f'[advantage]\npreset = "stratified-grpo"\noptions = {{ blend = {STRATA_BLEND}, by = "{by}" }}'
            )
            return Suggestion(
                mixture,
                f"{names}from polyreward.advantages.transform import blend, chain\n\nadvantage = {code}",
                recipe,
            )
        if scale_by:
            recipe = (
                "[advantage]\nchain = [\n"
                f'  {{ part = "Center", by = "group" }},\n  {{ part = "Scale", by = "{task}" }},\n'
                '  { part = "WeightedSum" },\n]'
            )
            return Suggestion(
                plain, f"{names}from polyreward.advantages.transform import chain\n\nadvantage = {plain_code}", recipe
            )
        code = f"gdpo({given})"
        return Suggestion(
            presets.gdpo(**_weights(weights)),
            f"from polyreward.advantages.presets import gdpo\n\nadvantage = {code}",
            '[advantage]\npreset = "gdpo"',
        )
    name = "gaussian_grpo" if shape else "ema_grpo"
    key = task if with_task else "batch"
    code = f"{name}({_arguments(f'by={key!r}', given)})"
    transform = getattr(presets, name)(by=key, **_weights(weights))
    recipe = f'[advantage]\npreset = "{name.replace("_", "-")}"\noptions = {{ by = "{key}" }}'
    return Suggestion(transform, f"from polyreward.advantages.presets import {name}\n\nadvantage = {code}", recipe)


def remedy(finding: Finding, evidence: Evidence) -> str:
    """The line of code or recipe that addresses one finding."""
    alone = suggest([finding], evidence) if finding.severity != "info" else None
    if alone is not None:
        return f"{alone.code}\n\n# recipe\n{alone.recipe}"
    first = finding.subject.split(" / ")
    return {
        "groups without signal": '[curriculum]\nname = "dump"',
        "conflict": (
            "# let one reward count only where the other is earned, in place of adding both\n"
            f"from polyreward.rewards.composition import gate\n\nreward = gate({first[0]}, {first[-1]})"
        ),
        "length dependence": (
            "# reward a length inside bounds of its own, so that the other rewards need not\n"
            "from polyreward.rewards.length import TrapezoidReward"
        ),
        "drift": (
            f"# trust {finding.subject!r} less: lower its weight, or add {evidence.reference!r} to the sum\n"
            f'[[rewards]]\nname = "{finding.subject}"\nweight = 0.25'
        ),
        "loss of diversity": "# keep the entropy of each task in a band\nfrom polyreward.objectives.entropy import "
        "EntropyHinge",
    }.get(finding.kind, "") if finding.severity != "info" else ""  # fmt: skip


def what_if(evidence: Evidence, findings: Sequence[Finding], transform: Transform | None = None) -> WhatIf | None:
    """Advantages before and after the suggested chain, compared by task, stratum and reward."""
    suggestion = suggest(findings, evidence)
    if suggestion is None:
        return None
    from polyreward.advantages import presets

    weights = dict(zip(evidence.names, evidence.weights.tolist(), strict=True))
    present = transform or presets.grpo(**_weights(None if np.all(evidence.weights == 1) else weights))
    parts = _steps(evidence)
    before = torch.cat([compute_advantages(present, part) for part in parts]).double().numpy()
    after = torch.cat([compute_advantages(suggestion.transform, part) for part in parts]).double().numpy()
    moved = (before != 0) & (after != 0)
    norm = float(np.linalg.norm(before) * np.linalg.norm(after))
    rewards = torch.cat([part.rewards for part in parts]).double().numpy()
    offset = np.cumsum([0, *(part.segments("group").count for part in parts[:-1])])
    groups = np.concatenate([p.segments("group").codes.numpy() + o for p, o in zip(parts, offset, strict=True)])
    tables = {"reward": _by_reward(evidence, rewards, groups, before, after)}
    for name, title in ((evidence.task_name, "task"), (evidence.stratum_name, "stratum")):
        if name in evidence.batch.columns:
            labels = np.concatenate([np.asarray(part.columns[name]).astype(str) for part in parts])
            tables[title] = _by_label(title, labels, before, after)
    curriculum = '\n\n[curriculum]\nname = "dump"' if any(
        f.kind == "groups without signal" and f.severity != "info" for f in findings
    ) else ""  # fmt: skip
    return WhatIf(
        suggestion.code,
        suggestion.recipe + curriculum,
        len(before),
        len(parts),
        float(before @ after / norm) if norm else 0.0,
        float((np.sign(before) != np.sign(after))[moved].mean()) if moved.any() else 0.0,
        (_lost(evidence, rewards, groups, before), _lost(evidence, rewards, groups, after)),
        tables,
    )


def _lost(evidence: Evidence, rewards: np.ndarray, groups: np.ndarray, advantages: np.ndarray) -> float:
    valid = ~np.isnan(rewards)
    by_vector, _ = same_pairs(groups, fingerprint(np.nan_to_num(rewards), valid, evidence.weights), 0.0)
    by_advantage, _ = same_pairs(groups, advantages, TOLERANCE * float(advantages.std()))
    told_apart = np.bincount(groups).astype(float) ** 2 - by_vector
    return float(np.clip(by_advantage - by_vector, 0, None).sum() / max(told_apart.sum(), 1.0))


def _steps(evidence: Evidence) -> list[RewardBatch]:
    """The log as one batch a step (rows in the order of `evidence`), thinned to about `ROWS` rollouts."""
    batch, names = evidence.batch, (evidence.task_name, evidence.stratum_name)
    slim = RewardBatch(
        batch.rewards.detach().cpu(),
        batch.names,
        batch.segments("group"),
        {n: batch.columns[n] for n in names if n in batch.columns},
    )
    if evidence.steps is None:
        use = np.arange(min(evidence.groups, max(1, int(ROWS / evidence.sizes.mean()))))
        return [_compact(slim.select(evidence.order[np.isin(evidence.group, use)]))]
    distinct, code = np.unique(evidence.steps, return_inverse=True)
    wanted = max(1, min(len(distinct), int(ROWS / max(len(batch) / len(distinct), 1))))
    chosen = np.unique(np.linspace(0, len(distinct) - 1, wanted).round().astype(int))
    row_step = code[evidence.group]
    order = np.argsort(row_step, kind="stable")
    edges = np.searchsorted(row_step[order], np.arange(len(distinct) + 1))
    most = max(1, int(ROWS / len(chosen)))
    return [_compact(slim.select(evidence.order[np.sort(order[edges[s] : edges[s + 1]])[:most]])) for s in chosen]


def _compact(batch: RewardBatch) -> RewardBatch:
    """The same batch with dense group codes, so that a step does not carry the groups of the whole log."""
    codes = torch.unique(batch.segments("group").codes, return_inverse=True)[1]
    return RewardBatch(batch.rewards, batch.names, codes, batch.columns)


def _by_reward(
    evidence: Evidence, rewards: np.ndarray, groups: np.ndarray, before: np.ndarray, after: np.ndarray
) -> Table:
    count = np.maximum(np.bincount(groups), 1)
    rows = []
    for k, name in enumerate(evidence.names):
        values = np.nan_to_num(rewards[:, k])
        centred = values - (np.bincount(groups, values) / count)[groups]
        rows.append((name, _correlation(centred, before), _correlation(centred, after)))
    return Table(
        "How closely the advantages follow each reward (correlation inside groups)",
        ("reward", "now", "suggested"),
        tuple(rows),
    )


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    norm = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second / norm) if norm > 0 else 0.0


def _by_label(title: str, labels: np.ndarray, before: np.ndarray, after: np.ndarray) -> Table:
    names, code = np.unique(labels, return_inverse=True)
    number = np.bincount(code, minlength=len(names))
    rows = []
    energy = [
        np.bincount(code, advantage**2, len(names)) / max(float((advantage**2).sum()), 1e-300)
        for advantage in (before, after)
    ]
    mean = [np.round(np.bincount(code, advantage, len(names)) / number, 12) + 0.0 for advantage in (before, after)]
    flips = np.bincount(code, before * after < 0, len(names)) / number
    for t, name in enumerate(names):
        figures = (number[t] / len(labels), energy[0][t], energy[1][t], mean[0][t], mean[1][t], flips[t])
        rows.append((str(name), *(float(figure) for figure in figures)))
    headers = (
        title,
        "share of rollouts",
        "share of update now",
        "suggested",
        "mean advantage now",
        "suggested ",
        "sign flips",
    )
    return Table(f"The update by {title} (share of squared advantages)", headers, tuple(rows))


def _weights(weights: Mapping[str, float] | None) -> dict[str, Any]:
    return {"weights": weights} if weights else {}


def _arguments(*arguments: str) -> str:
    return ", ".join(argument for argument in arguments if argument)
