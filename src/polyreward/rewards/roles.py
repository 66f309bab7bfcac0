"""Accuracy judged for each role that a response argues from, and its blend with text diversity.

A subjective question has an answer for each role. *Divergent* questions have a truth for each role and are graded by
the share of roles answered right; *convergent* ones have one truth, and the majority over the roles is graded.

    R = delta * R_acc + (1 - delta) * R_div
    R_acc = (1/n) sum_i [a_i = g_i]  (divergent)      [majority(a_1..a_n) = g]  (convergent)

R_div is `DiversityReward`. Where all accuracies of a group are equal, an advantage that divides by the group's
deviation is driven by diversity alone and at full strength, whatever delta is; `polyreward.advantages.presets.dr_grpo`,
which only centres, keeps it at ``1 - delta``. R_div is no potential: optimal policies can change.

Paper: MultiRole-R1, Diversity-Enhanced Reasoning for Subjective Questions (arXiv 2507.20187).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.rewards.answers import check_place, find_answer
from polyreward.rewards.composition import Composed
from polyreward.rewards.contract import Reward, Sample, is_finite, is_listing, is_missing
from polyreward.rewards.text_diversity import DiversityReward

Mode = Literal["divergent", "convergent"]
Tie = Literal["wrong", "random"]
_NOT_ROLES = ("answer", "final answer")
_LONGEST_ROLE = 80


def divergent_accuracy(answers: Any, truth: Any) -> Any:
    """Share of roles answered right: labels (..., n) and truths that broadcast -> (...) in [0, 1].

    Labels are numbers (numpy or torch) or texts (numpy). Whatever differs from the truth is wrong: use -1, NaN or None
    for a missing answer.
    """
    return ((answers == truth) * 1.0).mean(-1)


def convergent_accuracy(answers: Any, truth: Any, tie: Tie = "wrong", rng: np.random.Generator | None = None) -> Any:
    """Whether the label that most roles gave is the truth: labels (..., n), truths (...) -> (...), 0 or 1.

    Parameters
    ----------
    answers, truth : numbers (numpy or torch) or texts (numpy)
        Give missing answers one label of their own, such as -1: together they are one wrong option.
    tie : "wrong", or "random" to let a draw among the leading labels decide
    rng : for "random"
    """
    tensor = hasattr(answers, "new_tensor")
    votes = (answers[..., :, None] == answers[..., None, :]).sum(-1)
    most = votes.amax(-1) if tensor else votes.max(-1)
    leads = votes == most[..., None]
    leaders = leads.sum(-1) / most  # each leading label has `most` votes
    aim = truth[..., None] if hasattr(truth, "ndim") else truth
    right = (leads & (answers == aim)).any(-1)
    if tie == "wrong":
        return (right & (leaders == 1)) * 1.0
    if rng is None:
        raise InvalidInputError("tie='random' needs a generator: pass rng=numpy.random.default_rng(seed)")
    drawn: Any = rng.random(tuple(leaders.shape))
    return (right & ((leaders.new_tensor(drawn) if tensor else drawn) * leaders < 1)) * 1.0


@dataclass(frozen=True)
class RoleAwareAccuracy:
    """R_acc of MultiRole-R1 (arXiv 2507.20187).

    Parameters
    ----------
    mode : "divergent" or "convergent"
    tie : "wrong" or "random"
        Of the majority in convergent mode; the paper does not say.
    """

    mode: Mode = "divergent"
    tie: Tie = "wrong"

    def __post_init__(self) -> None:
        for name, known in (("mode", get_args(Mode)), ("tie", get_args(Tie))):
            if getattr(self, name) not in known:
                raise UnknownNameError(f"{name} {getattr(self, name)!r}{nearest(str(getattr(self, name)), known)}")

    def __call__(
        self,
        answers: Any,
        truth: Any,
        roles: Sequence[str] | None = None,
        rng: np.random.Generator | None = None,
    ) -> Any:
        """Value in [0, 1] of the answers of one response, a float; of arrays (..., n) with two or more axes, (...).

        Parameters
        ----------
        answers : n labels in the order of the roles, or mapping of role to label
            None and NaN are missing answers and count as wrong; in a majority, together as one wrong option.
        truth : divergent: mapping of role to label, n labels, or one label for every role; convergent: one label
        roles : sequence of str
            Roles that were asked for; default those of the truth, else of the answers.
        rng : for ``tie="random"``

        Raises
        ------
        InvalidInputError
            A role that the truth lacks, more answers than roles, a missing truth, several truths in convergent mode.
        """
        if getattr(answers, "ndim", 1) >= 2:
            if self.mode == "divergent":
                return divergent_accuracy(answers, truth)
            return convergent_accuracy(answers, truth, self.tie, rng)
        answers, truth = (labels.tolist() if hasattr(labels, "tolist") else labels for labels in (answers, truth))
        given, wanted = self._aligned(answers, truth, roles)
        if any(is_missing(label) for label in wanted):
            raise InvalidInputError(f"a truth is missing: {truth!r}")
        if not given:
            return 0.0
        # labels as integers: -1 for a missing answer, which no truth has
        codes: dict[Any, int] = {}
        coded = [-1 if is_missing(label) else codes.setdefault(_hashable(label), len(codes)) for label in given]
        aims = [codes.get(_hashable(label), -2) for label in wanted]
        if self.mode == "divergent":
            return float(divergent_accuracy(np.array(coded), np.array(aims)))
        return float(convergent_accuracy(np.array(coded), np.array(aims[0]), self.tie, rng))

    def _aligned(self, answers: Any, truth: Any, roles: Sequence[str] | None) -> tuple[list[Any], list[Any]]:
        by_role = isinstance(truth, Mapping)
        if self.mode == "convergent" and (by_role or is_listing(truth)):
            raise InvalidInputError(f"convergent mode has one truth for all roles, got {truth!r}")
        asked = list(roles) if roles is not None else list(truth) if by_role else None
        if isinstance(answers, Mapping):
            asked = list(answers) if asked is None else asked
            unknown = [role for role in answers if by_role and role not in truth]
            given = [answers.get(role) for role in asked]
        else:
            unknown, given = [], list(answers)
        if by_role:
            unknown += [role for role in asked or () if role not in truth]
        if unknown:
            raise InvalidInputError(f"the truth has no role {unknown[0]!r}{nearest(str(unknown[0]), map(str, truth))}")
        if self.mode == "convergent":
            wanted: list[Any] = [truth]
            count = len(given) if asked is None else len(asked)
        elif by_role:
            wanted = [truth[role] for role in asked or ()]
            count = len(wanted)
        else:
            wanted = list(truth) if is_listing(truth) else [truth] * len(asked or given)
            count = len(wanted)
        if len(given) > count:
            raise InvalidInputError(f"{len(given)} answers for {count} roles")
        return given + [None] * (count - len(given)), wanted


@dataclass(frozen=True)
class ShapedReward:
    """``delta * accuracy + (1 - delta) * diversity`` (MultiRole-R1, arXiv 2507.20187).

    Parameters
    ----------
    delta : float in [0, 1]
        0.9 by default: the paper's weight of diversity is 0.1, of 0.05, 0.1, 0.2 and 0.3.
    """

    delta: float = 0.9

    def __post_init__(self) -> None:
        if not (is_finite(self.delta) and 0 <= self.delta <= 1):
            raise InvalidInputError(f"delta must lie in [0, 1], got {self.delta!r}")

    def __call__(self, accuracy: Any, diversity: Any) -> Any:
        """Values of accuracy and diversity in [0, 1], numbers, arrays or tensors of one shape; NaN stays NaN."""
        return self.delta * accuracy + (1 - self.delta) * diversity


def role_answers(text: str, roles: Sequence[str] | None = None) -> dict[str, str]:
    """Answers of the lines ``role: answer`` of a text, by role in lower case; the last one of a role counts.

    Bullets, asterisks and a final full stop are taken off; names are compared in lower case and hold no colon.

    Parameters
    ----------
    roles : the roles to read; None for every name of at most 80 characters other than "answer" and "final answer"
    """
    wanted = None if roles is None else {_name(role) for role in roles}
    found = {}
    for line in text.splitlines():
        name, colon, answer = line.partition(":")
        role, label = _name(name), _label(answer)
        known = 0 < len(role) <= _LONGEST_ROLE and role not in _NOT_ROLES if wanted is None else role in wanted
        if colon and label and known:
            found[role] = label
    return found


@dataclass(frozen=True)
class RoleAnswersReward(Reward):
    """`RoleAwareAccuracy` of the lines ``role: answer`` in the text (MultiRole-R1, arXiv 2507.20187). Range [0, 1].

    Parameters
    ----------
    column : str
        Column of the truth. Divergent: role to label, a mapping or a JSON object; roles whose label is None, as the
        structs of parquet have them, are left out. Convergent: one label.
    mode : as in `RoleAwareAccuracy`; ties are wrong
    roles : str or None
        Column of the roles that the prompt asks for; default those of the truth, else those that the text names.
    extract : as in `ExactMatch`, where the lines stand

    Labels are compared in lower case. Roles without a line count as wrong; lines of other roles are ignored.
    """

    column: str = "answer"
    mode: Mode = "divergent"
    roles: str | None = None
    extract: str = "text"

    def __post_init__(self) -> None:
        check_place(self.extract)
        RoleAwareAccuracy(self.mode)

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of the truth, and that of the roles where there is one."""
        return (self.column,) if self.roles is None else (self.column, self.roles)

    def score(self, sample: Sample) -> float:
        """Value in [0, 1]."""
        truth = self._truth(sample)
        asked = None
        if self.roles is not None:
            listed = sample.columns[self.roles]
            if not is_listing(listed) or not len(listed):
                raise self.refuse(sample, self.roles, f"expected a list of roles, got {listed!r}")
            asked = [_name(str(role)) for role in listed]
        elif isinstance(truth, dict):
            asked = list(truth)
        given = role_answers(find_answer(sample.text, self.extract) or "", asked)
        try:
            return float(RoleAwareAccuracy(self.mode)(given, truth, asked))
        except InvalidInputError as error:
            raise self.refuse(sample, self.column, str(error)) from error

    def _truth(self, sample: Sample) -> Any:
        truth = sample.columns[self.column]
        if self.mode == "convergent":
            if isinstance(truth, Mapping) or is_listing(truth) or not _label(str(truth)):
                raise self.refuse(sample, self.column, f"expected one label, got {truth!r}")
            return _label(str(truth))
        if isinstance(truth, str):
            try:
                truth = json.loads(truth)
            except ValueError:
                truth = None
        labels = {} if not isinstance(truth, Mapping) else {r: a for r, a in truth.items() if not is_missing(a)}
        if not labels:
            raise self.refuse(sample, self.column, f"expected role to label, got {sample.columns[self.column]!r}")
        return {_name(str(role)): _label(str(label)) for role, label in labels.items()}


