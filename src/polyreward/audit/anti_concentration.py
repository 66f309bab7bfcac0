"""Heterogeneity and anti-concentration: can a verifier get more out of a base policy than copying its traces would?

Traces earn ``r = H - t`` for solving at step t (`solve_time_return`). On a prompt the base policy is heterogeneous by
the variance of its returns (for deterministic dynamics the same as the sum over steps of the variance of Q), and it is
anti-concentrated at kappa by the chance that a trace exceeds its own prompt's mean by sqrt(kappa) deviations:

    sigma^2_x = Var[r],      c_x(kappa) = Pr[r >= E r + sigma_x sqrt(kappa)]

Cloning loses of the order of sigma when traces are few; a verifier gains up to ``sigma sqrt(kappa)`` inside a
chi-square ball of radius kappa, and needs c > 0 for it. Both are estimated within prompts first, so that prompts of
different difficulty do not look like different styles.

Scaling Test-Time Compute Without Verification or RL is Suboptimal, arXiv 2502.12118.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError
from polyreward.grouped import Ids, Segments, factorize, whole

_ROUNDING = 1e-9


class AntiConcentration(float):
    """Share of traces far above the mean of their prompt: a float with its Wilson interval.

    Attributes
    ----------
    low, high : float
        Wilson interval of the share. The thresholds are estimated from the same traces, which it does not count.
    traces : int
        Traces that took part.
    """

    low: float
    high: float
    traces: int

    def __new__(cls, share: float, low: float, high: float, traces: int) -> AntiConcentration:
        """A share with its interval."""
        made = super().__new__(cls, share)
        made.low, made.high, made.traces = low, high, traces
        return made

    @property
    def interval(self) -> tuple[float, float]:
        """``(low, high)``."""
        return self.low, self.high

    def __getnewargs__(self) -> tuple[float, float, float, int]:  # type: ignore[override]
        return float(self), self.low, self.high, self.traces

    def __repr__(self) -> str:
        return f"{float(self):.3f} ({self.low:.3f} to {self.high:.3f}, {self.traces} traces)"


@dataclass(frozen=True)
class BaseAudit:
    """What `audit_base` found.

    Attributes
    ----------
    prompts : int
        Prompts with at least two traces; those with fewer say nothing about spread.
    mean : float
        Mean return, of the prompts' means.
    deviation : float
        Median over prompts of the deviation of returns (sigma tilde in the paper).
    anti_concentration : AntiConcentration
        Share over all traces of these prompts.
    prompts_above : float
        Share of these prompts that differ in their returns and have a trace above their threshold.
    ball_gain : float
        ``deviation * sqrt(kappa)``: what a chi-square ball of radius kappa adds at most.
    kappa : float
    """

    prompts: int
    mean: float
    deviation: float
    anti_concentration: AntiConcentration
    prompts_above: float
    ball_gain: float
    kappa: float


def solve_time_return(solved: Any) -> Any:
    """Return of every trace under the bi-level reward: 1 from the step that solves to the end.

    Parameters
    ----------
    solved : bool, or numbers 0 and 1, (n, H)
        Whether the trace is solved after each step.

    Returns
    -------
    float (n,): ``H - t`` for a trace solved at step t, counted from 0; 0 where it never is. A tensor for a tensor.

    Raises
    ------
    InvalidInputError
        Not two axes, values other than 0 and 1, a trace that is solved and then is not.
    """
    tensor = isinstance(solved, Tensor)
    values = solved if tensor else torch.as_tensor(np.asarray(solved))
    if values.ndim != 2:
        raise InvalidInputError(f"solved must have shape (traces, steps), got {tuple(values.shape)}")
    if values.dtype != torch.bool:
        wrong = ~((values == 0) | (values == 1))
        if bool(wrong.any()):
            row, step = wrong.nonzero()[0].tolist()
            raise InvalidInputError(f"solved[{row}, {step}] is {values[row, step].item()}, expected 0 or 1")
        values = values.to(torch.bool)
    falls = values[:, :-1] & ~values[:, 1:]
    if bool(falls.any()):
        row, step = falls.nonzero()[0].tolist()
        raise InvalidInputError(
            f"solved[{row}] falls from 1 to 0 after step {step}: a reward of this kind stays 1 once it is 1"
        )
    returns = values.sum(dim=1)
    return returns.to(torch.get_default_dtype()) if tensor else returns.to(torch.float64).numpy()


def heterogeneity(returns: Any, prompts: Ids | Segments | None = None, *, ddof: int = 0) -> Any:
    """Variance of the returns on every prompt (sigma^2 in the paper; its median over prompts is what counts).

    Parameters
    ----------
    returns : float (P, n), traces by prompt; or (N,) with `prompts`; or a mapping or list of one sequence a prompt
        NaN: not a trace.
    prompts : N ids, for returns (N,)
    ddof : int
        0 is the variance of the traces at hand, 1 the unbiased estimate of the policy's.

    Returns
    -------
    float64 (P,), one a prompt in the order given; with `prompts`, ascending for whole numbers and else in the order in
    which they first come. 0 where a prompt has fewer than ``ddof + 1`` traces. A tensor where `returns` is one, else
    NumPy.

    Raises
    ------
    InvalidInputError
        Infinite returns, shapes that do not fit.
    """
    values, segments = _by_prompt(returns, prompts)
    variance = segments.variance(values, ~values.isnan(), ddof)
    if prompts is not None:  # whole numbers as ids may leave segments empty
        variance = variance[segments.sizes > 0]
    return variance if isinstance(returns, Tensor) else variance.numpy()


def anti_concentration(
    returns: Any, kappa: float = 0.5, prompts: Ids | Segments | None = None, *, level: float = 0.95
) -> AntiConcentration:
    """Share of traces whose return is at least ``mean + deviation * sqrt(kappa)`` of their prompt.

    Parameters
    ----------
    returns : as in `heterogeneity`; (N,) without `prompts` are the traces of one prompt
    kappa : float >= 0
    level : float in (0, 1)
        Of the Wilson interval.

    Returns
    -------
    AntiConcentration
        A float. 1 where all returns of a prompt are equal: nothing can be gained there, and `heterogeneity` says so.

    Raises
    ------
    InvalidInputError
        No trace at all, infinite returns, `kappa` or `level` out of range.
    """
    values, segments = _by_prompt(returns, prompts)
    return _share(_above(values, segments, _checked(kappa)), level)


def audit_base(batch: RewardBatch, reward: str | None = None, kappa: float = 0.5, by: str = "group") -> BaseAudit:
    """Heterogeneity and anti-concentration of the policy that wrote a batch.

    Parameters
    ----------
    batch : RewardBatch
        A group is the traces of one prompt.
    reward : str, optional
        Name of the reward; default the only one.
    by : str
        What tells prompts apart, as in `RewardBatch.segments`.

    Raises
    ------
    MissingColumnError
        No such reward or column.
    InvalidInputError
        Several rewards and no name, or no prompt with two traces.
    """
    if reward is None and len(batch.names) != 1:
        raise InvalidInputError(f"the batch has the rewards {', '.join(batch.names)}: name one")
    values = batch.reward(batch.names[0] if reward is None else reward).to(torch.float64)
    segments, kappa = batch.segments(by), _checked(kappa)
    valid = ~values.isnan()
    counted = segments.number(valid) >= 2
    if not bool(counted.any()):
        raise InvalidInputError(f"no {by} of the batch has two traces with a reward: there is no spread to estimate")
    values = torch.where(segments.spread(counted), values, torch.nan)
    variance = segments.variance(values, ~values.isnan())[counted]
    above = _above(values, segments, kappa)
    hits = segments.sum(torch.where(above.isnan(), 0.0, above))[counted]
    deviation = float(np.median(variance.sqrt().cpu().numpy()))
    return BaseAudit(
        prompts=int(counted.sum()),
        mean=float(segments.mean(values, ~values.isnan())[counted].mean()),
        deviation=deviation,
        anti_concentration=_share(above, 0.95),
        prompts_above=float(((variance > 0) & (hits > 0)).double().mean()),
        ball_gain=deviation * math.sqrt(kappa),
        kappa=kappa,
    )


def _by_prompt(returns: Any, prompts: Ids | Segments | None) -> tuple[Tensor, Segments]:
    """Returns (N,) float64 with NaN where there is no trace, and the prompts that they belong to."""
    if isinstance(returns, Mapping):
        returns = list(returns.values())
    if (
        isinstance(returns, Sequence)
        and len(returns)
        and all(isinstance(row, Sequence | np.ndarray | Tensor) for row in returns)
    ):
        lengths = torch.tensor([len(row) for row in returns])
        codes = torch.repeat_interleave(torch.arange(len(returns)), lengths)
        values = _numbers([value for row in returns for value in row])
        return _finite(values), Segments(codes, len(returns))
    values = _numbers(returns)
    if values.ndim == 2 and prompts is None:
        rows, width = values.shape
        codes = torch.arange(rows, device=values.device).repeat_interleave(width)
        return _finite(values.reshape(-1)), Segments(codes, rows)
    if values.ndim != 1:
        raise InvalidInputError(
            f"returns have shape {tuple(values.shape)}, expected (prompts, traces), or (traces,) with their prompts"
        )
    if prompts is None:
        return _finite(values), whole(len(values), values.device)
    segments = prompts if isinstance(prompts, Segments) else factorize(prompts, name="prompts", device=values.device)
    if len(segments) != len(values):
        raise InvalidInputError(f"prompts has {len(segments)} entries for {len(values)} returns")
    return _finite(values), segments


def _numbers(returns: Any) -> Tensor:
    if isinstance(returns, Tensor):
        return returns.to(torch.float64)
    try:
        return torch.from_numpy(np.array(returns, dtype=np.float64))
    except (TypeError, ValueError):
        raise InvalidInputError(f"returns must be numbers, got {returns!r:.80}") from None


def _finite(values: Tensor) -> Tensor:
    if bool(values.isinf().any()):
        row = int(values.isinf().nonzero()[0])
        raise InvalidInputError(f"the return of trace {row} is {values[row].item()}, expected a finite number or NaN")
    return values


def _checked(kappa: float) -> float:
    if not (isinstance(kappa, int | float | np.number) and 0 <= kappa < math.inf):
        raise InvalidInputError(f"kappa must be a finite number of at least 0, got {kappa!r}")
    return float(kappa)


def _above(values: Tensor, segments: Segments, kappa: float) -> Tensor:
    """1 where a return reaches its prompt's threshold, 0 where not, NaN where there is no trace."""
    valid = ~values.isnan()
    centred = segments.centred(torch.where(valid, values, 0.0), valid)
    needed = segments.spread(segments.deviation(torch.where(valid, values, 0.0), valid)) * math.sqrt(kappa)
    # Two-valued returns sit on the threshold at kappa = (1 - p) / p: rounding must not decide.
    above = centred >= needed - _ROUNDING * needed.abs().clamp(min=1e-300)
    return torch.where(valid, above.to(torch.float64), torch.nan)


def _share(above: Tensor, level: float) -> AntiConcentration:
    if not 0 < level < 1:
        raise InvalidInputError(f"level must be between 0 and 1, got {level}")
    counted = above[~above.isnan()]
    traces = len(counted)
    if traces == 0:
        raise InvalidInputError("anti_concentration needs at least one return that is not NaN")
    hits = float(counted.sum())
    return AntiConcentration(hits / traces, *wilson_interval(hits, traces, level), traces)


def wilson_interval(hits: float, number: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share of `hits` in `number` >= 1 trials."""
    z = math.sqrt(2) * float(torch.special.erfinv(torch.tensor(level, dtype=torch.float64)))
    share, penalty = hits / number, z * z / number
    centre = share + penalty / 2
    half = z * math.sqrt(share * (1 - share) / number + penalty / (4 * number))
    low, high = (centre - half) / (1 + penalty), (centre + half) / (1 + penalty)
    return (0.0 if hits == 0 else max(0.0, low)), (1.0 if hits == number else min(1.0, high))
