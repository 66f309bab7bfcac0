"""Proximity fields in [0, 1] for points, grids and sequences, 1 at the ideal (SSL, arXiv 2601.22491).

A field is ``field(prediction, target) -> values`` on numpy arrays or tensors. The rewards at the end read predictions
from text and serve as the proximity of a `SweetSpotReward`, or by themselves. A field misleads where closeness does not
mean progress, as with walls in a maze; the verdict always belongs to a verifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from polyreward.errors import InvalidInputError
from polyreward.rewards.answers import check_place, find_answer, numbers_in
from polyreward.rewards.contract import Reward, Sample, finite_numbers
from polyreward.rewards.sweet_spot import ZoneQuantizer, at_first

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GaussianBoxField:
    """``exp(-d^2 / 2)`` with d the distance of a point from a box's centre in units of ``spread`` half-widths.

    Parameters
    ----------
    spread : float > 0
        kappa in the card of arXiv 2601.22491 (its constant is not published): 1 puts the zones inside the box, 2 guides
        from outside.
    """

    spread: float = 1.0

    def __post_init__(self) -> None:
        if not self.spread > 0:
            raise InvalidInputError(f"spread must be positive, got {self.spread}")

    def __call__(self, points: np.ndarray | Tensor, boxes: np.ndarray | Tensor) -> Any:
        """Values of points (..., 2) for boxes (..., 4) given as left, top, right, bottom; shapes broadcast.

        Raises
        ------
        InvalidInputError
            A box without area, or NaN.
        """
        p, b = arrays(points, boxes)
        flat = ~(b[..., 2:] > b[..., :2]).all(-1)
        if bool(flat.any()):
            raise InvalidInputError(f"the box{at_first(flat)} has no area: expected left < right and top < bottom")
        centre, scale = (b[..., :2] + b[..., 2:]) / 2, self.spread * (b[..., 2:] - b[..., :2]) / 2
        squared = (((p - centre) / scale) ** 2).sum(-1)
        if bool((squared != squared).any()):
            raise InvalidInputError(f"NaN in the point{at_first(squared != squared)}")
        # np.exp of a tensor would leave torch; a tensor has its own
        return (-squared / 2).exp() if hasattr(squared, "new_tensor") else np.exp(-squared / 2)


@dataclass(frozen=True)
class BlockMatch:
    """Mean over blocks of a grid of the fraction of cells that match (arXiv 2601.22491: Sudoku, ARC).

    Parameters
    ----------
    block : (rows, columns) of one block; (3, 3) for Sudoku
        The grid's size must be a multiple of it.
    quantizer : ZoneQuantizer or None
        Applied to each block's fraction before the mean, as the paper does for grids with low, medium and high.
    """

    block: tuple[int, int] = (3, 3)
    quantizer: ZoneQuantizer | None = None

    def __post_init__(self) -> None:
        block = finite_numbers(self.block)
        if block is None or len(block) != 2 or not all(size >= 1 and size.is_integer() for size in block):
            raise InvalidInputError(f"block must be two positive whole numbers, got {self.block!r}")
        object.__setattr__(self, "block", (int(block[0]), int(block[1])))

    def blocks(self, prediction: np.ndarray | Tensor, target: np.ndarray | Tensor) -> Any:
        """Fraction of matching cells of each block: grids (..., R, C) -> (..., R / rows, C / columns).

        Raises
        ------
        InvalidInputError
            Grids of different size, or a size that blocks do not tile.
        """
        rows, columns = self.block
        if tuple(prediction.shape[-2:]) != tuple(target.shape[-2:]) or len(prediction.shape) < 2:
            raise InvalidInputError(f"grids of {tuple(prediction.shape)} and {tuple(target.shape)} do not match")
        same: Any = prediction == target
        height, width = same.shape[-2:]
        if height % rows or width % columns:
            raise InvalidInputError(f"blocks of {rows} x {columns} do not tile a grid of {height} x {width}")
        shaped = same.reshape(*same.shape[:-2], height // rows, rows, width // columns, columns)
        return (shaped * 1.0).mean(-1).mean(-2)

    def __call__(self, prediction: np.ndarray | Tensor, target: np.ndarray | Tensor) -> Any:
        """Value in [0, 1] of grids (..., R, C) -> (...)."""
        blocks = self.blocks(prediction, target)
        return (blocks if self.quantizer is None else self.quantizer(blocks)).mean(-1).mean(-1)


@dataclass(frozen=True)
class SequencePrefix:
    """Fraction of the target that the prediction has right before its first mistake (arXiv 2601.22491: mazes, plans).

    The divisor is the target's length, so that a short prediction does not gain; what follows the target's length does
    not count.
    """

    def __call__(
        self, prediction: np.ndarray | Tensor, target: np.ndarray | Tensor, lengths: np.ndarray | Tensor | None = None
    ) -> Any:
        """Value in [0, 1] of sequences (..., T) -> (...).

        Parameters
        ----------
        lengths : int (...,), optional
            Length of each target, when they are padded to T.

        Raises
        ------
        InvalidInputError
            Sequences of different width, an empty target.
        """
        if prediction.shape[-1] != target.shape[-1]:
            raise InvalidInputError(
                f"sequences of {prediction.shape[-1]} and {target.shape[-1]} steps; pad to one width"
            )
        same: Any = (prediction == target) * 1.0
        size = _checked_size(same.shape[-1] if lengths is None else lengths)
        run = same.cumprod(-1)
        if lengths is not None:
            at = np.arange(same.shape[-1])
            inside = (same.new_tensor(at) if hasattr(same, "new_tensor") else at) < lengths[..., None]
            run = run * inside
        return run.sum(-1) / size


def over_target(steps: np.ndarray | Tensor, lengths: np.ndarray | Tensor | int) -> Any:
    """Mean of the proximity of single steps over the target's length (arXiv 2601.22491: the score of a trajectory).

    Steps that a short trajectory lacks count 0, so that it does not gain; steps beyond the target's length are ignored.

    Parameters
    ----------
    steps : (..., T) in [0, 1]
    lengths : int >= 1, or integers (...,)
        Steps of each target.

    Raises
    ------
    InvalidInputError
        An empty target, or NaN.
    """
    size = _checked_size(lengths)
    missing: Any = steps != steps
    if bool(missing.any()):
        raise InvalidInputError(f"NaN in the proximity of the step{at_first(missing)}")
    at: Any = np.arange(steps.shape[-1])
    at = steps.new_tensor(at) if hasattr(steps, "new_tensor") else at
    inside = at < (size if isinstance(size, int) else size[..., None])
    return (steps.clip(0, 1) * inside).sum(-1) / size


@dataclass(frozen=True)
class BoxProximity(Reward):
    """`GaussianBoxField` of the last point in the text, two numbers (arXiv 2601.22491). Range [0, 1].

    Parameters
    ----------
    column : str
        Column of the box (left, top, right, bottom), or of a list of boxes of which the closest counts.
    spread : float
        See `GaussianBoxField`.
    extract : as in `ExactMatch`

    Text without two numbers earns 0.
    """

    column: str = "box"
    spread: float = 1.0
    extract: str = "text"

    def __post_init__(self) -> None:
        check_place(self.extract)
        GaussianBoxField(self.spread)

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of the box."""
        return (self.column,)

    def score(self, sample: Sample) -> float:
        """Value in [0, 1]."""
        boxes = read_numbers(self, sample, self.column, 4)
        point = numbers_from(find_answer(sample.text, self.extract) or "", 2)
        try:
            field = GaussianBoxField(self.spread)(np.zeros(2) if point is None else point, boxes)
        except InvalidInputError as error:
            raise self.refuse(sample, self.column, str(error)) from error
        return 0.0 if point is None else float(field.max())