def multirole_r1(
    delta: float = 0.9,
    mode: Mode = "divergent",
    *,
    column: str = "answer",
    roles: str | None = None,
    extract: str = "text",
    weights: str | Mapping[str, float] = "equal",
    yule_scale: float = 100.0,
) -> Reward:
    """The shaped reward of MultiRole-R1 (arXiv 2507.20187) as one reward of text; range [0, 1].

    `RoleAnswersReward` blended with `DiversityReward` by `ShapedReward`; does not apply where there is no truth.
    """
    members = (RoleAnswersReward(column, mode, roles, extract), DiversityReward(weights, yule_scale))
    return Composed(members, partial(_shaped, shape=ShapedReward(delta)), "multirole_r1")


def cantelli_bound(roles: int, accuracy: float, correlation: float) -> float:
    """Upper bound of the chance that the majority of roles errs (Cantelli; arXiv 2507.20187).

    ``s2 / (s2 + t^2)`` with ``s2 = p (1 - p) (m + m (m - 1) rho)`` and ``t = m (p - 1/2)``.

    Parameters
    ----------
    roles : int >= 1, m
    accuracy : float in (1/2, 1], p of each role
    correlation : float in [-1 / (m - 1), 1], rho of two roles

    Raises
    ------
    InvalidInputError
        Outside these ranges.
    """
    lowest = -1 / (roles - 1) if roles > 1 else -1.0
    if roles < 1 or not 0.5 < accuracy <= 1 or not lowest <= correlation <= 1:
        raise InvalidInputError(
            f"cantelli_bound needs roles >= 1, accuracy in (1/2, 1] and correlation in [{lowest:g}, 1], got {roles}, "
            f"{accuracy}, {correlation}"
        )
    spread = accuracy * (1 - accuracy) * (roles + roles * (roles - 1) * correlation)
    return spread / (spread + (roles * (accuracy - 0.5)) ** 2)


def _shaped(values: np.ndarray, shape: ShapedReward) -> np.ndarray:
    return np.asarray(shape(values[0], values[1]))


def _hashable(label: Any) -> Any:
    return tuple(map(_hashable, label)) if isinstance(label, list | tuple) else label


def _name(text: str) -> str:
    return text.strip(" \t\r*-•>#`.\"'").casefold()


def _label(text: str) -> str:
    return text.strip(" \t\r*`\"'").removesuffix(".").strip(" *").casefold()
