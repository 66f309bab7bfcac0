"""A reward beside the trusted one over the steps: trends of their means, and how they go together inside groups."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from polyreward.audit.diagnose.estimates import Estimate, Figure, jackknife
from polyreward.audit.diagnose.evidence import Evidence

WINDOWS = 12


class Pair:
    """Group sums of a proxy and the trusted reward.

    Parameters
    ----------
    evidence : Evidence
        A log with steps.
    proxy, trusted : float64 (N,)
        0 where not valid.
    valid : bool (N,)
        Rows to which both apply.
    """

    def __init__(self, evidence: Evidence, proxy: np.ndarray, trusted: np.ndarray, valid: np.ndarray) -> None:
        assert evidence.steps is not None
        assert evidence.thirds is not None
        self.evidence, self.steps, self.thirds = evidence, evidence.steps, evidence.thirds
        self.count = evidence.sum(valid)
        self.sums = {"proxy": evidence.sum(proxy), "trusted": evidence.sum(trusted)}
        self.deviation = {"proxy": _deviation(proxy[valid]), "trusted": _deviation(trusted[valid])}
        first, second = evidence.center(proxy, valid), evidence.center(trusted, valid)
        self.moments = np.stack(
            [evidence.sum(first * second), evidence.sum(first**2), evidence.sum(second**2), self.count], 1
        )

    def trend(self, which: str, second_half: bool = False) -> Estimate:
        """Change of the means of ``"proxy"``, ``"trusted"`` or their ``"difference"`` over the steps.

        The slope of a line, in deviations of a sample. The line has a level for each task, so that a changing mix of
        tasks is no trend, and is fitted anew without each step.
        """
        evidence = self.evidence
        if not min(self.deviation.values()):
            return Estimate(float("nan"), float("nan"), 0)
        use = self.count > 0
        if second_half:
            use &= self.steps >= np.median(np.unique(self.steps))
        means = {name: sums / np.maximum(self.count, 1) / self.deviation[name] for name, sums in self.sums.items()}
        y = (means["proxy"] - means["trusted"] if which == "difference" else means[which])[use]
        x, (codes, tasks) = self.steps[use], evidence.tasks or (np.zeros(evidence.groups, dtype=np.int64), ["all"])
        reach = float(np.ptp(x)) if len(x) else 0.0
        if not reach:
            return Estimate(float("nan"), float("nan"), 0)
        # from 0 to 1 over the steps, so that the slope is the change from the first to the last
        x = (x - x.min()) / reach
        _, block = np.unique(evidence.step_block[use], return_inverse=True)
        shape = (int(block.max()) + 1, len(tasks))
        cell = block * shape[1] + codes[use]
        columns = (np.ones_like(x), x, y, x * y, x * x)
        sums = np.stack([np.bincount(cell, column, shape[0] * shape[1]).reshape(shape) for column in columns], 2)

        def slope(s: np.ndarray) -> np.ndarray:
            n, sx, sy, sxy, sxx = np.moveaxis(s.reshape(*s.shape[:-1], shape[1], 5), -1, 0)
            n = np.maximum(n, 1)
            return (sxy - sx * sy / n).sum(-1) / (sxx - sx**2 / n).sum(-1)

        estimate = jackknife(sums.reshape(shape[0], -1), slope)
        # steps in the middle say little about a slope: count the blocks by what they weigh
        weight = np.bincount(block, (x - x.mean()) ** 2)
        freedom = weight.sum() ** 2 / (weight**2).sum() - 1
        return Estimate(estimate.value, estimate.error, min(estimate.freedom, freedom))

    def gain(self, which: str) -> Estimate:
        """Difference of the means of the last and first third, in deviations of a sample."""
        return self._thirds(lambda s: self._difference(s, which))

    def promised(self) -> Estimate:
        """Gain of the trusted reward that the gain of the proxy promises by their early slope inside groups."""
        return self._thirds(self._promise)

    def gap(self) -> Estimate:
        """The promise less the gain of the trusted reward."""
        return self._thirds(lambda s: self._promise(s) - self._difference(s, "trusted"))

    def keeps(self, share: float) -> bool:
        """Whether `share` of the early variance inside groups is left in the proxy, and half that in the trusted."""
        return self.coupling["proxy"].value > share and self.coupling["trusted"].value > share / 2

    @cached_property
    def coupling(self) -> dict[str, Estimate]:
        """Correlation inside groups early, late, its drop; relative drop of the slope; shares of variance left."""
        first, last = self.thirds
        both = np.concatenate([self.moments * first[:, None], self.moments * last[:, None]], 1)
        figures = {
            "early": lambda s: s[..., 0] / np.sqrt(s[..., 1] * s[..., 2]),
            "late": lambda s: s[..., 4] / np.sqrt(s[..., 5] * s[..., 6]),
            "drop": lambda s: s[..., 0] / np.sqrt(s[..., 1] * s[..., 2]) - s[..., 4] / np.sqrt(s[..., 5] * s[..., 6]),
            "slope": lambda s: 1 - (s[..., 4] / s[..., 6]) / (s[..., 0] / s[..., 2]),
            "proxy": lambda s: (s[..., 5] / s[..., 7]) / (s[..., 1] / s[..., 3]),
            "trusted": lambda s: (s[..., 6] / s[..., 7]) / (s[..., 2] / s[..., 3]),
        }
        return {name: self.evidence.estimate(both, figure, first | last) for name, figure in figures.items()}

    def windows(self) -> list[tuple[float, float, float, float | None]]:
        """Step, means and correlation inside groups in about a dozen stretches of steps."""
        distinct = np.unique(self.steps)
        window = np.searchsorted(distinct, self.steps) * min(WINDOWS, len(distinct)) // len(distinct)
        number = int(window.max()) + 1
        columns = (*self.moments.T, self.sums["proxy"], self.sums["trusted"])
        product, first, second, samples, total, trusted = (np.bincount(window, column, number) for column in columns)
        step = np.bincount(window, self.steps, number) / np.maximum(np.bincount(window, minlength=number), 1)
        rows: list[tuple[float, float, float, float | None]] = []
        for w in np.flatnonzero(samples):
            both = float(np.sqrt(first[w] * second[w]))
            coupled = float(product[w] / both) if both > 0 else None
            rows.append((float(step[w]), float(total[w] / samples[w]), float(trusted[w] / samples[w]), coupled))
        return rows

    def _thirds(self, figure: Figure) -> Estimate:
        first, last = self.thirds
        # task levels are taken out, so that a changing mix of tasks is no gain
        columns = [self.count, self._level("proxy"), self._level("trusted"), self.moments[:, 0], self.moments[:, 1]]
        table = np.stack(columns, 1)
        both = np.concatenate([table * first[:, None], table * last[:, None]], 1)
        return self.evidence.estimate(both, figure, first | last, by_step=True)

    def _level(self, which: str) -> np.ndarray:
        """Sums of each group less the mean of its task, (groups,)."""
        codes = self.evidence.tasks[0] if self.evidence.tasks else np.zeros(self.evidence.groups, dtype=np.int64)
        mean = np.bincount(codes, self.sums[which]) / np.maximum(np.bincount(codes, self.count), 1)
        return self.sums[which] - mean[codes] * self.count

    def _difference(self, s: np.ndarray, which: str) -> np.ndarray:
        column = {"proxy": 1, "trusted": 2}[which]
        late, early = s[..., 5 + column] / s[..., 5], s[..., column] / s[..., 0]
        return (late - early) / self.deviation[which]

    def _promise(self, s: np.ndarray) -> np.ndarray:
        slope = s[..., 3] / s[..., 4] * self.deviation["proxy"] / self.deviation["trusted"]
        return slope * self._difference(s, "proxy")


def _deviation(values: np.ndarray) -> float:
    """Standard deviation; exactly 0 where the values differ by rounding only."""
    deviation = float(values.std())
    return deviation if deviation > 1e-9 * float(np.abs(values).max()) else 0.0