@dataclass(frozen=True)
class GridProximity(Reward):
    """`BlockMatch` of a grid in the text, one row a line, cells between spaces (arXiv 2601.22491). Range [0, 1].

    Parameters
    ----------
    column : str
        Column of the solution: its text or its rows, or a list of accepted solutions of which the closest counts. Rows
        are lists of cells; a text in a list is a whole solution, so that ``["1 2", "3 4"]`` are two of one row each.
    block : (rows, columns)
    zones : int or None
        Quantise each block into that many zones before the mean.
    extract : as in `ExactMatch`

    Missing rows and cells count as wrong, further ones are ignored.
    """

    column: str = "answer"
    block: tuple[int, int] = (3, 3)
    zones: int | None = None
    extract: str = "text"

    def __post_init__(self) -> None:
        check_place(self.extract)
        quantizer = None if self.zones is None else ZoneQuantizer(self.zones)
        object.__setattr__(self, "_field", BlockMatch(self.block, quantizer))

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of the solution."""
        return (self.column,)

    def score(self, sample: Sample) -> float:
        """Value in [0, 1]."""
        reference = sample.columns[self.column]
        given = _grid(find_answer(sample.text, self.extract) or "")
        accepted = _grids(reference)
        if not accepted:
            raise self.refuse(sample, self.column, "the solution is no rectangular grid")
        return max(self._near(sample, given, wanted) for wanted in accepted)

    def _near(self, sample: Sample, given: list[list[str]], wanted: list[list[str]]) -> float:
        width = len(wanted[0]) if wanted else 0
        if not width or any(len(row) != width for row in wanted):
            raise self.refuse(sample, self.column, "the solution is no rectangular grid")
        filled = np.full((len(wanted), width), "", dtype=object)
        for at, row in enumerate(given[: len(wanted)]):
            filled[at, : len(row)] = row[:width]
        try:
            return float(self._field(filled, np.array(wanted, dtype=object)))  # type: ignore[attr-defined]
        except InvalidInputError as error:
            raise self.refuse(sample, self.column, str(error)) from error


@dataclass(frozen=True)
class SequenceProximity(Reward):
    """`SequencePrefix` of the words of the answer, separated by spaces or commas (arXiv 2601.22491). Range [0, 1].

    The column holds the target as text, or a list of accepted targets, texts or lists of steps, of which the closest
    counts.
    """

    column: str = "answer"
    extract: str = "text"

    def __post_init__(self) -> None:
        check_place(self.extract)

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of the target."""
        return (self.column,)

    def score(self, sample: Sample) -> float:
        """Value in [0, 1]."""
        given = _steps(find_answer(sample.text, self.extract) or "")
        best = 0.0
        for text in _several(sample.columns[self.column]):
            wanted = [str(step) for step in text] if isinstance(text, list | tuple) else _steps(str(text))
            if not wanted:
                raise self.refuse(sample, self.column, "the target has no step")
            padded = np.array([*given, *[""] * len(wanted)][: len(wanted)], dtype=object)
            best = max(best, float(SequencePrefix()(padded, np.array(wanted, dtype=object))))
        return best


