"""`PreferenceSetEncoder`: what a small set of someone's comparisons says about who they are.

A set of N labelled pairs ``{(a_i, b_i, y_i)}``, y = 1 where a is preferred, becomes a Gaussian ``q(z | set)`` over a
latent user z. ``concat`` reads all pairs as one vector, so that N and the order of the pairs are fixed; ``attention``
encodes each pair with the preferred response first, lets the pairs attend to each other and takes the mean, so that
neither matters.

    h_i = MLP([chosen_i; rejected_i]),   u = mean_i sum_j softmax_j(q_i . k_j / sqrt(h)) v_j,   (mu, lv) = linear(u)

"Personalizing Reinforcement Learning from Human Feedback with Variational Preference Learning" (arXiv 2408.10075).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from polyreward.errors import InvalidInputError

Kind = Literal["concat", "attention"]
SLOPE = 0.2
"""Of the leaky rectifiers, in encoder and decoder."""


class PreferenceSetEncoder(nn.Module):
    """A set of labelled pairs as mean and log-variance of a latent user (arXiv 2408.10075).

    Parameters
    ----------
    kind : "concat" or "attention"
        As in the paper's control and language experiments.
    d_in : int
        Width of the items; a segment of T states is one item of width T x state.
    d_latent : int
        Width d of the latent.
    hidden : int
        Width of the layers; the paper's are 256 (concat) and 512 (attention).
    n_pairs : int, optional
        N of "concat"; None takes that of the first set it sees.
    clamp : float, None or "auto"
        Bound of mean and log-variance; "auto" is 1 for "attention" and none for "concat", as in the released code.

    Raises
    ------
    InvalidInputError
        An unknown kind, or sizes below 1.
    """

    def __init__(
        self,
        kind: Kind = "attention",
        d_in: int = 1,
        d_latent: int = 32,
        hidden: int = 256,
        n_pairs: int | None = None,
        clamp: float | Literal["auto"] | None = "auto",
    ) -> None:
        super().__init__()
        if kind not in ("concat", "attention"):
            raise InvalidInputError(f"kind must be 'concat' or 'attention', got {kind!r}")
        if min(d_in, d_latent, hidden, 1 if n_pairs is None else n_pairs) < 1:
            raise InvalidInputError(
                f"d_in, d_latent, hidden and n_pairs must be at least 1, got {d_in}, {d_latent}, {hidden}, {n_pairs}"
            )
        self.kind, self.d_in, self.d_latent, self.n_pairs = kind, d_in, d_latent, n_pairs
        self.clamp = (1.0 if kind == "attention" else None) if clamp == "auto" else clamp
        first: nn.Module
        if kind == "attention":
            first = nn.Linear(2 * d_in, hidden)
        else:
            first = nn.LazyLinear(hidden) if n_pairs is None else nn.Linear(n_pairs * (2 * d_in + 1), hidden)
        last = [nn.LeakyReLU(SLOPE)] if kind == "concat" else []
        self.network = nn.Sequential(
            first, nn.LeakyReLU(SLOPE), nn.Linear(hidden, hidden), nn.LeakyReLU(SLOPE), nn.Linear(hidden, hidden), *last
        )
        self.attention = SetAttention(hidden) if kind == "attention" else None
        self.mean, self.log_variance = nn.Linear(hidden, d_latent), nn.Linear(hidden, d_latent)

    def forward(
        self, first: Tensor, second: Tensor, labels: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode B sets of N pairs.

        Parameters
        ----------
        first, second : float (B, N, d_in)
        labels : (B, N)
            1 where the first is preferred, 0 where the second is, 0.5 for a tie.
        mask : bool (B, N), optional
            False takes no part, whatever stands there. A set without pairs gives mean and log-variance 0.

        Returns
        -------
        mean, log_variance : float (B, d_latent)

        Raises
        ------
        InvalidInputError
            Shapes that do not fit, labels other than these, and for "concat" another number of pairs or a mask.
        """
        mask = check_sets(first, second, labels, mask)
        if first.shape[-1] != self.d_in:
            raise InvalidInputError(f"items have width {first.shape[-1]}, the encoder was made for d_in={self.d_in}")
        if self.attention is not None:
            won = labels[mask].to(first.dtype).unsqueeze(-1)
            one, other = first[mask], second[mask]
            # the preferred one first, so that which of the two was called first says nothing
            return self.encode_pairs(
                torch.cat([won * one + (1 - won) * other, (1 - won) * one + won * other], dim=-1), mask
            )
        return self._posterior(self._concatenated(first, second, labels, mask), mask)

    def encode_pairs(self, pairs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encode B sets of which only the V pairs that take part are given; for "attention".

        Parameters
        ----------
        pairs : float (V, 2 d_in)
            The preferred and the other item side by side; for a tie their mean twice.
        mask : bool (B, N)
            With V true places, which the pairs fill row by row.

        Returns
        -------
        mean, log_variance : float (B, d_latent)
        """
        if self.attention is None or pairs.shape != (int(mask.sum()), 2 * self.d_in):
            raise InvalidInputError(
                f"encode_pairs is for kind='attention' and {int(mask.sum())} pairs of width {2 * self.d_in}, got shape "
                f"{tuple(pairs.shape)} and kind={self.kind!r}"
            )
        hidden: Tensor = self.network(pairs)
        elements = hidden.new_zeros(*mask.shape, hidden.shape[-1]).index_put(torch.nonzero(mask).unbind(1), hidden)
        return self._posterior(self.attention(elements, mask), mask)

    def _posterior(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        seen = mask.any(dim=1, keepdim=True)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        if self.clamp is not None:
            mean, log_variance = (value.clamp(-self.clamp, self.clamp) for value in (mean, log_variance))
        return torch.where(seen, mean, 0.0), torch.where(seen, log_variance, 0.0)

    def _concatenated(self, first: Tensor, second: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        count = first.shape[1]
        if self.n_pairs is None:
            self.n_pairs = count
        if count != self.n_pairs or not bool(mask.all()):
            raise InvalidInputError(
                f"the concat encoder takes sets of {self.n_pairs} pairs without a mask, got {count} pairs; "
                "kind='attention' takes sets of any size"
            )
        row = torch.cat([first, second, labels.to(first.dtype).unsqueeze(-1)], dim=-1)
        hidden: Tensor = self.network(row.flatten(1))
        return hidden


class SetAttention(nn.Module):
    """Single-head self-attention over a set, and the mean of what comes out.

    Parameters
    ----------
    width : int
        Of the elements, h.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, elements: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool (B, N, h) to (B, h); of a set of one it is the value of the one, of an empty set 0."""
        mask = torch.ones(elements.shape[:2], dtype=torch.bool, device=elements.device) if mask is None else mask
        scores = self.query(elements) @ self.key(elements).transpose(1, 2) / math.sqrt(elements.shape[-1])
        scores = scores.masked_fill(~mask.unsqueeze(1), torch.finfo(scores.dtype).min)
        asks = mask.to(scores.dtype) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        # values are linear and the weights of a query sum to 1, so that pooling may come before them
        weights = (scores.softmax(dim=-1) * asks.unsqueeze(-1)).sum(dim=1)
        pooled: Tensor = self.value((weights.unsqueeze(-1) * elements).sum(dim=1))
        return torch.where(mask.any(dim=1, keepdim=True), pooled, 0.0)


def check_sets(first: Tensor, second: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Refuse sets whose shapes or labels do not fit; return the mask, bool (B, N)."""
    if first.ndim < 3 or first.shape != second.shape:
        raise InvalidInputError(
            f"first and second must have the same shape (sets, pairs, width), got {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
        )
    if labels.shape != first.shape[:2]:
        raise InvalidInputError(f"labels have shape {tuple(labels.shape)}, expected {tuple(first.shape[:2])}")
    if mask is None:
        mask = torch.ones(labels.shape, dtype=torch.bool, device=labels.device)
    elif mask.shape != labels.shape:
        raise InvalidInputError(f"mask has shape {tuple(mask.shape)}, expected {tuple(labels.shape)}")
    check_labels(labels, mask := mask.bool())
    return mask


def check_labels(labels: Tensor, mask: Tensor | None = None) -> None:
    """`InvalidInputError` for labels other than 0, 1 and 0.5 (a tie) where the mask is true."""
    wrong = ~((labels == 0) | (labels == 1) | (labels == 0.5))
    wrong = wrong if mask is None else wrong & mask
    if bool(wrong.any()):
        place: list[Any] = torch.nonzero(wrong)[0].tolist()
        raise InvalidInputError(
            f"labels{place} is {float(labels[tuple(place)]):g}, expected 1 (the first is preferred), 0 (the second) or "
            "0.5 (a tie); mask=False leaves a pair out"
        )
