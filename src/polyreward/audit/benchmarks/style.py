"""Do chosen and rejected responses differ in style, so that a benchmark can be passed without reading?

RewardBench's mathematical pairs set terse human solutions against long machine-written ones, which a preference for
length decides. `style_gap` gives the effect size of any feature (Evaluating Robustness of Reward Models for
Mathematical Reasoning, arXiv 2410.01729).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polyreward.audit.benchmarks.intervals import numbers
from polyreward.errors import InvalidInputError

_STEP = re.compile(r"[^\n]*\S[^\n]*")


def style_features(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Plain features of texts: words, characters, steps (lines with something on them), words a step; float64 (N,)."""
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise InvalidInputError(f"text {row} is {type(text).__name__}, expected a text")
    words = np.array([len(text.split()) for text in texts], dtype=np.float64)
    steps = np.array([len(_STEP.findall(text)) for text in texts], dtype=np.float64)
    return {
        "words": words,
        "characters": np.array([len(text) for text in texts], dtype=np.float64),
        "steps": steps,
        "words a step": words / np.maximum(steps, 1),
    }


def style_gap(features_chosen: Any, features_rejected: Any, *, level: float = 0.95) -> dict[str, dict[str, Any]]:
    """Effect size of each feature between chosen and rejected responses.

    Parameters
    ----------
    features_chosen, features_rejected : mapping of name to numbers, or (N,), or (N, F)
        The two may differ in N. Columns without names are called by their place.

    Returns
    -------
    dict of feature to dict
        ``d``: Cohen's d, difference of the means over the pooled deviation (0 for equal means, infinite for different
        ones without any spread); ``interval``: its 95 % interval (normal); ``delta``: Cliff's delta, how much more
        likely a chosen response has more of it than less, in [-1, 1]; ``chosen``, ``rejected``: means.

    Raises
    ------
    InvalidInputError
        Different features, no response on a side, values that are not finite.
    """
    from scipy.special import ndtri

    first, second = _columns(features_chosen, "features_chosen"), _columns(features_rejected, "features_rejected")
    if list(first) != list(second):
        raise InvalidInputError(f"chosen has the features {list(first)}, rejected {list(second)}: expected the same")
    reach = float(ndtri(0.5 + level / 2))
    return {name: _gap(first[name], second[name], reach) for name in first}


def _gap(chosen: np.ndarray, rejected: np.ndarray, reach: float) -> dict[str, Any]:
    n, m = len(chosen), len(rejected)
    difference = float(chosen.mean() - rejected.mean())
    squares = float(((chosen - chosen.mean()) ** 2).sum() + ((rejected - rejected.mean()) ** 2).sum())
    spread = float(np.sqrt(squares / max(n + m - 2, 1)))
    # equal values differ from their mean by rounding only
    flat = spread <= 1e-12 * max(1.0, float(np.abs(chosen).max()), float(np.abs(rejected).max()))
    d = (0.0 if chosen[0] == rejected[0] else np.copysign(np.inf, difference)) if flat else difference / spread
    error = float(np.sqrt((n + m) / (n * m) + d * d / (2 * (n + m)))) if np.isfinite(d) else 0.0
    ordered = np.sort(rejected)
    less, upto = (np.searchsorted(ordered, chosen, side=side) for side in ("left", "right"))
    return {
        "d": float(d),
        "interval": (float(d - reach * error), float(d + reach * error)),
        "delta": float((less - (m - upto)).mean() / m),
        "chosen": float(chosen.mean()),
        "rejected": float(rejected.mean()),
    }


def _columns(given: Any, name: str) -> dict[str, np.ndarray]:
    if isinstance(given, Mapping):
        columns = {str(key): numbers(values, f"{name}[{key!r}]", 1) for key, values in given.items()}
    else:
        array = numbers(given, name)
        if array.ndim not in (1, 2):
            raise InvalidInputError(f"{name} must be (N,) or (N, F), got shape {array.shape}")
        columns = {str(i): column for i, column in enumerate(array[:, None].T if array.ndim == 1 else array.T)}
    if not columns or any(not len(values) for values in columns.values()):
        raise InvalidInputError(f"{name} has no values, expected at least one response and one feature")
    return columns
