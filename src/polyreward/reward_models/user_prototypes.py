"""User prototypes: clusters of what judges say about users, refined by the users' choices, and the neighbours in them.

Offline, embeddings E (N, d) of personas are clustered by K-means; normalised centroids are the prototypes a_j. A
prototype then learns from its members' choices. With o_t = tanh(W_h [q_t ; y+_t - y-_t] + b) of past choices:

    weights = softmax_t(o_t . q / sqrt(d) + rho o_t . a / sqrt(d)),   v = sum_t weight_t o_t
    z = a + lambda_q W_q q + lambda_s W_s v,   D = z . y+ - z . y-
    loss = -log sigma(D) + lambda_cent |a - mu|^2 + lambda_tr |a - a_prev|^2

mu is the centroid, a_prev a moving average of a. At test time a user's persona picks a prototype, and the most similar
members of it, other than the user, are the neighbours. Users whom a model is tested on must not be in the fit.

Paper: P-GenRM: Personalized Generative Reward Model with Test-time User-based Scaling (arXiv 2602.12116). The released
code differs: rho weighs the query term and not the prototype's, the maps have a bias, and the two penalties are left
out of the loss; ``form="released"``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from polyreward.errors import InvalidInputError, UnknownNameError, nearest, require

Form = Literal["paper", "released"]
FORMS = get_args(Form)
DECAY = 0.98


@dataclass(frozen=True)
class Histories:
    """Embedded choices of N members.

    Attributes
    ----------
    query, chosen, rejected : float32 (N, d)
        The current choice, which the prototype learns to predict.
    past_query, past_chosen, past_rejected : float32 (N, T, d)
    mask : bool (N, T)
        Past choices that exist; a member may have none.
    """

    query: Tensor
    chosen: Tensor
    rejected: Tensor
    past_query: Tensor
    past_chosen: Tensor
    past_rejected: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        rows, width = self.query.shape
        for name in ("chosen", "rejected"):
            if getattr(self, name).shape != (rows, width):
                raise InvalidInputError(
                    f"Histories: {name} has shape {tuple(getattr(self, name).shape)}, expected {(rows, width)}"
                )
        past = self.mask.shape[1] if self.mask.ndim == 2 else -1
        for name in ("past_query", "past_chosen", "past_rejected"):
            if getattr(self, name).shape != (rows, past, width):
                raise InvalidInputError(
                    f"Histories: {name} has shape {tuple(getattr(self, name).shape)}, expected {(rows, past, width)}"
                )
        if self.mask.shape != (rows, past):
            raise InvalidInputError(f"Histories: mask has shape {tuple(self.mask.shape)}, expected (N, T)")
        for name in ("query", "chosen", "rejected", "past_query", "past_chosen", "past_rejected"):
            used = getattr(self, name)
            bad = ~used.isfinite().flatten(1).all(dim=1)
            if bool(bad.any()):
                raise InvalidInputError(f"Histories: {name} of row {int(bad.int().argmax())} is not finite")

    def __len__(self) -> int:
        return len(self.query)

    @classmethod
    def of(cls, records: Sequence[tuple[Any, Any, Any, Sequence[tuple[Any, Any, Any]]]]) -> Histories:
        """From N records (query, chosen, rejected, [(query, chosen, rejected), ...]) of vectors (d,)."""
        if not len(records):
            raise InvalidInputError("Histories needs at least one record")
        width = len(_vector(records[0][0]))
        for row, record in enumerate(records):
            if {_vector(v).shape for event in (record[:3], *record[3]) for v in event} != {(width,)}:
                raise InvalidInputError(f"Histories: the vectors of record {row} must all have width {width}")
        current = [torch.stack([_vector(r[i]) for r in records]) for i in range(3)]
        longest = max(len(r[3]) for r in records)
        past = torch.zeros(3, len(records), longest, current[0].shape[1])
        mask = torch.zeros(len(records), longest, dtype=torch.bool)
        for row, record in enumerate(records):
            mask[row, : len(record[3])] = True
            for place, event in enumerate(record[3]):
                past[:, row, place] = torch.stack([_vector(part) for part in event])
        query, chosen, rejected = current
        return cls(query, chosen, rejected, past[0], past[1], past[2], mask)

    def take(self, rows: Tensor) -> Histories:
        """Some of the members."""
        return Histories(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def history_attention(
    events: Tensor, prototype: Tensor, query: Tensor, rho: float = 0.5, mask: Tensor | None = None, form: Form = "paper"
) -> tuple[Tensor, Tensor]:
    """Weights of past choices (..., T), and their weighted sum v (..., d).

    Parameters
    ----------
    events : float (..., T, d)
        o, in (-1, 1).
    prototype, query : float (..., d)
    rho : float
        Weight of the prototype's term ("paper") or of the query's ("released").
    mask : bool (..., T), optional
        Choices that exist. Without any, the weights and v are 0.
    form : "paper" or "released"
    """
    _require_form(form)
    given = events.dtype
    wide = torch.promote_types(given, torch.float32)
    events, prototype, query = events.to(wide), prototype.to(wide), query.to(wide)
    root = math.sqrt(events.shape[-1])
    by_query = (events * query.unsqueeze(-2)).sum(dim=-1) / root
    by_prototype = (events * prototype.unsqueeze(-2)).sum(dim=-1) / root
    logits = by_query + rho * by_prototype if form == "paper" else by_prototype + rho * by_query
    if mask is None:
        mask = torch.ones_like(logits, dtype=torch.bool)
    some = mask.any(dim=-1, keepdim=True)
    logits = torch.where(mask | ~some, logits, -torch.inf)
    weights = torch.where(some, torch.softmax(logits, dim=-1), 0.0) if logits.shape[-1] else logits
    return weights.to(given), (weights.unsqueeze(-1) * events).sum(dim=-2).to(given)


class PrototypeRefiner(nn.Module):
    """What refines prototypes: the maps W_h, W_q and W_s, and the prototypes themselves (arXiv 2602.12116).

    Parameters
    ----------
    prototypes : float (k, d)
    rho, lambda_q, lambda_s : float
    form : "paper" or "released"
    """

    def __init__(
        self,
        prototypes: Tensor,
        rho: float = 0.5,
        lambda_q: float = 1.0,
        lambda_s: float = 1.0,
        form: Form = "paper",
    ) -> None:
        super().__init__()
        _require_form(form)
        width = prototypes.shape[1]
        self.rho, self.lambda_q, self.lambda_s, self.form = rho, lambda_q, lambda_s, form
        self.prototypes = nn.Parameter(prototypes.clone())
        self.history = nn.Linear(2 * width, width)
        self.query = nn.Linear(width, width, bias=form == "released")
        self.summary = nn.Linear(width, width, bias=form == "released")

    def events(self, histories: Histories) -> Tensor:
        """What past choices say, o (N, T, d)."""
        difference = histories.past_chosen - histories.past_rejected
        return torch.tanh(self.history(torch.cat([histories.past_query, difference], dim=-1)))

    def forward(self, histories: Histories, assigned: Tensor) -> Tensor:
        """Differences D (N,) of the members of the prototypes `assigned` (N,)."""
        prototype = self.prototypes[assigned]
        _, summary = history_attention(
            self.events(histories), prototype, histories.query, self.rho, histories.mask, self.form
        )
        z = prototype + self.lambda_q * self.query(histories.query) + self.lambda_s * self.summary(summary)
        return (z * (histories.chosen - histories.rejected)).sum(dim=-1)


class UserPrototypes:
    """Prototypes of users, and neighbours in them (arXiv 2602.12116).

    Parameters
    ----------
    k : int >= 1
        50 in the paper, 100 in the released script.
    refine : bool
        Learn from the members' choices after clustering.
    rho, lambda_q, lambda_s, lambda_cent, lambda_tr : float
        Defaults of the released code.
    form : "paper" or "released"
        See the module.
    learning_rate, epochs, batch_size, decay
        Of the refinement; `decay` is of the moving average.
    restarts : int
        Of K-means.
    seed : int

    Attributes
    ----------
    prototypes : float32 (k, d), unit rows (A in the paper)
    embeddings : float32 (N, d), unit rows (E)
    assignments : int64 (N,)
    users : list of N, or None
    history : list of float, mean loss of every epoch of the refinement

    Raises
    ------
    InvalidInputError
        ``k`` above N; embeddings that are not (N, d), finite and other than 0; refinement without histories.
    """

    def __init__(
        self,
        k: int = 50,
        refine: bool = True,
        rho: float = 0.5,
        lambda_q: float = 1.0,
        lambda_s: float = 1.0,
        lambda_cent: float = 1e-3,
        lambda_tr: float = 1e-3,
        *,
        form: Form = "paper",
        learning_rate: float = 1e-3,
        epochs: int = 1,
        batch_size: int = 16,
        decay: float = DECAY,
        restarts: int = 10,
        seed: int = 0,
    ) -> None:
        _require_form(form)
        for name, number in (
            ("rho", rho), ("lambda_q", lambda_q), ("lambda_s", lambda_s), ("lambda_cent", lambda_cent),
            ("lambda_tr", lambda_tr), ("learning_rate", learning_rate), ("decay", decay),
        ):  # fmt: skip
            least = -math.inf if name in ("rho", "lambda_q", "lambda_s") else 0
            most = 1 if name == "decay" else math.inf
            if not (math.isfinite(number) and least <= number <= most) or (name == "learning_rate" and number == 0):
                raise InvalidInputError(f"UserPrototypes: {name} must be finite and in its range, got {number}")
        for name, value in (("k", k), ("epochs", epochs), ("batch_size", batch_size), ("restarts", restarts)):
            if type(value) is not int or value < 1:
                raise InvalidInputError(f"UserPrototypes: {name} must be a whole number of at least 1, got {value!r}")
        self.k, self.refine, self.rho, self.lambda_q, self.lambda_s = k, refine, rho, lambda_q, lambda_s
        self.lambda_cent, self.lambda_tr, self.form = lambda_cent, lambda_tr, form
        self.learning_rate, self.epochs, self.batch_size, self.decay = learning_rate, epochs, batch_size, decay
        self.restarts, self.seed = restarts, seed
        self.prototypes: np.ndarray | None = None
        self.embeddings, self.assignments = np.zeros((0, 0), np.float32), np.zeros(0, np.int64)
        self.users: list[Any] | None = None
        self.refiner: PrototypeRefiner | None = None
        self.history: list[float] = []

    def fit(self, E: Any, histories: Histories | None = None, users: Sequence[Any] | None = None) -> UserPrototypes:
        """Cluster, and refine where `refine` is set; return self.

        Parameters
        ----------
        E : float (N, d)
            Embeddings of personas; made unit rows here.
        histories : Histories of N, with ``refine``
        users : length N, optional
            Whose persona each row is, for `neighbours` to leave a user out.
        """
        embeddings = _unit(E, "E")
        if len(embeddings) < self.k:
            raise InvalidInputError(
                f"UserPrototypes: k is {self.k} and there are {len(embeddings)} embeddings; lower k"
            )
        if users is not None and len(users) != len(embeddings):
            raise InvalidInputError(f"UserPrototypes: {len(users)} users for {len(embeddings)} embeddings")
        if self.refine and histories is None:
            raise InvalidInputError("UserPrototypes: refinement needs histories; pass them, or refine=False")
        cluster: Any = require("sklearn.cluster", "tasks")
        fitted = cluster.KMeans(self.k, n_init=self.restarts, random_state=self.seed).fit(embeddings)
        self.embeddings, self.users = embeddings, None if users is None else list(users)
        self.assignments = fitted.labels_.astype(np.int64)
        self.prototypes = _unit(fitted.cluster_centers_, "the centroids", zero=True)
        self.history, self.refiner = [], None
        if self.refine and histories is not None:
            if len(histories) != len(embeddings) or histories.query.shape[1] != embeddings.shape[1]:
                raise InvalidInputError(
                    f"UserPrototypes: histories of shape {tuple(histories.query.shape)} for embeddings "
                    f"{embeddings.shape}"
                )
            self._refine(histories)
            self.assignments = self.assign(embeddings)
        return self

    def assign(self, q: Any) -> np.ndarray:
        """Prototype of largest cosine of each of q (B, d), int64 (B,)."""
        prototypes = self._fitted
        return np.asarray((self._queries(q) @ prototypes.T).argmax(axis=1), np.int64)

    def members(self, prototype: int) -> np.ndarray:
        """Rows of E that belong to a prototype."""
        return np.flatnonzero(self.assignments == prototype)

    def neighbours(self, q: Any, n: int, users: Sequence[Any] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The n most similar members of each query's prototype.

        Parameters
        ----------
        q : float (B, d)
        n : int >= 1
        users : length B, optional
            Who asks; their own rows are left out. Needs `users` in the fit.

        Returns
        -------
        indices : int64 (B, n), rows of E, most similar first; -1 where a prototype has fewer members
        similarities : float32 (B, n), cosines; NaN there
            Columns that nobody fills are cut off.
        """
        if n < 1:
            raise InvalidInputError(f"neighbours: n must be at least 1, got {n}")
        queries, prototypes = self._queries(q), self.assign(q)
        similar = queries @ self.embeddings.T
        part = self.assignments[None] == prototypes[:, None]
        if users is not None:
            if self.users is None or len(users) != len(queries):
                raise InvalidInputError(
                    f"neighbours: {len(users)} users for {len(queries)} queries"
                    if self.users is not None
                    else "neighbours: the prototypes were fitted without users; pass users to fit"
                )
            codes: dict[Any, int] = {}
            own = np.array([codes.setdefault(user, len(codes)) for user in self.users])
            part &= own[None] != np.array([codes.get(user, -1) for user in users])[:, None]
        masked = np.where(part, similar, -np.inf)
        width = min(n, int(part.sum(axis=1).max())) if len(queries) else 0
        order = np.argsort(-masked, axis=1, kind="stable")[:, :width]
        found = np.take_along_axis(masked, order, axis=1)
        there = np.isfinite(found)
        return np.where(there, order, -1), np.where(there, found, np.nan).astype(np.float32)

    @property
    def _fitted(self) -> np.ndarray:
        if self.prototypes is None:
            raise InvalidInputError("the prototypes have not been fitted; call fit(E, histories) first")
        return self.prototypes

    def _queries(self, q: Any) -> np.ndarray:
        queries = _unit(q, "q")
        if queries.shape[1] != self._fitted.shape[1]:
            raise InvalidInputError(f"q has width {queries.shape[1]}, the prototypes {self._fitted.shape[1]}")
        return queries

    def _refine(self, histories: Histories) -> None:
        assigned = torch.from_numpy(self.assignments)
        generator = torch.Generator().manual_seed(self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            refiner = PrototypeRefiner(
                torch.from_numpy(self._fitted), self.rho, self.lambda_q, self.lambda_s, self.form
            )
        centres = refiner.prototypes.detach().clone()
        previous = centres.clone()
        optimizer = torch.optim.AdamW(refiner.parameters(), lr=self.learning_rate)
        for _ in range(self.epochs):
            losses = []
            for rows in torch.randperm(len(assigned), generator=generator).split(self.batch_size):
                own = assigned[rows]
                loss = softplus(-refiner(histories.take(rows), own)).mean()
                if self.form == "paper":
                    a = refiner.prototypes[own]
                    loss = loss + self.lambda_cent * (a - centres[own]).square().sum(dim=1).mean()
                    loss = loss + self.lambda_tr * (a - previous[own]).square().sum(dim=1).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    refiner.prototypes.copy_(normalize(refiner.prototypes, dim=1))
                    previous.mul_(self.decay).add_((1 - self.decay) * refiner.prototypes)
                losses.append(float(loss.detach()) * len(rows))
            self.history.append(sum(losses) / len(assigned))
        self.refiner, self.prototypes = refiner.eval(), refiner.prototypes.detach().numpy().copy()


def _unit(values: Any, name: str, zero: bool = False) -> np.ndarray:
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, np.float32)
    if array.ndim != 2 or not np.isfinite(array).all():
        raise InvalidInputError(f"{name} must be finite and of shape (rows, width), got shape {array.shape}")
    length = np.linalg.norm(array, axis=1, keepdims=True)
    if not zero and (length == 0).any():
        raise InvalidInputError(f"{name}: row {int((length[:, 0] == 0).argmax())} is all 0 and has no direction")
    return np.asarray(array / np.where(length > 0, length, 1.0), np.float32)


def _vector(value: Any) -> Tensor:
    return torch.as_tensor(
        np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value), dtype=torch.float32
    )


def _require_form(form: str) -> None:
    if form not in FORMS:
        raise UnknownNameError(f"unknown form {form!r}{nearest(str(form), FORMS)}")
