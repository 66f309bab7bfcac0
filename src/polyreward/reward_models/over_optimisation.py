"""What an ensemble is for: which ensembles there are, where members part, and what optimising a proxy is worth.

Members that were trained to the same accuracy are underspecified: on what a tuned policy writes they disagree. Members
that differ by the seed of pretraining disagree more than those that differ by the seed of fine-tuning only, so their
aggregate is harder to exploit (Helping or Herding?, arXiv 2312.09244). What all members get wrong, an ensemble keeps:
`hack_feature_shift` shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyreward.errors import InvalidInputError
from polyreward.tilting import best_of_n_kl, expected_best_of_n


@dataclass(frozen=True, eq=False)
class EnsembleSplit:
    """Which of M members share a pretraining, and the ensembles that this allows (arXiv 2312.09244).

    Parameters
    ----------
    pretrain_ids, finetune_ids : int (M,)
        Seeds of each member; no two members have both in common.

    Raises
    ------
    InvalidInputError
        Lengths that differ, or two members with the same seeds.
    """

    pretrain_ids: Any
    finetune_ids: Any

    def __post_init__(self) -> None:
        pre, fine = np.asarray(self.pretrain_ids), np.asarray(self.finetune_ids)
        if pre.ndim != 1 or pre.shape != fine.shape or not len(pre):
            raise InvalidInputError(
                f"pretrain_ids and finetune_ids must be of one length, got shapes {pre.shape} and {fine.shape}"
            )
        if len({*zip(pre.tolist(), fine.tolist(), strict=True)}) != len(pre):
            raise InvalidInputError("two members have the same pretraining and fine-tuning seed")
        object.__setattr__(self, "pretrain_ids", pre)
        object.__setattr__(self, "finetune_ids", fine)

    @classmethod
    def grid(cls, pretrains: int, finetunes: int) -> EnsembleSplit:
        """Every pretraining with every fine-tuning, the fine-tunings of one pretraining next to one another."""
        return cls(np.repeat(np.arange(pretrains), finetunes), np.tile(np.arange(finetunes), pretrains))

    def finetune_ensembles(self) -> list[np.ndarray]:
        """Members of each pretraining: they differ by the seed of fine-tuning only."""
        return [np.flatnonzero(self.pretrain_ids == seed) for seed in np.unique(self.pretrain_ids)]

    def pretrain_ensembles(self) -> list[np.ndarray]:
        """Ensembles with one member of each pretraining, no fine-tuning seed twice; disjoint where the grid is full.

        Ensemble k takes from the i-th pretraining the fine-tuning ``(i + k) mod F``. With fewer fine-tunings than
        pretrainings a fine-tuning seed comes again. One that would need a member which is not there is left out.
        """
        pre, fine = np.unique(self.pretrain_ids), np.unique(self.finetune_ids)
        place = {
            pair: m for m, pair in enumerate(zip(self.pretrain_ids.tolist(), self.finetune_ids.tolist(), strict=True))
        }
        found = []
        for k in range(len(fine)):
            pairs = [(int(p), int(fine[(i + k) % len(fine)])) for i, p in enumerate(pre)]
            if all(pair in place for pair in pairs):
                found.append(np.array([place[pair] for pair in pairs]))
        return found

    def check_finetune(self, members: Sequence[int]) -> None:
        """Refuse a fine-tune ensemble whose members come from several pretrainings."""
        seeds = np.unique(self.pretrain_ids[np.asarray(members)])
        if len(seeds) > 1:
            raise InvalidInputError(f"a fine-tune ensemble has one pretraining, these members have {seeds.tolist()}")

    def check_pretrain(self, members: Sequence[int]) -> None:
        """Refuse a pretrain ensemble in which a pretraining comes twice."""
        seeds, count = np.unique(self.pretrain_ids[np.asarray(members)], return_counts=True)
        if (count > 1).any():
            raise InvalidInputError(
                f"pretraining {seeds[count > 1][0]} comes {count.max()} times in a pretrain ensemble"
            )


def underspecification_report(scores_id: Any, scores_ood: Any, split: EnsembleSplit | None = None) -> dict[str, Any]:
    """Rank correlation of pairs of members on the data they were trained for, and on others.

    Parameters
    ----------
    scores_id : (M, B)
        On samples as in training.
    scores_ood : (M, B')
        On samples of a tuned policy, or shifted otherwise.
    split : EnsembleSplit, optional
        Tells pairs of the same pretraining from others.

    Returns
    -------
    dict
        ``rank_corr_id`` and ``rank_corr_ood``, each a dict with the mean Spearman correlation over ``all`` pairs and,
        with `split`, over those of ``same_pretrain`` and ``different_pretrain``; NaN where there is no such pair.

    Raises
    ------
    InvalidInputError
        Fewer than two members, a number of members that differs, scores that are not finite or constant.
    """
    inside, outside = (_scores(scores, name) for scores, name in ((scores_id, "scores_id"), (scores_ood, "scores_ood")))
    if len(inside) != len(outside) or len(inside) < 2:
        raise InvalidInputError(f"needs two or more members in both, got {len(inside)} and {len(outside)}")
    first, second = np.triu_indices(len(inside), 1)
    kinds = {"all": np.ones(len(first), bool)}
    if split is not None:
        if len(split.pretrain_ids) != len(inside):
            raise InvalidInputError(f"the split has {len(split.pretrain_ids)} members, scores have {len(inside)}")
        same = split.pretrain_ids[first] == split.pretrain_ids[second]
        kinds |= {"same_pretrain": same, "different_pretrain": ~same}
    report: dict[str, Any] = {}
    for name, scores in (("rank_corr_id", inside), ("rank_corr_ood", outside)):
        pairs = _rank_correlation(scores)[first, second]
        report[name] = {kind: float(pairs[part].mean()) if part.any() else float("nan") for kind, part in kinds.items()}
    return report


def overoptimization_curve(scores: Any, gold: Any, ns: Sequence[int]) -> dict[str, np.ndarray]:
    """What the best of n by a proxy is worth to the proxy and to the gold reward, mean over prompts.

    The mean over all subsets of n of the N candidates of a prompt, which is exact and the same for every scheme.

    Parameters
    ----------
    scores : (P, N)
        Proxy, such as the aggregate of an ensemble.
    gold : (P, N)
    ns : numbers from 1 to N

    Returns
    -------
    dict
        ``n``, ``kl`` (``log n - (n - 1) / n``), ``proxy`` and ``gold``, each (len(ns),).

    Raises
    ------
    InvalidInputError
        Shapes that differ, values that are not finite, an n that is no whole number from 1 to N.
    """
    proxy, worth = _scores(scores, "scores"), _scores(gold, "gold")
    if proxy.shape != worth.shape:
        raise InvalidInputError(f"scores have shape {proxy.shape}, gold {worth.shape}: expected the same (P, N)")
    counts = [int(n) for n in ns]
    return {
        "n": np.array(counts),
        "kl": np.array([best_of_n_kl(n) for n in counts]),
        "proxy": np.asarray(expected_best_of_n(proxy, counts)).mean(axis=0),
        "gold": np.asarray(expected_best_of_n(proxy, counts, worth)).mean(axis=0),
    }


def hack_feature_shift(features: Any, picks: Any, reference: Any) -> Any:
    """By how many deviations the picked samples differ in a feature (length, list marks, ink, ...) from a reference.

    Parameters
    ----------
    features : (P, N) or (P, N, F)
        Of all candidates.
    picks : int (P,)
        The candidate that was picked for each prompt.
    reference : (R,) or (R, F), or as `features`
        Of samples before any optimisation.

    Returns
    -------
    float, or (F,)
        ``(mean of the picks - mean of the reference) / deviation of the reference``.

    Raises
    ------
    InvalidInputError
        Shapes that do not fit, or a feature that does not vary in the reference.
    """
    values, chosen, base = (np.asarray(part) for part in (features, picks, reference))
    fits = values.ndim == 2 or (values.ndim == 3 and base.shape[-1:] == values.shape[2:])
    if not fits or chosen.shape != values.shape[:1]:
        raise InvalidInputError(
            f"features must be (P, N) or (P, N, F), picks (P,), reference of the same F, got {values.shape}, "
            f"{chosen.shape}, {base.shape}"
        )
    picked = values[np.arange(len(values)), chosen].astype(np.float64)
    flat = base.reshape(-1) if values.ndim == 2 else base.reshape(-1, values.shape[2])
    deviation = flat.std(axis=0, dtype=np.float64)
    if not (deviation > 0).all():
        raise InvalidInputError("a feature does not vary in the reference, so that its shift has no unit")
    shift = (picked.mean(axis=0) - flat.mean(axis=0, dtype=np.float64)) / deviation
    return float(shift) if values.ndim == 2 else shift


def _scores(scores: Any, name: str) -> np.ndarray:
    array = np.asarray(scores.detach().cpu() if hasattr(scores, "detach") else scores, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise InvalidInputError(f"{name} must have two dimensions and an entry, got shape {array.shape}")
    if not np.isfinite(array).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise InvalidInputError(f"{name}{list(place)} is {array[place]}, expected a finite number")
    return array


def _rank_correlation(scores: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    ranks = rankdata(scores, axis=1)
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(centred, axis=1)
    if not (norms > 0).all():
        raise InvalidInputError(f"member {int((norms == 0).argmax())} gives all samples the same score")
    return np.asarray(centred @ centred.T / np.outer(norms, norms))
