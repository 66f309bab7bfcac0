"""Near-miss grounding: one element a screen, and a policy that proposes boxes around a wrong place.

The verifier is exact: does the centre of the box lie in the element? The policy of each element is a diagonal normal
over centre and logarithms of width and height, whose mean starts a multiple of the element's size away from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polyreward.errors import InvalidInputError

SCREEN = 1000.0
SMALLEST, LARGEST = 0.02, 0.25
CENTER_SPREAD, SIZE_SPREAD, SIZE_ERROR = 0.25, 0.2, 0.3


@dataclass(frozen=True)
class NearMiss:
    """Elements and the policy at the start, all float64 (E, 4).

    Attributes
    ----------
    targets : left, top, right, bottom in pixels
    start : mean of the policy over centre x, centre y, log width, log height
    std : its deviation, a quarter of the element for the centre and 0.2 for the logarithms
    """

    targets: np.ndarray
    start: np.ndarray
    std: np.ndarray


def near_miss(rng: np.random.Generator, elements: int = 400, offset: float = 2.0) -> NearMiss:
    """Elements of log-uniform width and height, 2 % to 25 % of a screen of 1000 pixels, at uniform places.

    Parameters
    ----------
    offset : float >= 0
        The mean starts ``offset * U(0.2, 1.8)`` element sizes from the centre in a random direction: 2 gives a hit rate
        of about 5 %, 1 of about 24 %. The logarithms of the sizes start with an error of deviation 0.3.
    """
    if elements < 1 or not offset >= 0:
        raise InvalidInputError(f"near_miss needs elements >= 1 and offset >= 0, got {elements}, {offset}")
    size = SCREEN * np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST), (elements, 2)))
    center = rng.uniform(size / 2, SCREEN - size / 2)
    angle, distance = rng.uniform(0, 2 * np.pi, elements), offset * rng.uniform(0.2, 1.8, elements)
    away = distance[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1) * size
    logs = np.log(size)
    return NearMiss(
        np.concatenate([center - size / 2, center + size / 2], axis=1),
        np.concatenate([center + away, logs + SIZE_ERROR * rng.normal(size=(elements, 2))], axis=1),
        np.concatenate([CENTER_SPREAD * size, np.full((elements, 2), SIZE_SPREAD)], axis=1),
    )


def boxes_of(parameters: np.ndarray) -> np.ndarray:
    """Boxes (..., 4) of centre x, centre y, log width, log height (..., 4)."""
    half = np.exp(parameters[..., 2:]) / 2
    return np.concatenate([parameters[..., :2] - half, parameters[..., :2] + half], axis=-1)


def hit_rate(mean: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Share of elements that the mean of the policy hits: (..., E, 4) and (E, 4) -> (...)."""
    center = mean[..., :2]
    inside = (targets[:, :2] <= center) & (center <= targets[:, 2:])
    return np.asarray(inside.all(axis=-1).mean(axis=-1))
