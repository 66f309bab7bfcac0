"""Context-aware routing: tune which head of a mixture serves a context, from few labelled pairs, and no head.

Each pair has the target weights that minimise ``sum_k w_k L_k + tau KL(w || f)``, a bound of the mixture's loss kept
near the router f, which is one step of the Hedge algorithm; the router then learns them by cross-entropy:

    omega_k = f_k exp(-L_k / tau) / Z,   L_k = -log sigma(r_k(chosen) - r_k(rejected))
    loss    = -mean sum_k omega_k log f_k(x, c)

"MiCRo: Mixture Modeling and Context-aware Routing for Personalized Preference Learning" (arXiv 2505.24846), stage 2.
`polyreward.reward_models.routed_models` routes a fitted model.
"""

from __future__ import annotations

import copy
import hashlib
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.reward_models.checkpoints import read_checkpoint
from polyreward.reward_models.mixtures import as_given, as_tensor, mixture_log_probability, simplex
from polyreward.storage import write_atomically

Refresh = Literal["epoch", "batch"]
REFRESHES = ("epoch", "batch")


class EmptyContextWarning(UserWarning):
    """There is no pair to learn a context from; the router stays as it is."""


def hedge_targets(prior: Any, losses: Any, tau: float) -> Any:
    """Weights of experts after their losses, ``prior_k exp(-losses_k / tau)`` over its sum (arXiv 2505.24846).

    They minimise ``sum_k w_k losses_k + tau KL(w || prior)``, whose smallest value is
    ``-tau log sum_k prior_k exp(-losses_k / tau)``. With `tau` towards 0 they are one-hot at the smallest loss among
    the experts that the prior knows, with an infinite `tau` the prior. A weight of 0 stays 0, equal losses give the
    prior back. In log space: losses of any size underflow nowhere.

    Parameters
    ----------
    prior : float (B, K) tensor or array, or (K,) for all samples
        Rows sum to 1.
    losses : float (B, K)
        Lower is better; inf rules an expert out, and rules none out where it would rule out all.
    tau : float > 0
        Temperature.

    Returns
    -------
    (B, K) in the type, dtype and device of `losses`

    Raises
    ------
    InvalidInputError
        `tau` not above 0; other shapes; losses that are NaN or -inf, a prior that is no distribution, with the row.
    """
    require_temperature(tau)
    given, array = as_tensor(losses)
    if given.ndim != 2 or given.shape[1] < 1:
        raise InvalidInputError(f"losses must have shape (samples, experts) with an expert, got {tuple(given.shape)}")
    bad = (torch.isnan(given) | torch.isneginf(given)).any(dim=1)
    if bool(bad.any()):
        raise InvalidInputError(f"losses of row {int(bad.int().argmax())} are NaN or -inf, expected numbers")
    share = simplex(prior, given, "prior").expand(given.shape)
    known = share > 0
    each = given.to(torch.promote_types(given.dtype, torch.float32))
    # less the smallest loss before the division, so that a small temperature overflows nowhere
    best = torch.where(known, each, torch.inf).amin(dim=1, keepdim=True)
    above = torch.where(torch.isinf(best), 0.0, each - torch.where(torch.isinf(best), 0.0, best))
    cost = torch.where(above == 0, 0.0, above / tau)
    logits = torch.where(known, share.clamp(min=torch.finfo(share.dtype).tiny).log() - cost, -torch.inf)
    return as_given(logits.softmax(dim=1), given, array)


