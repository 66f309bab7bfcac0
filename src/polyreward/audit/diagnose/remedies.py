"""What to do about a finding: the part that addresses it, as code and recipe lines with the figures of the log in them.

Findings about the advantages are answered by a transform (`polyreward.audit.diagnose.suggestion`); the others by a
reward, a curriculum or an objective. In the code, `rewards` is your reward functions by name.
"""

from __future__ import annotations

import itertools

import numpy as np

from polyreward.audit.diagnose.evidence import Evidence
from polyreward.audit.diagnose.findings import Finding
from polyreward.audit.diagnose.suggestion import suggest
from polyreward.storage import toml_value

LESS = 0.25
"""Factor of the weight of a reward that has drifted."""


def remedy(finding: Finding, evidence: Evidence) -> str:
    """Code and recipe lines for one finding; empty for information."""
    if finding.severity == "info":
        return ""
    suggestion = suggest([finding], evidence)
    if suggestion is not None:
        return f"{suggestion.code()}\n\n# or in a recipe\n{suggestion.recipe()}"
    write = {
        "groups without signal": _curriculum, "conflict": _gate, "length dependence": _length, "drift": _drift,
        "loss of diversity": _entropy,
    }  # fmt: skip
    return write[finding.kind](finding, evidence)


def _curriculum(finding: Finding, evidence: Evidence) -> str:
    tasks = evidence.tasks[1] if evidence.tasks else []
    if len(tasks) < 2:
        return (
            "# draw prompts by the task or source they come from: give them a column `task`, and in a recipe\n"
            '[curriculum]\nname = "dump"'
        )
    return (
        f"from polyreward.curricula import AdvantageBandit\n\ncurriculum = AdvantageBandit({tasks!r})\n\n"
        '# or in a recipe\n[curriculum]\nname = "dump"'
    )


def _gate(finding: Finding, evidence: Evidence) -> str:
    pairs = itertools.combinations(evidence.names, 2)
    first, second = next(pair for pair in pairs if " / ".join(pair) == finding.subject)
    reward, condition = (second, first) if evidence.reference != second else (first, second)
    return "# in place of both: the one counts where the other is earned\n" + _gated(reward, condition, evidence)


def _gated(reward: str, condition: str, evidence: Evidence) -> str:
    values, condition_values = (_values(name, evidence) for name in (reward, condition))
    threshold, floor = float(np.mean(condition_values)), float(np.quantile(values, 0.05))
    return (
        "from polyreward.rewards.composition import gate\n\n"
        f"reward = gate(rewards[{reward!r}], rewards[{condition!r}], threshold={threshold:.4g}, floor={floor:.4g})"
    )


def _values(name: str, evidence: Evidence) -> np.ndarray:
    k = evidence.names.index(name)
    return evidence.values[evidence.valid[:, k], k]


def _length(finding: Finding, evidence: Evidence) -> str:
    assert evidence.length is not None
    measure, length = evidence.length
    bounds = np.quantile(length[np.isfinite(length)], [0.01, 0.1, 0.9, 0.99]).round(1).tolist()
    options = dict(zip(("minimum", "low", "high", "maximum"), bounds, strict=True))
    if measure.startswith("characters"):
        options["unit"] = "characters"
    arguments = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return (
        "# a reward of length itself, flat over usual lengths, so that no other reward has to carry it\n"
        f"from polyreward.rewards.length import TrapezoidReward\n\nreward = TrapezoidReward({arguments})\n\n"
        f'# or in a recipe\n[[rewards]]\nname = "length"\nuse = "trapezoid_reward"\noptions = {toml_value(options)}'
    )


def _drift(finding: Finding, evidence: Evidence) -> str:
    name, trusted = finding.subject, evidence.reference
    weight = LESS * float(evidence.weights[evidence.names.index(name)])
    lines = f"# trust it less\n[[rewards]]\nname = {toml_value(name)}\nweight = {weight:g}"
    if trusted in evidence.names and evidence.reference_values is not None:
        assert trusted is not None
        gated = f"# count it only where the trusted reward is earned\n{_gated(name, trusted, evidence)}"
        return f"{gated}\n\n# or in a recipe\n{lines}"
    return lines


def _entropy(finding: Finding, evidence: Evidence) -> str:
    level = next(
        (v if n == "entropy" else -v for n in ("entropy", "logp") if (v := evidence.numbers(n)) is not None), None
    )
    early = None
    if level is not None and evidence.thirds is not None:
        values = level[evidence.thirds[0][evidence.group]]
        early = float(np.nanmean(values)) if np.isfinite(values).any() else None
    low, high = (0.2, 0.6) if early is None or early <= 0 else (round(early / 2, 3), round(early, 3))
    return (
        "from polyreward.objectives.entropy import EntropyHinge\n"
        "from polyreward.objectives.surrogate import PolicyObjective\n\n"
        f"objective = PolicyObjective(entropy=EntropyHinge(low={low}, high={high}))\n\n"
        f'# or in a recipe\n[objective.parts]\nentropy = {{ kind = "hinge", low = {low}, high = {high} }}'
    )
