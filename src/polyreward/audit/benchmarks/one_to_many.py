"""One correct solution against many wrong ones: RewardMATH's protocol for any scores.

A reward model that steers a policy has to prefer the right solution to every wrong one that the policy can write, not
to one of them. For a problem with correct scores c (usually one) and wrong scores j_1..j_m:

    accuracy        1[min c > max j]            (>= counts ties: ``accuracy_with_ties``)
    mrr             1 / (1 + #{j >= c})         ties ranked pessimistically; of several correct, the best
    pairwise_mean   share of {j < min c}        what a one-to-one benchmark measures

A judge that picks one of two is read in pairwise mode: with W wins of m the correct solution scores W + 1, a beaten
wrong one 1 and a winning wrong one m + 2, so that accuracy is 1[W = m] and the rank 1 + m - W.

Evaluating Robustness of Reward Models for Mathematical Reasoning, arXiv 2410.01729.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from polyreward.audit.benchmarks.intervals import bootstrap_ratios, check_resampling, numbers
from polyreward.errors import InvalidInputError, MissingColumnError, UnknownNameError, nearest
from polyreward.preferences import content_key

HOWS = ("min", "max", "prod", "geometric_mean", "mean", "last", "mean_logit", "mean_odds")
_SAME = {"geo": "geometric_mean", "geo_mean": "geometric_mean", "mean_odd": "mean_odds"}
CLIP = 1e-6
FIGURES = ("accuracy", "accuracy_with_ties", "mrr", "pairwise_mean", "tie_rate")
_RATING = re.compile(r"rating\W*(\d+)", re.IGNORECASE)


def aggregate_steps(probs: Sequence[Any] | np.ndarray, how: str = "prod") -> Any:
    """One score of the step probabilities that a process reward model gives.

    ``prod`` favours short solutions (fewer factors below 1), ``geometric_mean`` does not; `mean_logit` is the sigmoid
    of the mean logit, `mean_odds` the mean of ``p / (1 - p)``, both of probabilities clipped to [1e-6, 1 - 1e-6].

    Parameters
    ----------
    probs : (T,) probabilities of one solution, or a list of such, one a solution
    how : "min", "max", "prod", "geometric_mean", "mean", "last", "mean_logit" or "mean_odds"

    Returns
    -------
    float, or float64 (N,) for N solutions

    Raises
    ------
    InvalidInputError
        A solution without steps, or a step that is no probability; the message names solution and step.
    UnknownNameError
        Another `how`.
    """
    name = re.sub(r"[ -]", "_", how)
    name = _SAME.get(name, name)
    if name not in HOWS:
        raise UnknownNameError(f"unknown aggregation of steps {how!r}{nearest(how, HOWS)}")
    single = not len(probs) or np.ndim(probs[0]) == 0
    rows = [probs] if single else list(probs)
    sizes = np.array([len(row) for row in rows], dtype=np.int64)
    if (sizes == 0).any():
        raise InvalidInputError(f"solution {int((sizes == 0).argmax())} has no steps, expected at least one")
    flat = np.concatenate([numbers(row, f"steps of solution {i}", 1) for i, row in enumerate(rows)])
    starts = np.cumsum(sizes) - sizes
    wrong = (flat < 0) | (flat > 1)
    if wrong.any():
        at = int(wrong.argmax())
        owner = int(np.searchsorted(starts, at, side="right")) - 1
        raise InvalidInputError(
            f"step {at - starts[owner]} of solution {owner} is {flat[at]:g}, expected a probability"
        )
    scores = _aggregated(flat, starts, sizes, name)
    return float(scores[0]) if single else scores


def _aggregated(flat: np.ndarray, starts: np.ndarray, sizes: np.ndarray, how: str) -> np.ndarray:
    def mean(values: np.ndarray) -> np.ndarray:
        return np.asarray(np.add.reduceat(values, starts) / sizes)

    if how in ("min", "max", "prod"):
        reduce = {"min": np.minimum, "max": np.maximum, "prod": np.multiply}[how]
        return np.asarray(reduce.reduceat(flat, starts))
    if how == "last":
        return flat[starts + sizes - 1]
    if how == "mean":
        return mean(flat)
    if how == "geometric_mean":
        with np.errstate(divide="ignore"):
            return np.exp(mean(np.log(flat)))
    clipped = np.clip(flat, CLIP, 1 - CLIP)
    odds = clipped / (1 - clipped)
    return mean(odds) if how == "mean_odds" else 1 / (1 + np.exp(-mean(np.log(odds))))


def parse_rating(text: Any, failure: float = 1.0) -> float:
    """The whole number after the last ``Rating:`` in a judge's reply; `failure` where there is none."""
    found = _RATING.findall(text) if isinstance(text, str) else []
    return float(found[-1]) if found else failure


