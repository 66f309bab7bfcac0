"""MetaRM: a reward model that goes on telling responses apart when the policy has moved.

The current policy's responses have no labels. Their rewards should still differ, so the labelled pairs are learned at
weights that a step of ascent on the difference of those rewards has reached:

    J(theta)  = mean over prompts of (2 / k^2) sum_{i<j} sigma(|r(s_i) - r(s_j)|)
    theta'    = theta + eta grad J(theta)          L(theta') ~ L(theta) + eta grad L . grad J
    theta    <- theta - alpha grad L(theta')       first order: the gradient is taken at theta'

`MetaRMStep` is one such step of any module, `continue_with_shift` the fit of a `PreferenceModel`.

Papers: MetaRM: Shifted Distributions Alignment via Meta-Learning (arXiv 2405.00438); Secrets of RLHF in Large Language
Models Part II: Reward Modeling (arXiv 2401.06080).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from polyreward.errors import InvalidInputError
from polyreward.preferences import PreferenceData
from polyreward.reward_models.encoders import look_up
from polyreward.reward_models.heads import Items, Scores, run_head
from polyreward.reward_models.likelihoods import bradley_terry_loss
from polyreward.reward_models.model import PreferenceModel

Call = Callable[..., Tensor]


def difference_score(rewards: Tensor, noise: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
    """How far apart the rewards of each prompt's responses are (arXiv 2405.00438).

    Parameters
    ----------
    rewards : float (P, k), or (k,) for one prompt
    noise : float >= 0
        Deviation of noise on the rewards: equal rewards have gradient 0 and would never part.
    generator : torch.Generator, optional
        Of the noise.

    Returns
    -------
    scalar, from (k - 1) / (2k), all equal, to below (k - 1) / k; 0 for one response a prompt

    Raises
    ------
    InvalidInputError
        A wrong shape, no rewards, or rewards that are NaN.
    """
    rewards = rewards.unsqueeze(0) if rewards.ndim == 1 else rewards
    if rewards.ndim != 2 or not rewards.numel():
        raise InvalidInputError(f"rewards must have shape (prompts, responses), got {tuple(rewards.shape)}")
    if bool(torch.isnan(rewards).any()):
        raise InvalidInputError(f"the rewards of prompt {int(torch.isnan(rewards).any(1).int().argmax())} are NaN")
    work = rewards if rewards.dtype in (torch.float32, torch.float64) else rewards.float()
    if noise:
        work = work + noise * torch.randn(work.shape, generator=generator, dtype=work.dtype, device=work.device)
    count = work.shape[1]
    first, second = torch.triu_indices(count, count, 1, device=work.device)
    apart = torch.sigmoid((work[:, first] - work[:, second]).abs())
    return (apart.sum(dim=1) * (2 / count**2)).mean()


def pairwise_loss(reward: Call, batch: Any) -> Tensor:
    """Bradley-Terry of ``(chosen, rejected)``, with target and margin where the batch has four parts."""
    chosen, rejected, *rest = batch
    return bradley_terry_loss(reward(chosen) - reward(rejected), *rest)


class MetaRMStep:
    """One step of MetaRM (arXiv 2405.00438).

    Parameters
    ----------
    model : nn.Module
        From inputs to rewards; from what `unlabelled` holds to (P, k).
    eta : float >= 0
        Step of ascent; 0 is a plain step.
    difference_score : function of rewards (P, k) -> scalar
    optimizer : torch optimiser of the model's weights, optional
        Default SGD, which is the rule as it stands; its state and the weights are all the state there is.
    alpha : float > 0
        Learning rate of the default optimiser.
    loss : function of (reward, batch) -> scalar, default `pairwise_loss`
        `reward` is the model at the ascended weights.
    """

    def __init__(
        self,
        model: nn.Module,
        eta: float = 1.0,
        difference_score: Callable[[Tensor], Tensor] = difference_score,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        alpha: float = 1e-3,
        loss: Callable[[Call, Any], Tensor] = pairwise_loss,
    ) -> None:
        _check_eta(eta)
        self.model, self.eta, self.difference_score, self.loss = model, eta, difference_score, loss
        self.optimizer = torch.optim.SGD(model.parameters(), lr=alpha) if optimizer is None else optimizer

    def ascended(self, unlabelled: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Weights theta' without graph, and J at theta."""
        learns = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return _ascend(
            learns, lambda weights: self.difference_score(functional_call(self.model, weights, (unlabelled,))), self.eta
        )

    def __call__(self, batch: Any, unlabelled: Any) -> dict[str, float]:
        """Take the step; ``loss`` at theta', ``difference`` J at theta.

        Parameters
        ----------
        batch : what `loss` takes, of labelled pairs
        unlabelled : responses of the current policy, k for each prompt
        """
        raised, difference = self.ascended(unlabelled)
        weights = {name: value.requires_grad_() for name, value in raised.items()}
        loss = self.loss(lambda *inputs: functional_call(self.model, weights, inputs), batch)
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        self.optimizer.zero_grad()
        named = dict(self.model.named_parameters())
        for name, gradient in zip(weights, gradients, strict=True):
            named[name].grad = gradient
        self.optimizer.step()
        return {"loss": float(loss.detach()), "difference": float(difference)}


