"""Hybrid accuracy: a rule where the answer can be checked, a model's score where it cannot.

The type of the question decides who scores it. For a verifiable one the rule does, with the confidence c that it found
an answer; for an open one the model does:

    R_hyb = R_rule                     verifiable, fallback "zero" (0 where no answer was found)
    R_hyb = c R_rule + (1 - c) R_model    verifiable, fallback "model"
    R_hyb = R_model                    open

Paper: Beyond Monolithic Rewards: A Hybrid and Multi-Aspect Reward Optimization for MLLM Alignment (HARMO, arXiv
2510.05283). `polyreward.rewards.harmo` adds its terms for length and format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from polyreward.errors import InvalidInputError, MissingColumnError, nearest
from polyreward.rewards.answers import check_place, find_answer, parse_number
from polyreward.rewards.contract import (
    Reward,
    RewardFunction,
    as_list,
    check_values,
    first_row,
    is_listing,
    name_of,
    text_of,
    values_of,
)

Fallback = Literal["zero", "model"]
TYPES = ("verifiable", "open")
SOURCES = ("rule", "model", "blend", "none")
_SLACK = 1e-6  # float32 of a value in [0, 1]


def blend(rule: Any, confidence: Any, model: Any, verifiable: Any, fallback: Fallback = "zero") -> np.ndarray:
    """Hybrid accuracy of arrays (Eq. 1 of arXiv 2510.05283), float64 in their common shape.

    Parameters
    ----------
    rule, confidence, model : in [0, 1]
        R_rule, c, R_model. A rule or model without weight may be NaN.
    verifiable : bool
    fallback : "zero" for ``c > 0 ? R_rule : 0``, or "model" for ``c R_rule + (1 - c) R_model``
    """
    rule, c, model = (np.asarray(values, dtype=np.float64) for values in (rule, confidence, model))
    found = np.where(c > 0, rule, 0.0)
    if fallback == "model":
        found = np.where(c > 0, c * rule, 0.0) + np.where(c < 1, (1 - c) * model, 0.0)
    return np.where(verifiable, found, model)


@dataclass(frozen=True)
class HybridParts:
    """A hybrid reward with its parts.

    Attributes
    ----------
    values : float64 (N,)
        R_hyb, NaN where no source applies.
    rule, confidence, model : float64 (N,)
        NaN where the source was not asked.
    verifiable : bool (N,)
    source : list of "rule", "model", "blend" or "none"
        Whose value it is; "none" where the value is NaN.
    """

    values: np.ndarray
    rule: np.ndarray
    confidence: np.ndarray
    model: np.ndarray
    verifiable: np.ndarray
    source: list[str]


@dataclass(frozen=True)
class HybridReward(Reward):
    """A rule for verifiable questions, a model for open ones (HARMO, arXiv 2510.05283, Eq. 1).

    Parameters
    ----------
    rule : reward
        Called on the verifiable rows. It returns one entry a completion: a value in [0, 1], or a pair (value,
        confidence); or a tuple of two lists, values and confidences. A plain value has confidence 1. See
        `ConfidentRule` for verifiers.
    model : reward with values in [0, 1]
        Called on the open rows, and with ``fallback="model"`` on those with a confidence below 1. Wrap raw scores in
        `polyreward.rewards.embedding_similarity.SquashedReward`.
    route : function of a prompt to "verifiable" or "open", or the name of a column of these
        The type belongs to the question, not to the response.
    fallback : "zero" or "model"
        What a verifiable response without an answer earns: 0, or the model's value by ``1 - confidence``.

    Range [0, 1]. Does not apply to an open row to which the model does not. The trainer's ``log_extra`` hears the
    source of each value as ``hybrid_source``.

    Raises
    ------
    InvalidInputError
        At a call: an unknown or missing type; a verifiable row to which the rule does not apply, as it has no
        reference; values or confidences outside [0, 1]. The message names part and row.
    """

    rule: Callable[..., Any]
    model: RewardFunction
    route: Callable[[Any], str] | str = "type"
    fallback: Fallback = "zero"

    def __post_init__(self) -> None:
        for name, part in (("rule", self.rule), ("model", self.model)):
            if not callable(part):
                raise InvalidInputError(f"HybridReward: {name} {part!r} is not a reward function")
        if not callable(self.route) and not isinstance(self.route, str):
            raise InvalidInputError(
                f"HybridReward: route must be a function of a prompt or a column, got {self.route!r}"
            )
        if self.fallback not in ("zero", "model"):
            raise InvalidInputError(f"HybridReward: fallback must be 'zero' or 'model', got {self.fallback!r}")

    @property
    def __name__(self) -> str:
        """Name in logs."""
        return "hybrid"

    @property
    def members(self) -> tuple[RewardFunction, ...]:
        """The two sources."""
        return (self.rule, self.model)

    def __call__(self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One value a completion."""
        if len(completions) == 0:
            return []
        found = self.explain(prompts, completions, **columns)
        if callable(log_extra := columns.get("log_extra")):
            log_extra("hybrid_source", found.source)
        return as_list(found.values)

    def explain(self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any) -> HybridParts:
        """The reward with its parts."""
        rows = len(completions)
        verifiable = self._verifiable(prompts, rows, columns)
        rule, confidence = np.full((2, rows), np.nan)
        if len(checked := np.flatnonzero(verifiable)):
            rule[checked], confidence[checked] = _on_rows(self._rule, checked, prompts, completions, columns)
        asked = np.flatnonzero(~verifiable | (confidence < 1) if self.fallback == "model" else ~verifiable)
        model = np.full(rows, np.nan)
        if len(asked):
            model[asked] = _on_rows(self._model, asked, prompts, completions, columns)
        values = blend(rule, confidence, model, verifiable, self.fallback)
        part = np.where(verifiable, 0, 1)  # index into SOURCES
        if self.fallback == "model":
            part = np.where(verifiable & (confidence < 1), np.where(confidence > 0, 2, 1), part)
        part = np.where(np.isnan(values), 3, part)
        return HybridParts(values, rule, confidence, model, verifiable, [SOURCES[k] for k in part])

    def _verifiable(self, prompts: Sequence[Any] | None, rows: int, columns: Mapping[str, Any]) -> np.ndarray:
        if isinstance(self.route, str):
            if self.route not in columns:
                raise MissingColumnError(
                    f"reward 'hybrid' reads the column {self.route!r}{nearest(self.route, columns)}"
                )
            labels = columns[self.route]
            if not is_listing(labels) or len(labels) != rows:
                raise InvalidInputError(f"reward 'hybrid': column {self.route!r} must be a list of {rows} types")
            labels, where = list(labels), f"column {self.route!r}"
        else:
            if prompts is None or len(prompts) != rows:
                raise InvalidInputError(f"reward 'hybrid': its route reads the prompts, expected {rows} of them")
            labels, where = [self.route(prompt) for prompt in prompts], "route"
        for row, label in enumerate(labels):
            if not isinstance(label, str) or label not in TYPES:
                raise InvalidInputError(
                    f"reward 'hybrid': {where}, row {first_row.get() + row}: type {label!r}, expected 'verifiable' or "
                    "'open'"
                )
        return np.array([label == "verifiable" for label in labels], dtype=bool)

    def _rule(self, prompts: Any, completions: Any, columns: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        name, rows = name_of(self.rule), len(completions)
        result: Any = self.rule(prompts=prompts, completions=completions, **columns)
        if isinstance(result, tuple) and len(result) == 2 and all(is_listing(part) for part in result):
            values, confidence = result
        elif not is_listing(result):
            raise InvalidInputError(
                f"rule {name!r} returned {type(result).__name__}, expected a list of {rows} entries"
            )
        else:
            result = [pair if isinstance(pair, tuple | list) else (pair, 1.0) for pair in result]
            if any(len(pair) != 2 for pair in result):
                raise InvalidInputError(f"rule {name!r} returned entries that are not pairs (value, confidence)")
            values, confidence = [pair[0] for pair in result], [pair[1] for pair in result]
        found, c = check_values(values, rows, name), check_values(confidence, rows, f"confidence of {name}")
        _in_range(f"confidence of {name}", c, missing="no confidence")
        _in_range(name, np.where(c > 0, found, 0.0), missing="no value: a verifiable row needs a reference")
        return found, c

    def _model(self, prompts: Any, completions: Any, columns: Mapping[str, Any]) -> np.ndarray:
        values = values_of(self.model, prompts, completions, columns)
        _in_range(name_of(self.model), values, missing=None)
        return values


@dataclass(frozen=True)
class ConfidentRule(Reward):
    """A verifier with its confidence: 1 where the completion has an answer in the verifier's place, else 0.

    Returns pairs (value, confidence), for `HybridReward` (arXiv 2510.05283); None where the verifier does not apply.
    Range of both [0, 1].

    Parameters
    ----------
    verifier : reward with values in [0, 1], such as `NumericAnswer` or `ExactMatch`
    extract : where the answer stands, as in the verifier; default its own ``extract``
    number : bool or None
        Whether the answer must be a number; default true for `NumericAnswer`.
    """

    verifier: RewardFunction
    extract: str | None = None
    number: bool | None = None

    def __post_init__(self) -> None:
        if self.extract is None:
            object.__setattr__(self, "extract", getattr(self.verifier, "extract", None))
        if self.extract is None:
            raise InvalidInputError(f"ConfidentRule: {name_of(self.verifier)!r} does not say where its answer stands")
        check_place(self.extract)
        if self.number is None:
            object.__setattr__(self, "number", name_of(self.verifier) == "numeric_answer")

    @property
    def members(self) -> tuple[RewardFunction, ...]:
        """The verifier."""
        return (self.verifier,)

    def __call__(self, prompts: Any, completions: Sequence[Any], **columns: Any) -> Any:
        """One pair (value, confidence) a completion, or None."""
        values = as_list(values_of(self.verifier, prompts, completions, columns))
        found = [float(self._found(text_of(completion))) for completion in completions]
        return [None if value is None else (value, c) for value, c in zip(values, found, strict=True)]

    def _found(self, text: str) -> bool:
        answer = find_answer(text, str(self.extract))
        return bool(answer) and (not self.number or parse_number(str(answer)) is not None)


def _on_rows(
    part: Callable[[Any, Any, Mapping[str, Any]], Any],
    rows: np.ndarray,
    prompts: Sequence[Any] | None,
    completions: Sequence[Any],
    columns: Mapping[str, Any],
) -> Any:
    """Call a source on some rows of a batch; what it would log has another length and is left out."""
    total, hooks = len(completions), ("log_extra", "log_metric")

    def cut(values: Any, chosen: Sequence[int]) -> Any:
        return [values[i] for i in chosen] if is_listing(values) and len(values) == total else values

    def call(chosen: Sequence[int]) -> Any:
        kept = {name: cut(values, chosen) for name, values in columns.items() if name not in hooks}
        return part(cut(prompts, chosen), [completions[i] for i in chosen], kept)

    try:
        return call(rows.tolist())
    except InvalidInputError:
        base = first_row.get()
        for row in rows.tolist():  # again one by one, so that the error names the row of the whole batch
            token = first_row.set(base + row)
            try:
                call([row])
            finally:
                first_row.reset(token)
        raise


def _in_range(name: str, values: np.ndarray, missing: str | None) -> None:
    """Refuse values outside [0, 1], and missing ones where `missing` says what is wrong with them."""
    blank = np.isnan(values)
    wrong = (values < -_SLACK) | (values > 1 + _SLACK) | (blank if missing else False)
    if wrong.any():
        row = int(wrong.argmax())
        what = missing if blank[row] else f"{values[row]:g} is not in [0, 1]; squash raw scores first (SquashedReward)"
        raise InvalidInputError(f"reward 'hybrid': {name}, row {first_row.get() + row}: {what}")