class HedgeRouterTrainer:
    """Second stage of MiCRo: the router learns from pairs with a context, the heads stay (arXiv 2505.24846).

    Parameters
    ----------
    router : module from features of prompts with context (N, p) to logits (N, K)
        That of the first stage; trained in place.
    heads_frozen : module or function from features of responses (N, d) to rewards (N, K), optional
        Never trained. None where only `fit_losses` is called.
    tau : float > 0
        Temperature; the paper has 1e-3 and 1e-4, which makes targets all but one-hot.
    epochs, batch : int
        Minibatches of `batch` pairs.
    refresh : "epoch" or "batch"
        When targets are computed anew: for all pairs at the start of an epoch, as in the paper, or for each batch.
    learning_rate : float
        Of Adam, without decay of the weights, which would pull the router from the first stage (the paper names no rate
        for this stage; this is that of its first).
    generator : torch.Generator, optional
        Draws the batches; default a new one of seed 0.

    Attributes
    ----------
    epoch : int
        Epochs done of a fit that has not ended.
    targets : Tensor (N, K) or None
        The last targets of all pairs.
    history : list of dict
        ``epoch``, ``loss`` (the cross-entropy), ``bound`` (mean of ``sum_k f_k L_k`` before the epoch) and
        ``validation_accuracy`` where there is a validation set.

    Raises
    ------
    InvalidInputError, UnknownNameError
        An argument out of range.
    """

    def __init__(
        self,
        router: nn.Module,
        heads_frozen: Callable[[Tensor], Tensor] | None,
        tau: float,
        epochs: int = 10,
        batch: int = 32,
        refresh: Refresh = "epoch",
        *,
        learning_rate: float = 2e-3,
        generator: torch.Generator | None = None,
    ) -> None:
        require_temperature(tau)
        for name, value in (("epochs", epochs), ("batch", batch)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidInputError(f"{name} must be a whole number of at least 1, got {value!r}")
        if refresh not in REFRESHES:
            raise UnknownNameError(f"unknown refresh {refresh!r}{nearest(str(refresh), REFRESHES)}")
        if not 0 < learning_rate < math.inf:
            raise InvalidInputError(f"learning_rate must be a finite number above 0, got {learning_rate}")
        self.router, self.heads_frozen, self.tau = router, heads_frozen, tau
        self.epochs, self.batch, self.refresh, self.learning_rate = epochs, batch, refresh, learning_rate
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.optimizer = torch.optim.Adam(router.parameters(), lr=learning_rate)
        self.epoch = 0
        self.targets: Tensor | None = None
        self.history: list[dict[str, float]] = []
        self._best: dict[str, Tensor] | None = None
        self._best_accuracy = -1.0

    def fit(
        self,
        prompts: Tensor,
        chosen: Tensor,
        rejected: Tensor,
        validation: tuple[Tensor, Tensor, Tensor] | None = None,
        **options: Any,
    ) -> nn.Module:
        """Train the router on features of pairs, and return it.

        Parameters
        ----------
        prompts : float (N, p)
            Of the prompt with its context.
        chosen, rejected : float (N, d)
        validation : the same three of held-out pairs, optional
            The epoch with the best accuracy on them is kept, the earliest of equals; without, the last.
        options : as of `fit_losses`
        """
        losses = self.pair_losses(chosen, rejected)
        held = None if validation is None else (validation[0], self.pair_losses(*validation[1:]))
        return self.fit_losses(prompts, losses, held, **options)

    @torch.no_grad()
    def pair_losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Loss of each pair under each head, ``-log sigma(r_k(chosen) - r_k(rejected))``, (N, K)."""
        if self.heads_frozen is None:
            raise InvalidInputError("the trainer has no heads_frozen; pass losses to fit_losses")
        if chosen.shape != rejected.shape:
            raise InvalidInputError(
                f"chosen has shape {tuple(chosen.shape)}, rejected {tuple(rejected.shape)}: expected the same"
            )
        return -torch.nn.functional.logsigmoid(self.heads_frozen(chosen) - self.heads_frozen(rejected))

    def fit_losses(
        self,
        prompts: Tensor,
        losses: Tensor,
        validation: tuple[Tensor, Tensor] | None = None,
        *,
        checkpoint: str | Path | None = None,
        on_epoch: Callable[[HedgeRouterTrainer], None] | None = None,
    ) -> nn.Module:
        """The same from the losses of each pair under each head, ``-log P_k`` of any likelihood.

        Parameters
        ----------
        prompts : float (N, p)
        losses : float (N, K)
        validation : (prompts, losses) of held-out pairs, optional
        checkpoint : file, optional
            Written after every epoch; a fit that finds it goes on from there, one that ends removes it.
        on_epoch : function of the trainer, called after every epoch, optional
            A fit that it ends by an exception goes on at the next call, here or in a trainer with its `state_dict`.

        Warns
        -----
        EmptyContextWarning
            There are no pairs; the router is unchanged.

        Raises
        ------
        InvalidInputError
            Shapes that do not fit, values that are NaN, a router of another number of heads; a checkpoint of another
            fit.
        """
        self._check(prompts, losses, "")
        if validation is not None:
            self._check(*validation, "validation ")
        if not len(prompts):
            warnings.warn(EmptyContextWarning("no pairs with a context: the router stays as it is"), stacklevel=2)
            return self.router
        key = self._key(prompts, losses) if checkpoint is not None else ""
        state = read_checkpoint(checkpoint, key, "a fit of other pairs or options")
        if state is not None:
            self.load_state_dict(state)
        if not self.epoch:
            self.history = []
        while self.epoch < self.epochs:
            self._run(prompts, losses, validation)
            if checkpoint is not None:
                state = {"key": key, **self.state_dict()}
                write_atomically(checkpoint, lambda path, state=state: torch.save(state, path))  # type: ignore[misc]
            if on_epoch is not None:
                on_epoch(self)
        if self._best is not None:
            self.router.load_state_dict(self._best)
        self.epoch, self._best, self._best_accuracy = 0, None, -1.0
        self.optimizer = torch.optim.Adam(self.router.parameters(), lr=self.learning_rate)
        if checkpoint is not None:
            Path(checkpoint).unlink(missing_ok=True)
        return self.router

    def state_dict(self) -> dict[str, Any]:
        """What a fit needs to go on to the same result: router, targets, optimiser, best epoch, generator."""
        return copy.deepcopy(
            {
                "router": self.router.state_dict(),
                "targets": self.targets,
                "optimizer": self.optimizer.state_dict(),
                "epoch": self.epoch,
                "history": self.history,
                "best": self._best,
                "best_accuracy": self._best_accuracy,
                "generator": self.generator.get_state(),
            }
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        kept = copy.deepcopy(dict(state))
        self.router.load_state_dict(kept["router"])
        self.optimizer.load_state_dict(kept["optimizer"])
        self.targets, self.epoch, self.history = kept["targets"], kept["epoch"], kept["history"]
        self._best, self._best_accuracy = kept["best"], kept["best_accuracy"]
        self.generator.set_state(kept["generator"].cpu())

    def _run(self, prompts: Tensor, losses: Tensor, validation: tuple[Tensor, Tensor] | None) -> None:
        prior = self._log_weights(prompts).exp()
        self.targets = targets = hedge_targets(prior, losses, self.tau)
        bound = float((prior * losses).sum(dim=1).mean())
        training, total = self.router.training, 0.0
        self.router.train()
        order = torch.randperm(len(prompts), generator=self.generator).to(prompts.device)
        for rows in order.split(self.batch):
            log_weights = self.router(prompts[rows]).log_softmax(dim=-1)
            if self.refresh == "batch":
                targets[rows] = hedge_targets(log_weights.detach().exp(), losses[rows], self.tau)
            loss = -(targets[rows] * log_weights).sum(dim=1).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += float(loss.detach()) * len(rows) / len(prompts)
        self.router.train(training)
        self.epoch += 1
        record = {"epoch": self.epoch, "loss": total, "bound": bound}
        if validation is not None and len(validation[0]):
            accuracy = routed_accuracy(self._log_weights(validation[0]), validation[1])
            record["validation_accuracy"] = accuracy
            if accuracy > self._best_accuracy:
                self._best_accuracy = accuracy
                self._best = {name: value.detach().clone() for name, value in self.router.state_dict().items()}
        self.history.append(record)

    @torch.no_grad()
    def _log_weights(self, prompts: Tensor) -> Tensor:
        training = self.router.training
        found: Tensor = self.router.eval()(prompts).log_softmax(dim=-1)
        self.router.train(training)
        return found

    def _check(self, prompts: Tensor, losses: Tensor, name: str) -> None:
        if prompts.ndim != 2 or losses.ndim != 2 or len(prompts) != len(losses):
            raise InvalidInputError(
                f"{name}prompts have shape {tuple(prompts.shape)}, losses {tuple(losses.shape)}: expected (N, width) "
                "and (N, heads)"
            )
        for what, values in (("prompts", prompts), ("losses", losses)):
            bad = ~torch.isfinite(values).all(dim=1)
            if bool(bad.any()):
                raise InvalidInputError(f"{name}{what} of pair {int(bad.int().argmax())} are NaN or infinite")
        if len(prompts):
            heads = self._log_weights(prompts[:1]).shape[-1]
            if heads != losses.shape[1]:
                raise InvalidInputError(f"the router has {heads} heads, the {name}losses {losses.shape[1]}")

    def _key(self, prompts: Tensor, losses: Tensor) -> str:
        settings = (self.tau, self.epochs, self.batch, self.refresh, self.learning_rate)
        digest = hashlib.sha256(repr(settings).encode())
        for values in (prompts, losses):
            digest.update(values.detach().double().cpu().numpy().tobytes())
        return digest.hexdigest()


def routed_accuracy(log_weights: Tensor, losses: Tensor) -> float:
    """Share of pairs for which the mixture gives the chosen response more than 1/2; exactly 1/2 counts half.

    Parameters
    ----------
    log_weights : float (N, K)
    losses : float (N, K)
        ``-log P_k(chosen > rejected)``.
    """
    chance = mixture_log_probability(log_weights, -losses).exp()
    return float((chance > 0.5).double().mean() + 0.5 * (chance == 0.5).double().mean())


def require_temperature(tau: float) -> None:
    """Refuse a temperature that is not above 0."""
    if not tau > 0:
        raise InvalidInputError(f"tau must be above 0, got {tau}")
