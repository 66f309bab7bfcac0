"""Intervals that the benchmarks share: bootstrap of means and ratios over items, and Wilson's for shares.

The bootstrap draws how often each item comes (a multinomial), so that all resamples of all figures are one product of
matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from polyreward.errors import InvalidInputError

Interval = tuple[float, float]
ENTRIES = 4_000_000
"""Largest number of weights (resamples x items) that are held at once."""
BLOCKS = 10_000
"""Of more items, random blocks are resampled together: sums have the same spread, and time does not grow."""


def generator(seed: int | np.random.Generator) -> np.random.Generator:
    """A generator as it is, or a new one from a seed."""
    return seed if isinstance(seed, np.random.Generator) else np.random.default_rng(seed)


def resampled(items: int, resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """How often each item comes in a resample of all, float64 (some resamples, items), in pieces."""
    size = max(1, ENTRIES // max(items, 1))
    for start in range(0, resamples, size):
        yield rng.multinomial(items, np.full(items, 1 / items), size=min(size, resamples - start)).astype(np.float64)


def blocked(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sums (at most `BLOCKS`, K) of rows (items, K) over random blocks of equal size, or the rows if they are few."""
    if len(values) <= BLOCKS:
        return values
    order = rng.permutation(len(values))
    return np.asarray(np.add.reduceat(values[order], np.arange(BLOCKS) * len(values) // BLOCKS))


def bootstrap_ratios(
    tops: np.ndarray,
    bottoms: np.ndarray | None = None,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    rng: np.random.Generator | int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile intervals of shares, ``sum tops / sum bottoms`` in [0, 1], over resamples of the items.

    Where all items agree on 0 or on 1, no resample differs, and the interval is Wilson's.

    Parameters
    ----------
    tops : (items, K)
    bottoms : (items, K), optional
        Default 1 everywhere, which makes the figures means.
    resamples : int >= 1
    level : in (0, 1)

    Returns
    -------
    low, high : float64 (K,)
        NaN where the bottom is 0 in every resample.
    """
    check_resampling(resamples, level)
    random, values = generator(rng), np.asarray(tops, dtype=np.float64)
    weights = np.ones_like(values) if bottoms is None else np.asarray(bottoms, dtype=np.float64)
    both = blocked(np.concatenate([values, weights], axis=1), random)
    draws = []
    for counts in resampled(len(both), resamples, random):
        above, below = np.split(counts @ both, 2, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            draws.append(above / below)
    low, high = percentiles(np.concatenate(draws), level)
    trials, won = weights.sum(axis=0), values.sum(axis=0)
    unanimous = (won == 0) | (won == trials)
    least, most = wilson(won, trials, level)
    return np.where(unanimous & ~np.isnan(low), least, low), np.where(unanimous & ~np.isnan(high), most, high)


def percentiles(draws: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Bounds (K,) that hold the middle share `level` of draws (B, K); what is not finite takes no part."""
    tail = (1 - level) / 2
    known = np.where(np.isfinite(draws), draws, np.nan)
    none = np.isnan(known).all(axis=0)
    low, high = np.nanquantile(np.where(none, 0.0, known), [tail, 1 - tail], axis=0)
    return np.where(none, np.nan, low), np.where(none, np.nan, high)


def wilson(successes: Any, trials: Any, level: float = 0.95) -> tuple[Any, Any]:
    """Wilson's interval of a share, elementwise; (0, 1) where there were no trials."""
    from scipy.special import ndtri

    won, count = np.asarray(successes, dtype=np.float64), np.asarray(trials, dtype=np.float64)
    z = float(ndtri(0.5 + level / 2))
    safe = np.where(count > 0, count, 1.0)
    share = np.clip(won / safe, 0, 1)  # rounding may put it a hair above
    centre = (share + z * z / (2 * safe)) / (1 + z * z / safe)
    reach = z * np.sqrt(share * (1 - share) / safe + z * z / (4 * safe * safe)) / (1 + z * z / safe)
    low = np.where(count > 0, np.clip(centre - reach, 0, 1), 0.0)
    high = np.where(count > 0, np.clip(centre + reach, 0, 1), 1.0)
    return low[()], high[()]


def check_resampling(resamples: int, level: float) -> None:
    """Refuse a number of resamples below 1 and a level outside (0, 1)."""
    if isinstance(resamples, bool) or not isinstance(resamples, int | np.integer) or resamples < 1:
        raise InvalidInputError(f"resamples must be a whole number of at least 1, got {resamples!r}")
    if not 0 < level < 1:
        raise InvalidInputError(f"level must lie between 0 and 1, got {level!r}")


def numbers(values: Any, name: str, ndim: int | None = None) -> np.ndarray:
    """Finite float64 numbers of any array, tensor or list.

    Raises
    ------
    InvalidInputError
        No numbers, another number of dimensions, NaN or infinity; the message names argument and place.
    """
    try:
        array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"{name} must be an array of numbers ({error})") from None
    if ndim is not None and array.ndim != ndim:
        raise InvalidInputError(f"{name} must have {ndim} dimensions, got shape {array.shape}")
    wrong = ~np.isfinite(array)
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise InvalidInputError(f"{name}{list(at)} is {array[at]:g}, expected a finite number")
    return array