class OneToManyBenchmark:
    """Problems with the scores of correct and wrong solutions (arXiv 2410.01729).

    Parameters
    ----------
    records : mappings, one a problem
        ``chosen``: one score, or a list; ``rejected``: (m,) scores. Optional: ``problem_id`` (default the place),
        ``sources``: who wrote each wrong solution (m,), or each solution, the correct ones first. For pairwise mode
        ``wins`` (m,): 1 where the judge took the correct one, 0 where the wrong one, 0.5 for a tie; or ``chosen`` with
        one score for each of the m comparisons. m may differ between problems.

    Of records with the same ``problem_id`` the first counts; `duplicates` says how many were left out.

    Raises
    ------
    InvalidInputError
        No problem; a problem without correct or without wrong solution; NaN or infinity; lengths that do not fit. The
        message names the problem.
    MissingColumnError
        A record without ``chosen`` and ``rejected``, and without ``wins``.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]]) -> None:
        first: dict[Any, tuple[Any, Mapping[str, Any]]] = {}
        for place, record in enumerate(records):
            if not isinstance(record, Mapping):
                raise InvalidInputError(f"record {place} is {type(record).__name__}, expected a mapping")
            name = record.get("problem_id")
            first.setdefault(
                ("row", place) if name is None else content_key(name), (place if name is None else name, record)
            )
        if not first:
            raise InvalidInputError("the benchmark has no problems")
        self.duplicates = len(records) - len(first)
        self.problem_ids = [name for name, _ in first.values()]
        parsed = [_parsed(record, f"problem {name!r}") for name, record in first.values()]
        self._chosen, self._chosen_mask = _padded([one[0] for one in parsed])
        self._rejected, self._mask = _padded([one[1] for one in parsed])
        self._wins, _ = _padded([one[2] for one in parsed])
        self._scored = np.array([one[4] for one in parsed])
        self._sources = [one[3] for one in parsed]

    @classmethod
    def from_scores(
        cls, scores: Any, *, sources: Sequence[Sequence[str]] | None = None, problem_ids: Sequence[Any] | None = None
    ) -> OneToManyBenchmark:
        """From scores (Q, 1 + m) whose first column is the correct solution; `sources` as of the records."""
        table = numbers(scores, "scores", 2)
        if table.shape[1] < 2:
            raise InvalidInputError(f"scores must have the correct and a wrong solution, got shape {table.shape}")
        return cls(
            [
                {
                    "problem_id": None if problem_ids is None else problem_ids[q],
                    "chosen": row[:1],
                    "rejected": row[1:],
                    "sources": None if sources is None else sources[q],
                }
                for q, row in enumerate(table)
            ]
        )

    def __len__(self) -> int:
        return len(self.problem_ids)

    @property
    def has_scores(self) -> bool:
        """Whether every problem has scores of its solutions, which scalar mode needs."""
        return bool(self._scored.all())

    @property
    def sizes(self) -> np.ndarray:
        """Number of wrong solutions of each problem, int64 (Q,)."""
        return np.asarray(self._mask.sum(axis=1))

    def table(self) -> np.ndarray:
        """Scores (Q, 1 + m), the correct solution first, of problems with one correct and m wrong solutions each.

        Raises
        ------
        InvalidInputError
            Problems that differ in the number of solutions, or have comparisons only.
        """
        if self._chosen.shape[1] != 1 or not self._mask.all() or not self.has_scores:
            raise InvalidInputError("a table needs scores of one correct and equally many wrong solutions a problem")
        return np.concatenate([self._chosen, self._rejected], axis=1)

    def random_level(self) -> dict[str, float]:
        """What independent continuous scores without information get: 0.1 and 0.2929 (MRR) for one against nine."""
        m = self.sizes
        harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, m.max() + 2))])
        return {
            "accuracy": float((1 / (m + 1)).mean()),
            "mrr": float((harmonic[m + 1] / (m + 1)).mean()),
            "pairwise_mean": 0.5,
        }

    def outcomes(self, mode: Literal["scalar", "pairwise"] = "scalar") -> dict[str, np.ndarray]:
        """Figures of every problem, float64 (Q,) each, by the names of `evaluate`."""
        beaten, tied, rank = self._pairs(mode)
        m = self.sizes
        lost = self._mask & ~beaten & ~tied
        return {
            "accuracy": (beaten.sum(axis=1) == m).astype(np.float64),
            "accuracy_with_ties": (~lost.any(axis=1)).astype(np.float64),
            "mrr": 1 / rank,
            "pairwise_mean": beaten.sum(axis=1) / m,
            "tie_rate": tied.any(axis=1).astype(np.float64),
        }

    def evaluate(
        self,
        mode: Literal["scalar", "pairwise"] = "scalar",
        *,
        resamples: int = 1000,
        level: float = 0.95,
        seed: int | np.random.Generator = 0,
    ) -> dict[str, Any]:
        """All figures of the benchmark, with bootstrap intervals over problems.

        Parameters
        ----------
        mode : "scalar" (scores are compared with each other) or "pairwise" (each wrong solution met the correct one)

        Returns
        -------
        dict
            ``accuracy``, ``accuracy_with_ties``, ``mrr``, ``pairwise_mean`` (share of a problem's wrong solutions that
            score strictly less), ``tie_rate`` (share of problems in which a wrong solution equals the correct one);
            ``per_source_accuracy``: share of the wrong solutions of each source that score strictly less;
            ``per_source_count``; ``intervals``: (low, high) of each figure, and of each source under
            ``per_source_accuracy``; ``problems``, ``duplicates``, ``random_level``.

        Raises
        ------
        InvalidInputError
            Another mode; pairwise records in scalar mode; several correct solutions without ``wins`` in pairwise mode.
        """
        check_resampling(resamples, level)
        outcomes = self.outcomes(mode)
        names, won, met = self._by_source(self._pairs(mode)[0])
        tops = np.column_stack([*outcomes.values(), won]) if len(names) else np.column_stack([*outcomes.values()])
        bottoms = np.column_stack([np.ones((len(self), len(outcomes))), met]) if len(names) else np.ones(tops.shape)
        low, high = bootstrap_ratios(tops, bottoms, resamples=resamples, level=level, rng=seed)
        bounds = list(zip(low.tolist(), high.tolist(), strict=True))
        report: dict[str, Any] = {name: float(values.mean()) for name, values in outcomes.items()}
        report["per_source_accuracy"] = dict(zip(names, (won.sum(axis=0) / met.sum(axis=0)).tolist(), strict=True))
        report["per_source_count"] = dict(zip(names, met.sum(axis=0).astype(int).tolist(), strict=True))
        report["intervals"] = dict(zip(outcomes, bounds, strict=False))
        report["intervals"]["per_source_accuracy"] = dict(zip(names, bounds[len(outcomes) :], strict=True))
        return report | {
            "problems": len(self),
            "duplicates": self.duplicates,
            "random_level": self.random_level(),
        }

    def _pairs(self, mode: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which wrong solutions (Q, m) are beaten and which tied, and the rank (Q,) of the correct one."""
        if mode == "pairwise":
            missing = np.isnan(self._wins).all(axis=1)
            if missing.any():
                raise InvalidInputError(
                    f"problem {self.problem_ids[int(missing.argmax())]!r} has several correct solutions and no 'wins'; "
                    "pairwise mode needs one comparison a wrong solution"
                )
            beaten, tied = self._mask & (self._wins == 1), self._mask & (self._wins == 0.5)
            # a wrong solution that was not beaten outscores the correct one, also after a tie
            return beaten, tied, 1 + (self._mask & ~beaten).sum(axis=1)
        if mode != "scalar":
            raise InvalidInputError(f"mode must be 'scalar' or 'pairwise', got {mode!r}")
        if not self.has_scores:
            name = self.problem_ids[int((~self._scored).argmax())]
            raise InvalidInputError(f"problem {name!r} has comparisons and no scores of solutions; use mode='pairwise'")
        lowest = np.where(self._chosen_mask, self._chosen, np.inf).min(axis=1)[:, None]
        highest = np.where(self._chosen_mask, self._chosen, -np.inf).max(axis=1)[:, None]
        rejected = np.where(self._mask, self._rejected, np.nan)
        return rejected < lowest, rejected == lowest, 1 + (rejected >= highest).sum(axis=1)

    def _by_source(self, beaten: np.ndarray) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Sources, and how many of each problem's solutions of each were beaten and were there, (Q, S)."""
        names = sorted({source for row in self._sources for source in row})
        place = {name: i for i, name in enumerate(names)}
        sizes = [len(row) for row in self._sources]
        problem = np.repeat(np.arange(len(self)), sizes)
        slot = np.concatenate([np.arange(size) for size in sizes]) if sum(sizes) else np.zeros(0, np.int64)
        column = np.array([place[source] for row in self._sources for source in row], np.int64)
        won, met = np.zeros((2, len(self), len(names)))
        np.add.at(won, (problem, column), beaten[problem, slot.astype(np.int64)])
        np.add.at(met, (problem, column), 1)
        return names, won, met


