r"""Bias fitting: describe how a reward follows length by a curve, then keep the reward uncorrelated with that curve.

    warmup   L = L_preference                                the bias is learned on purpose
    fit      L = -|rho(stopgrad r, f(len))|                  the fitter learns, the reward rests
    debias   L = | |rho(r, stopgrad f(len))| - target | weight + L_preference, in turns of `period` steps with `fit`

`BiasFittingTrainer` runs these phases for any module, `BiasPenalty` inside `PreferenceModel`, with any head and
likelihood; `PosthocDebiaser` corrects the scores of a reward that is done. Zero correlation is an assumption: where the
better answers are the longer ones it takes that away too, so look at `confound_split_accuracy`, or give a target.
Whatever follows length, topic or format, goes with it.

"Bias Fitting to Mitigate Length Bias of Reward Model in RLHF" (FiMi-RM, arXiv 2505.12843). Which network has the first
turn, the pooling of chosen and rejected responses, and `eps` are our reading.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.reward_models.length_bias import pearson, varies
from polyreward.reward_models.likelihoods import bradley_terry_loss

Phase = Literal["warmup", "fit", "debias"]
PHASES: tuple[Phase, ...] = ("warmup", "fit", "debias")


def fitting_loss(scores: Tensor, fitted: Tensor, eps: float = 1e-8) -> Tensor:
    """``-|rho(stopgrad scores, fitted)|``, of (N,) each."""
    return -pearson(scores.detach(), fitted, eps).abs()


def decorrelation_loss(scores: Tensor, fitted: Tensor, target: float = 0.0, eps: float = 1e-8) -> Tensor:
    """``| |rho(scores, stopgrad fitted)| - target |``, of (N,) each; at correlation 0 it has no gradient."""
    return (pearson(scores, fitted.detach(), eps).abs() - target).abs()


def length_penalty(rewards: Any, lengths: Any, alpha: float) -> Any:
    """``r - alpha len``, the simplest correction."""
    return rewards - alpha * lengths


class BiasFittingTrainer:
    """The three phases for a reward model that is any module (arXiv 2505.12843).

    Set `phase` to go on to the next; `step` takes one optimiser step, `run` whole phases.

    Parameters
    ----------
    reward_model : module from a batch of inputs to scores (B,) or (B, 1)
        A mapping is passed as keyword arguments; what has ``logits`` gives those.
    fitter : module or function of (N,) to (N,)
        `BiasFitter`, or `identity_fitter` for what is linear; one without weights makes no steps of its own.
    attribute_fn : function of a batch of inputs to the attribute, (B,)
        Such as the number of the reward model's own tokens, the prompt's not counted.
    period : int or None
        Steps of a turn in "debias", which begins with the fitter's. None leaves the fitter as "fit" left it.
    weight : float >= 0
        Of the correlation.
    target : float in [0, 1)
        The correlation that may stay.
    learning_rate, fitter_learning_rate, weight_decay : float
        Of AdamW, where no optimiser is given; the paper gives no rates.
    optimizer, fitter_optimizer : torch optimisers, optional
    gather : function of (N,) to the values of all devices, optional
        With gradient for this device's own: correlations are of the global batch in the paper.
    eps : float

    Attributes
    ----------
    steps, phase_steps : int
        Steps in all, and in this phase.
    degenerate : int
        Batches in which rewards or attributes did not vary: their correlation counts as 0.
    """

    def __init__(
        self,
        reward_model: nn.Module,
        fitter: Any,
        attribute_fn: Callable[[Any], Any],
        period: int | None = 8,
        weight: float = 1.0,
        *,
        target: float = 0.0,
        learning_rate: float = 1e-3,
        fitter_learning_rate: float = 3e-3,
        weight_decay: float = 0.01,
        optimizer: torch.optim.Optimizer | None = None,
        fitter_optimizer: torch.optim.Optimizer | None = None,
        gather: Callable[[Tensor], Tensor] | None = None,
        eps: float = 1e-8,
    ) -> None:
        check_settings(period, weight, target)
        self.reward_model, self.fitter, self.attribute_fn = reward_model, fitter, attribute_fn
        self.period, self.weight, self.target, self.eps = period, weight, target, eps
        self.gather = gather if gather is not None else _same
        self.optimizer = optimizer or torch.optim.AdamW(
            reward_model.parameters(), lr=learning_rate, weight_decay=weight_decay
        )
        self.fitter_optimizer = fitter_optimizer
        if fitter_optimizer is None and learns(fitter):
            self.fitter_optimizer = torch.optim.AdamW(
                fitter.parameters(), lr=fitter_learning_rate, weight_decay=weight_decay
            )
        self.steps, self.phase_steps, self.degenerate = 0, 0, 0
        self._phase: Phase = "warmup"

    @property
    def phase(self) -> Phase:
        """Which of "warmup", "fit" and "debias" it is; setting another one begins it."""
        return self._phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        if phase not in PHASES:
            raise UnknownNameError(f"unknown phase {phase!r}{nearest(str(phase), PHASES)}")
        if phase != self._phase:
            self._phase, self.phase_steps = phase, 0

    @property
    def turn(self) -> Literal["reward", "fitter"]:
        """Whose step is next."""
        return turn_of(self._phase, self.phase_steps, self.period if learns(self.fitter) else None)

    def step(self, chosen: Any, rejected: Any) -> dict[str, float]:
        """One optimiser step on a batch of pairs.

        Returns
        -------
        ``loss``, ``nll`` and ``accuracy`` of the preferences, ``correlation`` of rewards and fitted curve

        Raises
        ------
        InvalidInputError
            Scores or attributes of another shape, NaN or infinite; numbers of chosen and rejected that differ.
        """
        turn = self.turn
        if turn == "fitter" and self.fitter_optimizer is None:
            raise InvalidInputError("the fitter has no weights to fit; go on to the phase 'debias'")
        on_reward, on_fitter = turn == "reward", turn == "fitter"
        with _still(self.reward_model, on_reward), torch.set_grad_enabled(on_reward):
            won, lost = self._scores(chosen), self._scores(rejected)
        if won.shape != lost.shape:
            raise InvalidInputError(f"{len(won)} chosen and {len(lost)} rejected responses")
        scores = self.gather(torch.cat([won, lost]))
        attributes = self.gather(
            torch.cat([self._attributes(chosen, won, "chosen"), self._attributes(rejected, lost, "rejected")])
        )
        with _still(self.fitter, on_fitter), torch.set_grad_enabled(on_fitter):
            fitted = self.fitter(attributes)
        nll = bradley_terry_loss(won - lost)
        if on_fitter:
            loss = fitting_loss(scores, fitted, self.eps)
        elif self._phase == "debias":
            loss = nll + self.weight * decorrelation_loss(scores, fitted, self.target, self.eps)
        else:
            loss = nll
        optimizer: Any = self.fitter_optimizer if on_fitter else self.optimizer
        optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
            optimizer.step()
        self.degenerate += not (varies(scores) and varies(attributes))
        self.steps, self.phase_steps = self.steps + 1, self.phase_steps + 1
        difference = (won - lost).detach()
        return {
            "loss": float(loss.detach()),
            "nll": float(nll.detach()),
            "accuracy": float(((difference > 0).float() + 0.5 * (difference == 0).float()).mean()),
            "correlation": float(pearson(scores.detach(), fitted.detach(), self.eps)),
        }

    def run(
        self,
        batches: Iterable[tuple[Any, Any]],
        warmup: int,
        fit: int,
        debias: int,
        progress: Callable[[Phase, int, Mapping[str, float]], None] | None = None,
    ) -> list[dict[str, float]]:
        """Whole phases of so many steps each, from where the trainer is; returns the figures of each step.

        Parameters
        ----------
        batches : (chosen, rejected) each
            A trainer that goes on takes from the first; skip `steps` of them to go on where it stopped.
        progress : function of phase, steps in it and figures, optional

        Raises
        ------
        InvalidInputError
            The batches end before the phases.
        """
        source, found = iter(batches), []
        for phase, count in list(zip(PHASES, (warmup, fit, debias), strict=True))[PHASES.index(self._phase) :]:
            self.phase = phase
            while self.phase_steps < count:
                try:
                    chosen, rejected = next(source)
                except StopIteration:
                    raise InvalidInputError(
                        f"the batches end after {self.phase_steps} of {count} steps of the phase {phase!r}"
                    ) from None
                found.append(self.step(chosen, rejected))
                if progress is not None:
                    progress(self._phase, self.phase_steps, found[-1])
        return found

    def state_dict(self) -> dict[str, Any]:
        """Phase, counters, both networks and both optimisers; plain data and tensors."""
        state = {
            "phase": self._phase,
            "steps": self.steps,
            "phase_steps": self.phase_steps,
            "degenerate": self.degenerate,
            "reward_model": self.reward_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if isinstance(self.fitter, nn.Module):
            state["fitter"] = self.fitter.state_dict()
        if self.fitter_optimizer is not None:
            state["fitter_optimizer"] = self.fitter_optimizer.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.phase = state["phase"]
        self.steps, self.phase_steps, self.degenerate = state["steps"], state["phase_steps"], state["degenerate"]
        for name in ("reward_model", "optimizer", "fitter", "fitter_optimizer"):
            if (name in state) != hasattr(getattr(self, name), "load_state_dict"):
                raise InvalidInputError(f"the state {'has a' if name in state else 'lacks the'} {name!r}: other parts")
            if name in state:
                getattr(self, name).load_state_dict(state[name])

    def _scores(self, inputs: Any) -> Tensor:
        found = self.reward_model(**inputs) if isinstance(inputs, Mapping) else self.reward_model(inputs)
        scores: Tensor = getattr(found, "logits", found)
        scores = scores.squeeze(-1) if scores.ndim == 2 and scores.shape[1] == 1 else scores
        if scores.ndim != 1:
            raise InvalidInputError(f"the reward model gave scores of shape {tuple(scores.shape)}, expected (batch,)")
        return scores

    def _attributes(self, inputs: Any, scores: Tensor, name: str) -> Tensor:
        found = torch.as_tensor(self.attribute_fn(inputs), device=scores.device).float()
        if found.shape != scores.shape:
            raise InvalidInputError(
                f"attribute_fn gave shape {tuple(found.shape)} for {len(scores)} {name} responses, expected one each"
            )
        return found.detach()


class PosthocDebiaser:
    """Scores less what a straight line in ``f(len)`` explains: ``r - b f(len)``, b by least squares with a constant.

    Our cheap variant of arXiv 2505.12843. With `identity_fitter` it is the linear regression on length.

    Parameters
    ----------
    fitter : module or function of (N,) to (N,)

    Attributes
    ----------
    slope : float
        b.
    """

    def __init__(self, fitter: Any) -> None:
        self.fitter, self.slope = fitter, math.nan

    def fit(
        self,
        rewards: Any,
        attributes: Any,
        steps: int = 0,
        batch_size: int = 256,
        learning_rate: float = 3e-3,
        generator: torch.Generator | None = None,
    ) -> PosthocDebiaser:
        """Find b, after `steps` steps of the fitter's own; return self. Where ``f`` does not vary, b is 0.

        Raises
        ------
        InvalidInputError
            Shapes that differ; NaN or infinite values; steps of a fitter without weights.
        """
        r, a = (
            torch.as_tensor(np.asarray(v) if not isinstance(v, Tensor) else v).detach() for v in (rewards, attributes)
        )
        if r.ndim != 1 or r.shape != a.shape or not len(r):
            raise InvalidInputError(f"PosthocDebiaser needs (N,) of both, got {tuple(r.shape)} and {tuple(a.shape)}")
        if steps:
            fit_curve(self.fitter, r, a, steps, batch_size, learning_rate, generator)
        wide, fitted = r.double(), self._curve(a).double()
        pearson(wide, fitted)  # refuses what is not finite
        centred = fitted - fitted.mean()
        self.slope = float((centred @ (wide - wide.mean())) / centred.square().sum()) if varies(fitted) else 0.0
        return self

    def __call__(self, rewards: Any, attributes: Any) -> Any:
        """Corrected scores, (N,) in the type, dtype and device of `rewards`; `InvalidInputError` before `fit`."""
        if math.isnan(self.slope):
            raise InvalidInputError("the debiaser has not been fitted; call fit(rewards, attributes) first")
        if isinstance(rewards, Tensor):
            curve = self._curve(torch.as_tensor(attributes, device=rewards.device))
            return (rewards - self.slope * curve.to(torch.promote_types(rewards.dtype, torch.float32))).to(
                rewards.dtype
            )
        curve = self._curve(torch.as_tensor(np.asarray(attributes)))
        return np.asarray(rewards) - self.slope * curve.double().numpy()

    @torch.no_grad()
    def _curve(self, attributes: Tensor) -> Tensor:
        with _still(self.fitter, False):
            found: Tensor = self.fitter(attributes)
        return found


def fit_curve(
    fitter: nn.Module,
    rewards: Tensor,
    attributes: Tensor,
    steps: int,
    batch_size: int = 256,
    learning_rate: float = 3e-3,
    generator: torch.Generator | None = None,
) -> None:
    """Steps of AdamW on `fitting_loss`, on random batches of given rewards and attributes, (N,) each."""
    if not learns(fitter):
        raise InvalidInputError("the fitter has no weights to fit")
    optimizer = torch.optim.AdamW(fitter.parameters(), lr=learning_rate)
    with _still(fitter, True):
        for _ in range(steps):
            rows = torch.randint(len(rewards), (min(batch_size, len(rewards)),), generator=generator)
            rows = rows.to(rewards.device)
            optimizer.zero_grad()
            fitting_loss(rewards[rows], fitter(attributes[rows])).backward()
            optimizer.step()


def turn_of(phase: Phase, phase_steps: int, period: int | None) -> Literal["reward", "fitter"]:
    """Whose step comes after `phase_steps` steps of a phase; in "debias" the fitter has the first `period`."""
    if phase == "fit":
        return "fitter"
    alternates = phase == "debias" and period is not None
    return "fitter" if alternates and (phase_steps // (period or 1)) % 2 == 0 else "reward"


def learns(fitter: Any) -> bool:
    """Whether a fitter has weights."""
    return isinstance(fitter, nn.Module) and any(p.requires_grad for p in fitter.parameters())


def check_settings(period: int | None, weight: float, target: float) -> None:
    """Refuse a period below 1, a negative weight, or a target outside [0, 1)."""
    if period is not None and (not isinstance(period, int) or period < 1):
        raise InvalidInputError(f"period must be a whole number of at least 1, or None, got {period!r}")
    if not 0 <= weight < math.inf or not 0 <= target < 1:
        raise InvalidInputError(f"weight must be at least 0 and target in [0, 1), got {weight} and {target}")


def _same(values: Tensor) -> Tensor:
    return values


@contextmanager
def _still(module: Any, training: bool) -> Iterator[None]:
    """Train mode for the network whose turn it is, evaluation mode for the other: its buffers must rest too."""
    if not isinstance(module, nn.Module):
        yield
        return
    before = [(part, part.training) for part in module.modules()]
    if not training:
        module.eval()
    try:
        yield
    finally:
        for part, mode in before:
            part.training = mode
