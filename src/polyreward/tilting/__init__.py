"""Tilting a distribution towards what is worth more: inside a ball, at a temperature, and by taking the best of n.

Three ways to spend divergence from a base distribution p on an advantage a:

    chi-square ball  q = p (1 + sqrt(kappa / Var a) (a - E a)), cut at 0 by water-filling     `chi2_tilt`, `Chi2Tilt`
    KL ball          q proportional to p exp(a / T), T solved for KL(q || p) = kappa          `kl_tilt`, `KLTilt`
    temperature      q proportional to p exp(a / T), with effective sample size               `exponential_tilt`
    best of n        q = F(a)^n - F(a-)^n, with KL(q || p) <= log n - (n - 1) / n             `best_of_n_distribution`

``T log E_p exp(a / T)`` is the soft value of the tilt (`logmeanexp`). `expected_best_of_n` estimates what the best of n
is worth from N samples, exactly over all subsets.

Everything acts on the last axis, for any leading axes at once. Inputs are tensors (any device, differentiable), NumPy
arrays or lists (NumPy comes back); arithmetic is in float64, and the result has the floating dtype of the first
argument. `mask` (bool, true: takes part) broadcasts with the inputs; what stands outside it may be anything, gets
weight 0 and no gradient. A row without any entry gets weight 0 throughout; an axis of length 0 is an error.
"""

from polyreward.tilting.balls import Chi2Tilt, KLTilt, chi2_divergence, chi2_tilt, kl_divergence, kl_tilt
from polyreward.tilting.best_of_n import best_of_n_distribution, best_of_n_kl, expected_best_of_n
from polyreward.tilting.exponential import Tilted, effective_sample_size, exponential_tilt, logmeanexp

__all__ = [
    "Chi2Tilt",
    "KLTilt",
    "Tilted",
    "best_of_n_distribution",
    "best_of_n_kl",
    "chi2_divergence",
    "chi2_tilt",
    "effective_sample_size",
    "expected_best_of_n",
    "exponential_tilt",
    "kl_divergence",
    "kl_tilt",
    "logmeanexp",
]