def _parsed(record: Mapping[str, Any], where: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str], bool]:
    """Correct scores, wrong scores, outcome of each comparison, sources, and whether solutions have scores."""
    wins = record.get("wins")
    if wins is None and ("chosen" not in record or "rejected" not in record):
        raise MissingColumnError(f"{where} has no 'chosen' and 'rejected', and no 'wins'; found {', '.join(record)}")
    given = {
        name: np.atleast_1d(numbers(record[name], f"{where}: {name}"))
        for name in ("chosen", "rejected", "wins")
        if record.get(name) is not None
    }
    for name, values in given.items():
        if values.ndim != 1 or not len(values):
            what = "no correct solution" if name == "chosen" else "no wrong solution"
            raise InvalidInputError(f"{where} has {what}: {name!r} has shape {values.shape}, expected at least one")
    scored = "chosen" in given and "rejected" in given
    rejected = given["rejected"] if scored else np.zeros(len(given["wins"]))
    chosen = given["chosen"] if scored else np.zeros(1)
    if "wins" in given:
        met = given["wins"]
        if len(met) != len(rejected) or not np.isin(met, (0, 0.5, 1)).all():
            raise InvalidInputError(
                f"{where}: wins must be {len(rejected)} entries of 0, 0.5 or 1, one a wrong solution, got "
                f"{met.tolist()}"
            )
    elif len(chosen) in (1, len(rejected)):
        met = np.where(chosen > rejected, 1.0, np.where(chosen == rejected, 0.5, 0.0))
    else:
        met = np.full(len(rejected), np.nan)
    return chosen, rejected, met, _sources(record.get("sources"), len(chosen), len(rejected), where), scored


def _sources(given: Any, chosen: int, rejected: int, where: str) -> list[str]:
    if given is None:
        return []
    names = ["" if name is None else str(name) for name in given]
    if len(names) == chosen + rejected:
        return names[chosen:]
    if len(names) != rejected:
        raise InvalidInputError(f"{where}: sources has {len(names)} entries for {rejected} wrong solutions")
    return names


def _padded(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different length as one table, NaN where there is nothing, and where there is something."""
    sizes = np.array([len(row) for row in rows])
    mask = np.arange(sizes.max()) < sizes[:, None]
    table = np.full(mask.shape, np.nan)
    table[mask] = np.concatenate(rows)
    return table, mask