class MetaHead(nn.Module):
    """A head that in training is read at ascended weights, so that any fit of it is MetaRM's.

    Parameters
    ----------
    head : head
    score : function of `Scores` -> (R,), the likelihood's
    features : float32 (P, k, d)
        Of the unlabelled responses.
    prompt : float32 (P, p), optional
    eta, noise, batch : as of `continue_with_shift`
    """

    def __init__(
        self,
        head: nn.Module,
        score: Callable[[Scores], Tensor],
        features: Tensor,
        prompt: Tensor | None = None,
        *,
        eta: float,
        noise: float,
        batch: int,
    ) -> None:
        super().__init__()
        self.inner, self.eta, self.noise, self.batch = head, eta, noise, batch
        self.rewards_of = score
        self.uses_prompt = bool(getattr(head, "uses_prompt", False))
        self.register_buffer("features", features, persistent=False)
        self.register_buffer("prompt", prompt, persistent=False)

    def forward(self, items: Items) -> Tensor | Scores:
        """What the head says, in training at the ascended weights; gradients go to the weights themselves."""
        if not self.training:
            found: Tensor | Scores = self.inner(items)
            return found
        learns = {name: p for name, p in self.inner.named_parameters() if p.requires_grad}
        shifted, shape = self._draw()

        def objective(weights: dict[str, Tensor]) -> Tensor:
            scores = run_head(_At(self.inner, weights), shifted)  # type: ignore[arg-type]
            return difference_score(self.rewards_of(scores).view(shape), self.noise)

        raised, _ = _ascend(learns, objective, self.eta)
        moved = {name: p + (raised[name] - p.detach()) for name, p in learns.items()}
        read: Tensor | Scores = functional_call(self.inner, moved, (items,))
        return read

    def _draw(self) -> tuple[Items, tuple[int, int]]:
        """Responses of some prompts, by torch's generator, which a fit seeds."""
        features: Any = self.features
        prompts, count, width = features.shape
        at = torch.randperm(prompts)[: self.batch].to(features.device)
        owner = torch.arange(len(at), device=features.device).repeat_interleave(count)
        prompt: Any = self.prompt
        items = Items(
            features[at].reshape(-1, width),
            torch.full_like(owner, -1),
            owner,
            None if prompt is None else prompt[at][owner],
        )
        return items, (len(at), count)

    def prepare(self, table: Any, features: Any) -> None:
        """As of the head."""
        own: Any = getattr(self.inner, "prepare", None)
        if own is not None:
            own(table, features)

    def step(self, share: float) -> None:
        """As of the head."""
        own: Any = getattr(self.inner, "step", None)
        if own is not None:
            own(share)

    def parameter_groups(self) -> Iterable[dict[str, Any]]:
        """As of the head; one group where it has none."""
        own: Any = getattr(self.inner, "parameter_groups", None)
        if own is not None:
            return list(own())
        return [{"params": [p for p in self.inner.parameters() if p.requires_grad]}]


