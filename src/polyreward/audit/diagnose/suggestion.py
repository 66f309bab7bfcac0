"""One advantage transform that answers all findings about the advantages, as an object, as code and as a recipe.

Drowned and collapsing rewards are normalised one by one, strata are compared among themselves for the most part,
tasks of different scale are divided by a scale of their own, heavy tails and skew are ranked away. Where that is a
published preset the suggestion is the preset; else it is a chain, or a blend of two, of the same parts. Code and
recipe are derived from the transform: evaluating either gives an equal one.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from polyreward.advantages.config import PARTS, to_code, to_config
from polyreward.advantages.gaussian import Gaussianize
from polyreward.advantages.normal import By
from polyreward.advantages.parts import Center, Scale, WeightedSum
from polyreward.advantages.presets import PRESETS
from polyreward.advantages.transform import Transform, blend, chain
from polyreward.audit.diagnose.findings import Finding
from polyreward.storage import toml_value

if TYPE_CHECKING:
    from polyreward.audit.diagnose.evidence import Evidence

STRATA, GROUP = 0.8, 0.2
"""Shares of the comparison inside the stratum and inside the group."""
TIE = 1e-6


@dataclass(frozen=True)
class Suggestion:
    """A transform, and the preset that makes it where there is one."""

    transform: Transform
    preset: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def code(self) -> str:
        """Python that ends in ``advantage = ...``."""
        if self.preset:
            name = self.preset.replace("-", "_")
            arguments = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
            return f"from polyreward.advantages.presets import {name}\n\nadvantage = {name}({arguments})"
        expression = to_code(self.transform)
        modules: dict[str, set[str]] = {}
        for name in {node.id for node in ast.walk(ast.parse(expression)) if isinstance(node, ast.Name)}:
            module = PARTS[name].__module__ if name in PARTS else "polyreward.advantages.transform"
            modules.setdefault(module, set()).add(name)
        imports = [f"from {module} import {', '.join(sorted(modules[module]))}" for module in sorted(modules)]
        branches = self.transform.branches if hasattr(self.transform, "branches") else ()
        if branches:
            expression = "blend(\n" + "".join(f"    {to_code(branch)},\n" for branch in branches) + ")"
        return "\n".join([*imports, "", f"advantage = {expression}"])

    def recipe(self) -> str:
        """The section ``[advantage]`` of a recipe."""
        config = {"preset": self.preset, "options": dict(self.options)} if self.preset else to_config(self.transform)
        return "\n".join(["[advantage]", *(f"{key} = {toml_value(value)}" for key, value in config.items() if value)])


def suggest(findings: Sequence[Finding], evidence: Evidence) -> Suggestion | None:
    """One transform for every finding about the advantages; None when no finding is about them."""
    kinds = {finding.kind for finding in findings if finding.severity != "info"}
    each, strata, scale = bool(kinds & {"drowned", "collapse"}), "cross-stratum bias" in kinds, "scale" in kinds
    shape = bool(kinds & {"heavy tail", "skew"})
    if not (each or strata or scale or shape):
        return None
    equal = bool(np.all(evidence.weights == 1))
    given = {} if equal else {"weights": dict(zip(evidence.names, evidence.weights.tolist(), strict=True))}
    task = evidence.task_name if evidence.tasks is not None else "batch"
    if not strata and shape:
        return _preset("gaussian-gdpo" if each else "gaussian-grpo", {"by": task, **given})
    if not strata and scale and not each:
        alone = {"singleton": "zero"} if (evidence.sizes < 2).any() else {}
        return _preset("ema-grpo", {"by": task, **alone, **given})
    if not strata and not scale:
        return _preset("gdpo", given)
    if not (each or scale or shape):
        return _preset("stratified-grpo", {"blend": STRATA, "by": evidence.stratum_name, **given})

    def compare(by: By) -> Transform:
        if shape:
            parts: Transform = Gaussianize(by, TIE)
        else:
            # the population deviation, so that a stratum of one comes out as 0
            parts = chain(Center(by), Scale(task if scale else by, ddof=1 if by == "group" else 0))
        return chain(parts, WeightedSum(**given)) if each else chain(WeightedSum(**given), parts)

    whole = compare("group")
    return Suggestion(blend(STRATA * compare(("group", evidence.stratum_name)), GROUP * whole) if strata else whole)


def _preset(name: str, options: Mapping[str, Any]) -> Suggestion:
    return Suggestion(PRESETS[name](**options), name, options)
