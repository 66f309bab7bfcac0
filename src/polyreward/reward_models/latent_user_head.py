"""`LatentUserHead`: variational preference learning (arXiv 2408.10075) as a head of `PreferenceModel`.

    model = PreferenceModel(encoder, LatentUserHead).fit(data)          # data with annotators
    model.score(prompts, completions, annotator="ann")
    infer_annotators(model, comparisons_of_new_people)                  # no training
    model.score(prompts, completions, annotator="new")

Each annotator's posterior comes from a few of their own comparisons, drawn anew for each batch and never from among
those that the batch is to predict. The divergence from the prior is a term of the loss. Someone unknown is scored at
the prior's mean; a share of the annotators of each batch is trained there, so that it is the population's score.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyreward.errors import InvalidInputError
from polyreward.preferences import PreferenceData
from polyreward.reward_models.comparisons import ComparisonTable
from polyreward.reward_models.encoders import FeatureTable
from polyreward.reward_models.heads import Items, Scores
from polyreward.reward_models.judgements import Judgements, content_hash
from polyreward.reward_models.kl_annealing import CyclicalAnnealer
from polyreward.reward_models.latent_priors import Prior, PriorName, active_units, on_sphere, reparameterize
from polyreward.reward_models.latent_users import LatentReward, Normalize, check_normalize
from polyreward.reward_models.model import PreferenceModel
from polyreward.reward_models.preference_sets import PreferenceSetEncoder

USERS = 256
"""Annotators whose comparisons go through the encoder at once."""


class LatentUserHead(nn.Module):
    """``r(features, z)`` with z inferred from the annotator's other comparisons.

    Parameters
    ----------
    width : int
        d of the features.
    latent, hidden, layers : int
        Width of z, and width and number of the decoder's hidden layers.
    context : int
        Comparisons from which z is inferred in training: from 1 to so many a batch.
    largest : int
        Comparisons from which it is inferred in use.
    beta : float
        Weight of the divergence of a set of `context` comparisons.
    cycles, baseline : int, float
        beta rises so many times from this share of it; 0 cycles keep it constant.
    prior : "standard", "learned" or "flow"
    normalize : as of `VariationalPreferences`
    population : float in [0, 1]
        Share of a batch's annotators that are trained as if unknown.
    clamp : float, optional
        Bound of the posterior's mean and log-variance.
    annotators : int
        Whose posteriors are stored; set by the fit.
    """

    def __init__(
        self,
        width: int,
        latent: int = 8,
        hidden: int = 64,
        layers: int = 2,
        context: int = 16,
        largest: int = 64,
        beta: float = 0.02,
        cycles: int = 4,
        baseline: float = 0.0,
        prior: PriorName = "learned",
        normalize: Normalize = "never",
        population: float = 0.3,
        clamp: float | None = None,
        annotators: int = 0,
    ) -> None:
        super().__init__()
        check_normalize(normalize)
        if min(context, largest) < 1 or not 0 <= population <= 1 or not beta >= 0 or cycles < 0:
            raise InvalidInputError(
                "LatentUserHead needs context and largest from 1, population in [0, 1], beta and cycles from 0, got "
                f"{context}, {largest}, {population}, {beta}, {cycles}"
            )
        self.config: dict[str, Any] = {
            "width": width, "latent": latent, "hidden": hidden, "layers": layers, "context": context,
            "largest": largest, "beta": beta, "cycles": cycles, "baseline": baseline, "prior": prior,
            "normalize": normalize, "population": population, "clamp": clamp, "annotators": annotators,
        }  # fmt: skip
        self.set_encoder = PreferenceSetEncoder("attention", width, latent, hidden, clamp=clamp)
        self.decoder = LatentReward(width, latent, hidden, layers)
        self.prior = Prior(prior, latent)
        self.annealer = CyclicalAnnealer(1.0, cycles, "cosine", baseline, beta) if cycles else None
        self.beta = beta
        self.register_buffer("means", torch.zeros(annotators, latent))
        self.register_buffer("log_variances", torch.zeros(annotators, latent))
        self.means: Tensor
        self.log_variances: Tensor
        self._judgements: Judgements | None = None
        self._inferred = torch.zeros(annotators, dtype=torch.bool)
        self._at: tuple[int, ...] = ()
        self.register_state_dict_pre_hook(_refreshed)

    def prepare(self, table: ComparisonTable, features: FeatureTable | None) -> None:
        """Take the judgements of the training data, from which the sets are drawn.

        Raises
        ------
        InvalidInputError
            The encoder learns, so that there are no features of earlier comparisons; or no comparison has an annotator.
        """
        if features is None:
            raise InvalidInputError(
                "LatentUserHead reads features of earlier comparisons, which an encoder that learns keeps changing; "
                "use frozen features"
            )
        self._judgements = Judgements.of(table, features)
        if not len(self._judgements):
            raise InvalidInputError(
                f"{table.data.source}: no comparison with an order has an annotator, and LatentUserHead learns from "
                "annotators"
            )
        count = len(table.annotators)
        self.config["annotators"] = count
        device = self.prior.mean.device
        self.means = torch.zeros(count, self.config["latent"], device=device)
        self.log_variances = torch.zeros(count, self.config["latent"], device=device)
        self._inferred, self._at = torch.zeros(count, dtype=torch.bool), ()

    def step(self, share: float) -> None:
        """Set beta for the share of the fit that is done."""
        if self.annealer is not None:
            self.beta = self.annealer(share)

    def forward(self, items: Items) -> Scores:
        """Scores (R,); in training with the term ``kl``, and in the validation with beta at its full weight."""
        users, place = torch.unique(items.annotator, return_inverse=True)
        compares = len(items.comparison) > 1 and bool((items.comparison[1:] == items.comparison[:-1]).any())
        mean, log_variance = self._posterior(users, items, compares)
        learns = self.training
        latent = reparameterize(mean, log_variance) if learns else mean
        if learns and self.config["population"]:
            alone = torch.rand(len(users), 1, device=mean.device) < self.config["population"]
            latent = torch.where(alone, self.prior.mean, latent)
        values = self.decoder.reward(items.features, self._read(latent, learns)[place])
        if not compares:
            return Scores(values)
        kl = self.prior.kl(mean, log_variance)
        # a set of `context` comparisons carries its divergence once
        beta = self.beta if learns else self.config["beta"]
        return Scores(values, terms={"kl": beta * kl[place].mean() / self.config["context"]})

    def latent(self, mean: Tensor) -> Tensor:
        """What the decoder reads of posterior means (..., latent), in use."""
        return self._read(mean, False)

    def active_units(self, threshold: float = 0.01) -> int:
        """Latent units that vary over the annotators; 0 means that the posterior has collapsed."""
        self.refresh()
        return int(active_units(self.means, threshold))

    def kl(self) -> float:
        """Mean divergence of the annotators' posteriors from the prior, in nats."""
        self.refresh()
        with torch.no_grad():
            return float(self.prior.kl(self.means, self.log_variances).mean()) if len(self.means) else 0.0

    @torch.no_grad()
    def refresh(self) -> None:
        """Posteriors of the annotators under the weights of now, where these have changed."""
        at = tuple(p._version for p in self.parameters())
        if self._judgements is None or at == self._at:
            return
        users = torch.nonzero(~self._inferred).squeeze(1)
        for some in users.split(USERS):
            rows, mask = self._judgements.latest(some.numpy(), self.config["largest"])
            there = some.to(self.means.device)
            self.means[there], self.log_variances[there] = self._encode(self._judgements, rows, mask)
        self._at = at

    @torch.no_grad()
    def register(self, codes: np.ndarray, judgements: Judgements) -> None:
        """Set the posteriors of the annotators `codes` (K,) from judgements whose annotators are 0 to K - 1."""
        self.refresh()
        count = max(int(codes.max()) + 1, len(self.means))
        grown = [torch.cat([old, old.new_zeros(count - len(old), old.shape[1])]) for old in (
            self.means, self.log_variances
        )]  # fmt: skip
        self.means, self.log_variances = grown
        self._inferred = torch.cat([self._inferred, torch.ones(count - len(self._inferred), dtype=torch.bool)])
        self._inferred[torch.from_numpy(codes)] = True
        self.config["annotators"] = count
        for some in np.array_split(np.arange(len(codes)), max(-(-len(codes) // USERS), 1)):
            rows, mask = judgements.latest(some, self.config["largest"])
            there = torch.from_numpy(codes[some]).to(self.means.device)
            self.means[there], self.log_variances[there] = self._encode(judgements, rows, mask)

    def _posterior(self, users: Tensor, items: Items, compares: bool) -> tuple[Tensor, Tensor]:
        """Posteriors (U, latent); the prior for someone unknown."""
        known = users >= 0
        at = users.clamp(min=0)
        sampled = self._judgements is not None and compares
        if self.training and not sampled:
            raise InvalidInputError("LatentUserHead learns from comparisons: call prepare with the training data first")
        if not self.training:
            self.refresh()
        if len(users) and int(users.max()) >= len(self.means):
            raise InvalidInputError(f"annotator code {int(users.max())} of {len(self.means)} known annotators")
        prior = (self.prior.mean.expand(len(users), -1), self.prior.log_variance.expand(len(users), -1))
        if not len(self.means):
            return prior
        stored = self.means[at], self.log_variances[at]
        if sampled:
            stored = self._from_others(at, items, stored)
        here = known.unsqueeze(1)
        return torch.where(here, stored[0], prior[0]), torch.where(here, stored[1], prior[1])

    def _from_others(self, users: Tensor, items: Items, stored: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Posteriors from comparisons that are not among the items; the stored ones where none of the items is
        known.
        """
        judgements = self._judgements
        assert judgements is not None
        targets = judgements.keys_of(content_hash(items.features), items.annotator, items.comparison)
        if self.training:
            rows, mask = judgements.draw(users.cpu().numpy(), self.config["context"], targets)
            return self._encode(judgements, rows, mask)
        # a held-out part of the training data: its own comparisons must not tell the answer
        seen = judgements.asked(targets)
        if not len(seen):
            return stored
        inside = torch.isin(users.cpu(), torch.from_numpy(seen)) & ~self._inferred[users.cpu()]
        some = users.cpu()[inside].numpy()
        rows, mask = judgements.latest(some, self.config["largest"], targets)
        mean, log_variance = (value.clone() for value in stored)
        where = inside.to(mean.device)
        mean[where], log_variance[where] = self._encode(judgements, rows, mask)
        return mean, log_variance

    def _encode(self, judgements: Judgements, rows: np.ndarray, mask: np.ndarray) -> tuple[Tensor, Tensor]:
        """Posteriors of sets of judgements (U, C); the prior where a set is empty."""
        pairs, part = judgements.take(rows, mask, self.prior.mean.device)
        mean, log_variance = self.set_encoder.encode_pairs(pairs, part)
        some = part.any(dim=1, keepdim=True)
        return torch.where(some, mean, self.prior.mean), torch.where(some, log_variance, self.prior.log_variance)

    def _read(self, latent: Tensor, learns: bool) -> Tensor:
        latent = self.prior.push(latent)
        used = self.config["normalize"] == "always" or (self.config["normalize"] == "training" and learns)
        return on_sphere(latent) if used else latent


def infer_annotators(model: PreferenceModel, data: PreferenceData) -> PreferenceModel:
    """Register people from their comparisons, without training; `model.score(..., annotator=name)` then knows them.

    Parameters
    ----------
    model : fitted PreferenceModel with a `LatentUserHead`
    data : PreferenceData
        Comparisons with annotators. Someone known already is inferred anew, from these comparisons alone.

    Returns
    -------
    PreferenceModel
        The model itself.

    Raises
    ------
    InvalidInputError
        Another head; no annotators, or one of whom no comparison prefers one response to another.
    """
    head = model.head
    if not isinstance(head, LatentUserHead):
        raise InvalidInputError(f"infer needs a fitted model with a LatentUserHead, got {type(head).__name__}")
    table = ComparisonTable(data)
    if not table.annotators:
        raise InvalidInputError(f"{data.source} has no annotators")
    features = model._source(table).features
    assert features is not None
    judgements = Judgements.of(table, features)
    for code, name in enumerate(table.annotators):
        if not judgements.sizes[code]:
            raise InvalidInputError(
                f"{data.source}: no comparison of annotator {name!r} prefers one response to another"
            )
    names = (*model.annotators, *(name for name in table.annotators if name not in set(model.annotators)))
    place = {name: code for code, name in enumerate(names)}
    head.register(np.array([place[name] for name in table.annotators], np.int64), judgements)
    model.annotators = names
    return model


infer = infer_annotators


def _refreshed(module: Any, *_: Any) -> None:
    module.refresh()