def numbers_from(text: str, count: int) -> np.ndarray | None:
    """The last `count` numbers of a text, float64 (count,); None where there are fewer. A comma ends a number."""
    found = [float(number) for number in numbers_in(text, thousands=False)[-count:]]
    return np.array(found) if len(found) == count and np.isfinite(found).all() else None


def read_numbers(reward: Reward, sample: Sample, column: str, width: int) -> np.ndarray:
    """Reference numbers of a row, float64 (M, width), from one list of `width` numbers or a list of such lists."""
    try:
        values = np.atleast_2d(np.asarray(sample.columns[column], dtype=np.float64))
    except (TypeError, ValueError):
        values = np.zeros((0, 0))
    if values.ndim != 2 or values.shape[1] != width or len(values) == 0 or not np.isfinite(values).all():
        raise reward.refuse(sample, column, f"expected {width} numbers, got {sample.columns[column]!r}")
    return values


def arrays(first: Any, second: Any) -> tuple[Any, Any]:
    """Both as tensors where one is a tensor, on its device; else as float64 arrays."""
    if hasattr(first, "new_tensor") or hasattr(second, "new_tensor"):
        import torch

        device = first.device if hasattr(first, "new_tensor") else second.device
        return torch.as_tensor(first, device=device), torch.as_tensor(second, device=device)
    return np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)


def _checked_size(lengths: Any) -> Any:
    empty = lengths < 1
    if bool(empty if isinstance(lengths, int) else empty.any()):
        raise InvalidInputError(f"an empty target{at_first(empty)}")
    return lengths


def _several(reference: Any) -> Sequence[Any]:
    return reference if isinstance(reference, list | tuple) and reference else [reference]


def _grid(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.strip()]


def _grids(reference: Any) -> list[list[list[str]]]:
    """Accepted solutions of a reference: a text, rows of cells, or a list of such."""
    if not isinstance(reference, list | tuple):
        return [_grid(str(reference))]
    if reference and all(isinstance(row, list | tuple) and not _nested(row) for row in reference):
        return [[[str(cell) for cell in row] for row in reference]]
    return [grid for entry in reference for grid in _grids(entry)]


def _nested(row: Sequence[Any]) -> bool:
    return any(isinstance(cell, list | tuple) for cell in row)


def _steps(text: str) -> list[str]:
    return text.replace(",", " ").split()