def continue_with_shift(
    model: PreferenceModel,
    preferences: PreferenceData,
    unlabelled: PreferenceData,
    *,
    eta: float = 1.0,
    noise: float = 1e-3,
    prompts_per_step: int = 64,
    **options: Any,
) -> PreferenceModel:
    """Go on fitting a model to the same preferences, with responses of the current policy (MetaRM, arXiv 2405.00438).

    Parameters
    ----------
    model : fitted PreferenceModel
        Its head goes on in place of a new one; the encoder must not learn.
    preferences : PreferenceData
        The original, labelled pairs.
    unlabelled : PreferenceData
        For each prompt k responses of the current policy, the same k for all; labels are not read. Prompts whose
        responses are all the same are dropped with a warning.
    eta : float >= 0
        Step of ascent.
    noise : float >= 0
        As of `difference_score`, for responses that come twice.
    prompts_per_step : int
        Prompts that a step draws.
    options : as of the model's ``fit``

    Returns
    -------
    PreferenceModel
        A new one; `model` is left as it is.

    Raises
    ------
    InvalidInputError
        A model that has not been fitted or whose encoder learns (use `MetaRMStep`), LBFGS, numbers of responses that
        differ, no prompt with two different responses.
    """
    _check_eta(eta)
    if model.head is None:
        raise InvalidInputError("the model has not been fitted; call fit(preferences) first")
    if model.learns_encoder:
        raise InvalidInputError("continue_with_shift is for encoders that do not learn; take MetaRMStep for others")
    if options.get("optimizer") == "lbfgs":
        raise InvalidInputError("MetaRM takes a gradient at other weights than it changes, which LBFGS cannot use")
    if not isinstance(prompts_per_step, int) or prompts_per_step < 1:
        raise InvalidInputError(f"prompts_per_step must be a whole number of at least 1, got {prompts_per_step!r}")
    data = unlabelled.without_identical("drop")
    sizes = np.unique(data.sizes)
    if len(sizes) != 1:
        raise InvalidInputError(
            f"{unlabelled.source}: expected the same number of responses for every prompt, and prompts with different "
            f"responses; found {sizes.tolist()}"
        )
    prompts = data.of_responses(data.prompts)
    features = torch.from_numpy(look_up(model.encoder, prompts, data.responses).array())
    if not bool(torch.isfinite(features).all()):
        row = int((~torch.isfinite(features).all(1)).int().argmax())
        raise InvalidInputError(f"{data.where(int(data.owner[row]))}: the features of a response are NaN or infinite")
    prompt = None
    if getattr(model.head, "uses_prompt", False):
        prompt = torch.from_numpy(np.asarray(model.encoder.encode_prompts(data.prompts), dtype=np.float32))
    head, likelihood = copy.deepcopy(model.head), copy.deepcopy(model.likelihood)
    meta = MetaHead(
        head, likelihood.score, features.view(len(data), int(sizes[0]), -1), prompt,
        eta=eta, noise=noise, batch=prompts_per_step,
    )  # fmt: skip
    fitted = PreferenceModel(model.encoder, meta, likelihood, copy.deepcopy(model.penalties))
    fitted.fit(preferences, **options)
    result = PreferenceModel(model.encoder, head.eval(), likelihood, fitted.penalties)
    result.annotators, result.history = fitted.annotators, fitted.history
    return result


class _At:
    """A module at given weights."""

    def __init__(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self.module, self.weights = module, dict(weights)

    def __call__(self, items: Items) -> Any:
        return functional_call(self.module, self.weights, (items,))


def _ascend(
    learns: Mapping[str, Tensor], objective: Callable[[dict[str, Tensor]], Tensor], eta: float
) -> tuple[dict[str, Tensor], Tensor]:
    start = {name: value.detach().requires_grad_() for name, value in learns.items()}
    with torch.enable_grad():
        score = objective(start)
        gradients = torch.autograd.grad(score, list(start.values()), allow_unused=True)
    raised = {
        name: value.detach() if gradient is None else value.detach() + eta * gradient
        for (name, value), gradient in zip(start.items(), gradients, strict=True)
    }
    return raised, score.detach()


def _check_eta(eta: float) -> None:
    if not 0 <= eta < float("inf"):
        raise InvalidInputError(f"eta must be a finite number from 0, got {eta}")
