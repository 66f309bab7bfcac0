"""Bitwise: an integer as independent Bernoulli bits (arXiv 2602.10751).

    n = sum over b of n_b 2^b,   log p(n) = sum over b of log Bernoulli(n_b; sigmoid(theta_b))

The number of parameters grows with the logarithm of the range, and any marginal of a bit can be fitted; neighbours such
as 7 and 8 may differ in every bit, so gradients do not see distance. Signed integers are stored in two's complement
(the top bit counts ``-2^(B-1)``), or in offset binary (``n - offset`` in plain binary); the paper does not say which
it uses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from polyreward.errors import InvalidInputError
from polyreward.statistics.integer_distributions import (
    IntegerDistribution,
    real_parameters,
    require_parameter,
    uniform,
    whole_bounds,
)

MOST_BITS = 61


class BitwiseBernoulli(IntegerDistribution):
    """Independent bits, least significant first (arXiv 2602.10751).

    Parameters
    ----------
    logits : float (*batch, B), or None
        theta in the paper; the last dimension runs over the bits.
    num_bits : int, optional
        B, up to 61; checked against the last dimension.
    signed : bool
        Two's complement, from ``-2^(B-1)`` to ``2^(B-1) - 1``; else from 0 to ``2^B - 1``.
    probs : float (*batch, B) in [0, 1], instead of logits
        Chance of each bit; an impossible value then has log-probability -inf.
    offset : int
        Offset binary: the support starts here. Not together with `signed`.

    No mass is moved: values of the support that the data never take keep theirs (see `restricted`). A target outside
    the support is an error and never wraps.

    Raises
    ------
    InvalidInputError
        Not exactly one of logits and probs, a wrong number of bits, probabilities outside [0, 1], NaN.
    """

    fields = ("logits",)

    def __init__(
        self,
        logits: Any = None,
        num_bits: int | None = None,
        signed: bool = False,
        *,
        probs: Any = None,
        offset: int = 0,
    ) -> None:
        name = type(self).__name__
        if (logits is None) == (probs is None):
            raise InvalidInputError(f"{name} needs exactly one of logits and probs")
        if signed and offset:
            raise InvalidInputError(f"{name}: signed is two's complement and has no offset; choose one of them")
        if probs is not None:
            (chance,) = real_parameters(name, probs=probs)
            require_parameter((chance >= 0) & (chance <= 1), name, "probs", "between 0 and 1", chance)
            self.logits = torch.logit(chance)
        else:
            (self.logits,) = real_parameters(name, logits=logits)
        if self.logits.dim() == 0 or not 1 <= self.logits.shape[-1] <= MOST_BITS:
            raise InvalidInputError(
                f"{name} needs logits of shape (*batch, bits), 1 to {MOST_BITS} bits, got {tuple(self.logits.shape)}"
            )
        self.num_bits, self.signed = self.logits.shape[-1], signed
        if num_bits is not None and num_bits != self.num_bits:
            raise InvalidInputError(f"{name}: num_bits is {num_bits}, the logits have {self.num_bits}")
        self.offset = whole_bounds(offset, None, name)[0] or 0
        self.low = -(2 ** (self.num_bits - 1)) if signed else self.offset
        self.high = self.low + 2**self.num_bits - 1
        super().__init__(self.logits.shape[:-1])

    @property
    def probs(self) -> Tensor:
        """Chance of each bit, (*batch, B)."""
        return self.logits.sigmoid()

    @property
    def mode(self) -> Tensor:
        """The likeliest integer: each bit set where its logit is positive; int64."""
        return self._value(self.logits > 0)

    @property
    def mean(self) -> Tensor:
        """``offset + sum p_b 2^b``, the top bit negative in two's complement."""
        return (self.probs * self._weights(self.logits.dtype)).sum(-1) + self.offset

    @property
    def variance(self) -> Tensor:
        """``sum p_b (1 - p_b) 4^b``."""
        return (self.probs * (-self.logits).sigmoid() * self._weights(self.logits.dtype).square()).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy in nats, the sum over the bits."""
        p = self.probs
        terms = torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)
        return -terms.sum(-1)

    def bits_of(self, value: Any) -> Tensor:
        """Bits of each integer, bool (..., B), least significant first. Raises as `log_prob` does."""
        return self._bits(self._inside(value))

    def _bits(self, n: Tensor) -> Tensor:
        shifts = torch.arange(self.num_bits, device=n.device)
        # Shifting a negative int64 keeps its sign: the low B bits are its two's complement.
        return ((n - self.offset)[..., None] >> shifts) & 1 == 1

    def _weights(self, dtype: torch.dtype) -> Tensor:
        weights = 2.0 ** torch.arange(self.num_bits, device=self.logits.device, dtype=torch.float64)
        if self.signed:
            weights[-1] = -weights[-1]
        return weights.to(dtype)

    def _value(self, bits: Tensor) -> Tensor:
        weights = torch.ones_like(bits, dtype=torch.int64) << torch.arange(self.num_bits, device=bits.device)
        if self.signed:
            weights[..., -1] = -weights[..., -1]
        return (bits * weights).sum(-1) + self.offset

    def _log_prob(self, n: Tensor) -> Tensor:
        return logsigmoid(torch.where(self._bits(n), self.logits, -self.logits)).sum(-1)

    def _cdf(self, n: Tensor) -> Tensor:
        """Sum over the set bits of n of: higher bits equal, this one 0; plus all equal."""
        bits, logits = self._bits(n), self.logits
        if self.signed:  # in two's complement the top bit set comes first
            flip = torch.arange(self.num_bits, device=logits.device) == self.num_bits - 1
            bits, logits = bits ^ flip, torch.where(flip, -logits, logits)
        same = logsigmoid(torch.where(bits, logits, -logits)).flip(-1).cumsum(-1).flip(-1)
        higher = torch.cat([same[..., 1:], torch.zeros_like(same[..., :1])], -1)
        smaller = torch.where(bits, (higher + logsigmoid(-logits)).exp(), torch.zeros_like(higher))
        return smaller.sum(-1) + same[..., 0].exp()

    def _sample(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        u = uniform(shape + self.logits.shape[-1:], self.logits.device, generator)
        return self._value(u < self.probs)

    def _rebuilt(self, change: Callable[[Tensor], Tensor]) -> BitwiseBernoulli:
        made = object.__new__(BitwiseBernoulli)
        made.__dict__.update(self.__dict__)
        made.logits = change(self.logits)
        IntegerDistribution.__init__(made, made.logits.shape[:-1])
        return made


def bits_needed(low: int, high: int, signed: bool = False) -> int:
    """Smallest B whose support holds `low` to `high`: from 0, or in two's complement.

    Raises
    ------
    InvalidInputError
        `low` is negative without `signed`, or more than 61 bits are needed.
    """
    if low > high or (low < 0 and not signed):
        raise InvalidInputError(f"no unsigned bits hold {low} to {high}; use signed, or offset binary")
    bits = max(high.bit_length() if high >= 0 else 0, (-low - 1).bit_length() if low < 0 else 0) + signed
    if bits > MOST_BITS:
        raise InvalidInputError(f"{low} to {high} needs {bits} bits, the limit is {MOST_BITS}")
    return max(bits, 1)
