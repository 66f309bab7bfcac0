"""The list of methods: name, paper, kind, what it needs, where the part is and which study tests it.

The catalogue is the one place that maps names to import paths. Nothing here imports a component until
`Method.load_part` or `Method.load_study` is called.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polyreward.errors import UnknownNameError, nearest

if TYPE_CHECKING:
    from polyreward.studies.base import Study


@dataclass(frozen=True)
class Method:
    """A method and where it is.

    Attributes
    ----------
    name : str
        Kebab-case name on the command line.
    title, arxiv : str
        The paper.
    kind : str
        "reward", "advantage", "objective", "curriculum", "reward model", ...
    summary : str
        One line.
    part : str
        ``module:name`` of the component.
    slug : str
        The result of the study is ``results/<slug>.json``.
    study : str or None
        Module in `polyreward.studies`, or None.
    needs : tuple of str
        Extras to install.
    """

    name: str
    title: str
    arxiv: str
    kind: str
    summary: str
    part: str
    slug: str
    study: str | None
    needs: tuple[str, ...] = ()

    def load_part(self) -> Any:
        """Import the component."""
        module, _, name = self.part.partition(":")
        return getattr(importlib.import_module(module), name)

    def load_study(self) -> Study:
        """Import the study."""
        if self.study is None:
            raise UnknownNameError(f"method {self.name!r} has no study")
        return importlib.import_module(f"polyreward.studies.{self.study}").STUDY


METHODS: tuple[Method, ...] = (
    Method(
        "stratified-grpo",
        "Stratified GRPO: Handling Structural Heterogeneity in Reinforcement Learning of LLM Search Agents",
        "2510.06214",
        "advantage",
        "Compares a trajectory with those of the same structure, blended with the whole group.",
        "polyreward.advantages.presets:stratified_grpo",
        "02-stratified-grpo",
        "stratified_grpo",
    ),
    Method(
        "dump",
        "DUMP: Automated Distribution-Level Curriculum Learning for RL-based LLM Post-training",
        "2504.09710",
        "curriculum",
        "Draws the next tasks where advantages are large, with an upper-confidence bonus.",
        "polyreward.curricula.bandit:AdvantageBandit",
        "25-dump",
        "dump",
    ),
    Method(
        "sweet-spot",
        "SSL: Sweet Spot Learning for Differentiated Guidance in Agentic Optimization",
        "2601.22491",
        "reward",
        "Tiered rewards that grow towards the best zone of a solution.",
        "polyreward.rewards.sweet_spot:SweetSpotReward",
        "36-sweet-spot",
        "sweet_spot",
    ),
    Method(
        "elastic-trust-region",
        "ETR: Outcome-Guided Elastic Trust Regions for Policy Optimization",
        "2601.03723",
        "objective",
        "Clip bounds that widen or narrow with the advantage and with the group's signal.",
        "polyreward.objectives.presets:etr_objective",
        "38-etr",
        "elastic_trust_region",
    ),
    Method(
        "ema-grpo",
        "OneThinker: All-in-one Reasoning Model for Image and Video",
        "2512.03043",
        "advantage",
        "Scales advantages by a moving deviation of each task.",
        "polyreward.advantages.presets:ema_grpo",
        "51-ema-grpo",
        "ema_grpo",
    ),
    Method(
        "toolrl",
        "ToolRL: Reward is All Tool Learning Needs",
        "2504.13958",
        "reward",
        "Graded correctness of tool calls: names, parameter names and values, and format.",
        "polyreward.rewards.tool_calls:ToolCallReward",
        "53-toolrl",
        "tool_rewards",
    ),
    Method(
        "gaussian-grpo",
        "OpenVLThinkerV2: A Generalist Multimodal Reasoning Model for Multi-domain Visual Tasks",
        "2604.08539",
        "advantage",
        "Maps the ranks of each task's rewards onto a standard normal distribution.",
        "polyreward.advantages.presets:gaussian_grpo",
        "55-gaussian-grpo",
        "gaussian_grpo",
    ),
)


def find(name: str) -> Method:
    """Return the method called `name`.

    Raises
    ------
    UnknownNameError
        No method has that name; the message offers the nearest one.
    """
    for method in METHODS:
        if method.name == name:
            return method
    raise UnknownNameError(f"unknown method {name!r}{nearest(name, (method.name for method in METHODS))}")


def search(query: str = "") -> list[Method]:
    """Methods in whose name, title, kind, summary or arXiv id every word of `query` occurs."""
    words = query.lower().split()
    return [
        method
        for method in METHODS
        if all(
            word in f"{method.name} {method.title} {method.kind} {method.summary} {method.arxiv}".lower()
            for word in words
        )
    ]
