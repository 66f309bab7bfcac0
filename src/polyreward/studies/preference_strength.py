"""Wrong preference labels found by a vote of reward models, on images of digits.

Claim: the strength of a preference, by a vote of 10 reward models fitted to the same data, sorts the data. The weakest
part is mostly labelled wrongly; flipping it, soft labels and margins from the strength make better reward models. The
weakest tenth lowers the accuracy, the middle 40 % alone gives about 80 % (arXiv 2401.06080).

The task. Of two real images (`load_digits`) the larger digit is preferred; a quarter of 1800 labels is wrong. Reward
models are 64-64-64-1 networks. Without noise every flip is an error: that is the control. Beside it, reward models of
upright digits judge shifted, noisy ones: MetaRM with unlabelled shifted images, and contrastive learning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from polyreward.data.preference_strength import PreferenceCleaner
from polyreward.errors import require
from polyreward.preferences import PreferenceData
from polyreward.reward_models.contrastive import Contrastive, DropoutViewsHead
from polyreward.reward_models.encoders import Features
from polyreward.reward_models.heads import TwoLayerHead
from polyreward.reward_models.meta_learning import continue_with_shift
from polyreward.reward_models.model import PreferenceModel
from polyreward.reward_models.strength_voting import StrengthVoting
from polyreward.studies.base import Figures, Judgement, Study, StudyConfig, Verdict, arm, paired_bootstrap

TRAIN_IMAGES, VALIDATION_IMAGES, PAIRS, TEST_PAIRS, CLEAN_PAIRS = 1200, 97, 1800, 5000, 100
NOISE, VOTERS, MODELS = 0.25, 10, 3
EPOCHS, RATE, BATCH = 21, 1e-3, 64
GRID = tuple((rate, epochs) for rate in (3e-4, 1e-3, 3e-3) for epochs in (5, 10, 21))
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4)
ETA, BETA, CONTINUED, SHIFTED_SETS, SHIFT_NOISE = 1.0, 0.1, 5, 300, 0.2
FLIP = PreferenceCleaner(flip_fraction=0.1, margin=False)
TUNED = {
    "vanilla": PreferenceCleaner(flip_fraction=0.0, margin=False),
    "flip 10 %": FLIP,
    "soft": PreferenceCleaner(flip_fraction=0.0, soft="sigmoid", margin=False),
    "margin": PreferenceCleaner(flip_fraction=0.0),
}
BELOW = PreferenceCleaner(flip_below=0.0, margin=False)
OTHERS = {
    "flip 20 %": PreferenceCleaner(flip_fraction=0.2, margin=False),
    "flip below 0": BELOW,
    "smoothing": PreferenceCleaner(flip_fraction=0.0, soft="smooth", margin=False),
    "flip + margin": PreferenceCleaner(flip_fraction=0.1),
    "soft + margin": PreferenceCleaner(flip_fraction=0.0, soft="sigmoid"),
}
CONTROLS = ("vanilla", "flip 10 %", "flip 20 %", "flip below 0", "soft", "margin")


@dataclass(frozen=True)
class Digits:
    """Images (N, 64) in [0, 1] and their digits; the first `TRAIN_IMAGES` are for training."""

    images: np.ndarray
    digits: np.ndarray

    @classmethod
    def shuffled(cls, rng: np.random.Generator) -> Digits:
        """All images in random order."""
        data: Any = require("sklearn.datasets", "tasks")
        found = data.load_digits()
        order = rng.permutation(len(found.target))
        return cls((found.data[order] / 16).astype(np.float32), found.target[order])

    def pairs(self, rng: np.random.Generator, low: int, high: int, count: int) -> np.ndarray:
        """Rows (count, 2) of images in ``[low, high)`` of different digits."""
        first, second = rng.integers(low, high, size=(2, 2 * count + 100))
        apart = self.digits[first] != self.digits[second]
        return np.stack([first[apart], second[apart]], axis=1)[:count]

    def preferences(self, pairs: np.ndarray, wrong: np.ndarray) -> PreferenceData:
        """Comparisons in which the larger digit is the choice, but for those that are `wrong`."""
        larger = (self.digits[pairs[:, 1]] > self.digits[pairs[:, 0]]).astype(np.int64)
        return PreferenceData(np.arange(len(pairs)), pairs.reshape(-1), choice=larger ^ wrong, source="digits")

    def accuracy(self, model: PreferenceModel, pairs: np.ndarray) -> float:
        """Share of pairs in which the larger digit has the higher score; equal scores count half."""
        rows = np.arange(len(self.images))
        score = model.score(rows, rows).numpy()
        ahead = np.sign(score[pairs[:, 0]] - score[pairs[:, 1]])
        larger = np.sign(self.digits[pairs[:, 0]] - self.digits[pairs[:, 1]])
        return float((0.5 + 0.5 * ahead * larger).mean())

    def shifted(self, rng: np.random.Generator) -> Digits:
        """Rolled to the right by one pixel, with noise."""
        rolled = np.roll(self.images.reshape(-1, 8, 8), 1, axis=2).reshape(-1, 64)
        return Digits((rolled + SHIFT_NOISE * rng.normal(size=rolled.shape)).astype(np.float32), self.digits)


def reward_model(images: np.ndarray) -> PreferenceModel:
    """Images to 64, 64 and a score."""
    return PreferenceModel(Features(images), partial(TwoLayerHead, hidden=64, layers=3, activation="relu"))


def fit_options(rate: float = RATE, epochs: int = EPOCHS) -> dict[str, Any]:
    """Adam on batches of 64 without early stopping; 21 epochs are 609 steps."""
    return {
        "epochs": epochs, "batch_size": BATCH, "learning_rate": rate, "weight_decay": 0.0, "clip": None,
        "validation": None,
    }  # fmt: skip


def setting(name: str, rate: float, epochs: int) -> str:
    """Name of an arm at one setting of the grid."""
    return f"{name}, rate {rate:g}, {epochs} epochs"


def run_seed(seed: int, config: StudyConfig) -> Figures:
    """Vote, clean, fit every arm; then the same without noise, and under a shift."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    world = Digits.shuffled(rng)
    quick = config.quick
    count, voters, models = (150, 2, 1) if quick else (PAIRS, VOTERS, MODELS)
    grid = GRID[:1] if quick else GRID
    usual = fit_options(epochs=2) if quick else fit_options()
    pairs = world.pairs(rng, 0, TRAIN_IMAGES, count)
    test = world.pairs(rng, TRAIN_IMAGES + VALIDATION_IMAGES, len(world.images), TEST_PAIRS)
    clean = world.pairs(rng, TRAIN_IMAGES, TRAIN_IMAGES + VALIDATION_IMAGES, CLEAN_PAIRS)
    wrong = rng.random(count) < NOISE
    data = world.preferences(pairs, wrong)
    voting = StrengthVoting(reward_model(world.images), voters)
    votes = voting(data, seed=1000 * seed, **usual)
    figures: dict[str, dict[str, float]] = {"votes": _votes(votes, wrong)}

    def fitted(record: PreferenceData, options: dict[str, Any], which: np.ndarray = test) -> dict[str, float]:
        found = [
            world.accuracy(reward_model(world.images).fit(record, seed=1000 * seed + 500 + m, **options), which)
            for m in range(models)
        ]
        return {"accuracy": float(np.mean(found))}

    for name, cleaner in TUNED.items():
        record = cleaner.clean(data, votes)
        for rate, epochs in grid:
            figures[setting(name, rate, epochs)] = fitted(record, {**usual, "learning_rate": rate, "epochs": epochs})
        figures[name] = fitted(record, usual)
    for name, cleaner in OTHERS.items():
        figures[name] = fitted(cleaner.clean(data, votes), usual)
    mean = votes["mean"]
    rank = mean.argsort().argsort() / count
    for name, part in (
        ("drop 10 %", rank >= 0.1), ("bottom 20 %", rank < 0.2), ("20 to 40 %", (rank >= 0.2) & (rank < 0.4)),
        ("top 20 %", rank >= 0.8),
    ):  # fmt: skip
        figures[name] = fitted(data.select(part), usual)
    figures["vanilla, early stopping"] = fitted(data, {**usual, "validation": 0.1, "patience": 3})
    apart = StrengthVoting(reward_model(world.images), voters, folds=2)(data, seed=1000 * seed, **usual)
    figures["flip below 0, out of fold"] = fitted(BELOW.clean(data, apart), usual)
    figures["votes, out of fold"] = _votes(apart, wrong)
    shares = {
        share: PreferenceCleaner(flip_fraction=share, margin=False).clean(data, votes)
        for share in (SHARES[:2] if quick else SHARES)
    }
    best = max(shares, key=lambda share: fitted(shares[share], usual, clean)["accuracy"])
    figures["flip a share chosen on clean pairs"] = {**fitted(shares[best], usual), "share": best}
    right = world.preferences(pairs, np.zeros(count, bool))
    agreed = voting(right, seed=1000 * seed, **usual)
    figures["votes, no noise"] = {"share below 0": float((agreed["mean"] < 0).mean())}
    for name in CONTROLS:
        figures[f"{name}, no noise"] = fitted({**TUNED, **OTHERS}[name].clean(right, agreed), usual)
    return figures | _shift(seed, rng, world, right, test, usual, models)


def _votes(votes: dict[str, np.ndarray], wrong: np.ndarray) -> dict[str, float]:
    mean, spread = votes["mean"], votes["std"]
    deciles = np.array_split(mean.argsort(), 10)
    found = {f"wrong, decile {i + 1}": float(wrong[rows].mean()) for i, rows in enumerate(deciles)}
    return found | {
        "share below 0": float((mean < 0).mean()),
        "wrong": float(wrong.mean()),
        "rank correlation of s and |mu|": _rank_correlation(spread, np.abs(mean)),
        "wrong pairs found by mu (AUC)": _auc(-mean, wrong),
        "wrong pairs found by s (AUC)": _auc(spread, wrong),
    }


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)


def _auc(score: np.ndarray, wrong: np.ndarray) -> float:
    """Probability that a wrong pair has the higher score; scores have no ties."""
    rank = score.argsort().argsort() + 1
    hits, rest = int(wrong.sum()), int((~wrong).sum())
    return float((rank[wrong].sum() - hits * (hits + 1) / 2) / max(hits * rest, 1))


def _shift(
    seed: int,
    rng: np.random.Generator,
    world: Digits,
    data: PreferenceData,
    test: np.ndarray,
    options: dict[str, Any],
    models: int,
) -> dict[str, dict[str, float]]:
    """Accuracy on shifted images of models of upright ones; the shifted images follow the upright ones in the table."""
    moved, size = world.shifted(rng), len(world.images)
    both = Digits(np.concatenate([world.images, moved.images]), np.concatenate([world.digits, moved.digits]))
    rows = size + rng.integers(TRAIN_IMAGES, size=(SHIFTED_SETS, 4))
    unlabelled = PreferenceData(np.arange(SHIFTED_SETS), rows.reshape(-1), np.arange(SHIFTED_SETS + 1) * 4)
    encoder = Features(both.images)
    head = partial(DropoutViewsHead, hidden=64, layers=2, activation="relu", dropout=0.1)
    more = {**options, "epochs": min(CONTINUED, options["epochs"])}
    found: dict[str, list[PreferenceModel]] = {}
    for number in range(models):
        at = 1000 * seed + 700 + number
        start = reward_model(both.images).fit(data, seed=at, **options)
        made = {
            "shift, vanilla": start,
            "shift, continued": continue_with_shift(start, data, unlabelled, eta=0.0, seed=at, **more),
            "shift, MetaRM": continue_with_shift(start, data, unlabelled, eta=ETA, seed=at, **more),
            "shift, dropout": PreferenceModel(encoder, head),
            "shift, SimCSE of pairs": PreferenceModel(encoder, head, Contrastive(beta=BETA)),
            "shift, SimCSE of differences": PreferenceModel(encoder, head, Contrastive(view="difference", beta=BETA)),
            "shift, SwAV": PreferenceModel(encoder, head, Contrastive(kind="swav", width=64, beta=BETA)),
        }
        for name, model in made.items():
            if model.head is None:
                model.fit(data, seed=at, **options)
            found.setdefault(name, []).append(model)
    return {
        name: {
            "accuracy": float(np.mean([both.accuracy(model, test + size) for model in group])),
            "accuracy, upright": float(np.mean([both.accuracy(model, test) for model in group])),
        }
        for name, group in found.items()
    }


def judge(runs: Sequence[Figures]) -> Judgement:
    """Apply `STUDY.rule`."""

    def at_best(name: str) -> np.ndarray:
        known = [setting(name, rate, epochs) for rate, epochs in GRID if setting(name, rate, epochs) in runs[0]]
        return max((arm(runs, each, "accuracy") for each in known), key=lambda values: float(values.mean()))

    def mean(name: str) -> float:
        return float(arm(runs, name, "accuracy").mean())

    deciles = np.array([arm(runs, "votes", f"wrong, decile {i}").mean() for i in range(1, 11)])
    decline = _rank_correlation(np.arange(10), deciles) if np.ptp(deciles) > 0 else 0.0
    best = {name: at_best(name) for name in TUNED}
    gains = {name: paired_bootstrap(best[name], best["vanilla"]) for name in TUNED if name != "vanilla"}
    usual = {
        name: paired_bootstrap(arm(runs, name, "accuracy"), arm(runs, "vanilla", "accuracy"))
        for name in (*list(TUNED)[1:], *OTHERS, "drop 10 %", "flip a share chosen on clean pairs",
                     "vanilla, early stopping", "flip below 0, out of fold")
    }  # fmt: skip
    control = {name: mean(f"{name}, no noise") - mean("vanilla, no noise") for name in CONTROLS[1:]}
    shift = {
        name: mean(f"shift, {name}") - mean(f"shift, {base}")
        for name, base in (
            ("MetaRM", "continued"), ("SimCSE of pairs", "vanilla"), ("SimCSE of differences", "vanilla"),
            ("SwAV", "vanilla"),
        )
    }  # fmt: skip
    weakest = mean("bottom 20 %")
    checks = {
        "at least 80 % of the weakest decile is wrong": bool(deciles[0] >= 0.8),
        "the share of wrong labels falls over the deciles (Spearman at most -0.9)": decline <= -0.9,
        **{f"{name} above vanilla, both at their best setting": bool(g[1][0] > 0) for name, g in gains.items()},
        "fitted to the weakest 20 % alone below chance": weakest < 0.5,
        "without noise, flipping 10 % costs at least 0.015": control["flip 10 %"] <= -0.015,
        "without noise, flipping below 0 and soft labels cost at most 0.012": min(
            control["flip below 0"], control["soft"]
        )
        >= -0.012,
        "under a shift nothing loses more than 0.01": min(shift.values()) >= -0.01,
    }
    effect, interval = gains["flip 10 %"]
    refuted = effect <= 0 or deciles[0] < 0.5
    verdict: Verdict = "supported" if all(checks.values()) else "not supported" if refuted else "inconclusive"

    def listed(figures: dict[str, tuple[float, tuple[float, float]]]) -> str:
        return ", ".join(f"{name} {e:+.3f} [{low:.3f}, {high:.3f}]" for name, (e, (low, high)) in figures.items())

    votes = {name: arm(runs, "votes", name).mean() for name in runs[0]["votes"]}
    chosen = arm(runs, "flip a share chosen on clean pairs", "share").mean()
    summary = (
        f"Share of wrong labels by decile of strength: {', '.join(f'{d:.2f}' for d in deciles)} (of all "
        f"{votes['wrong']:.3f}; below 0 {votes['share below 0']:.3f}). Each at its best of {len(GRID)} settings, "
        f"vanilla {best['vanilla'].mean():.3f}: {listed(gains)}. At rate 1e-3 and 21 epochs, vanilla "
        f"{mean('vanilla'):.3f}: {listed(usual)}; the chosen share is {chosen:.2f}. Fitted to the bottom 20 % "
        f"{weakest:.3f}, 20 to 40 % {mean('20 to 40 %'):.3f}, top 20 % {mean('top 20 %'):.3f}. Without noise, vanilla "
        f"{mean('vanilla, no noise'):.3f}: " + ", ".join(f"{n} {v:+.3f}" for n, v in control.items()) + "; below 0 "
        f"{arm(runs, 'votes, no noise', 'share below 0').mean():.3f}. Wrong pairs are found by mu with AUC "
        f"{votes['wrong pairs found by mu (AUC)']:.2f}, by s with {votes['wrong pairs found by s (AUC)']:.2f}; s and "
        f"|mu| correlate at {votes['rank correlation of s and |mu|']:.2f}. On shifted images, vanilla "
        f"{mean('shift, vanilla'):.3f}, dropout alone {mean('shift, dropout'):.3f}, continued "
        f"{mean('shift, continued'):.3f}, MetaRM {mean('shift, MetaRM'):.3f}, SimCSE of pairs "
        f"{mean('shift, SimCSE of pairs'):.3f}, of differences {mean('shift, SimCSE of differences'):.3f}, SwAV "
        f"{mean('shift, SwAV'):.3f}."
    )
    return Judgement(verdict, effect, interval, summary, checks)


STUDY = Study(
    slug="14-secrets-rm",
    method="secrets-rm",
    claim="Strength by a vote of 10 reward models sorts preferences: the weakest are mostly labelled wrongly (the "
    "bottom 10 % lowers validation accuracy, the middle 40 % alone gives about 80 %), and flipping, soft labels and "
    "margins from it make better reward models (arXiv 2401.06080).",
    task="1800 pairs of 1200 images of digits, the larger digit preferred, 25 % of the labels wrong; 5000 clean pairs "
    "of 500 other images as test. Control without noise. Shift: images rolled by a pixel, with noise of 0.2.",
    baselines="The same network on the data as they are, at rates 3e-4, 1e-3, 3e-3 and 5, 10, 21 epochs, of which "
    "every judged arm has its best; dropping the bottom 10 %, label smoothing, early stopping on noisy labels, a flip "
    "share chosen on 100 clean pairs. For MetaRM, going on without unlabelled images.",
    measure="Accuracy on clean test pairs, mean of 3 reward models; share of wrong labels by decile of strength.",
    rule="Supported: at least 80 % of the weakest decile wrong, Spearman of deciles and their share of wrong labels "
    "at most -0.9, flip 10 %, soft and margin each above vanilla with the interval above 0, all at their best setting, "
    "a model of the weakest 20 % below chance, without noise a cost of flipping 10 % of at least 0.015 and of flipping "
    "below 0 and soft labels of at most 0.012, and under the shift no loss above 0.01. Not supported: flip 10 % not "
    "above vanilla, or less than half of the weakest decile wrong. Otherwise inconclusive.",
    effect="accuracy, flip 10 % - vanilla, each at its best setting",
    full_scale="Llama-2-7B on HH-RLHF with 10 voters, validation labels cleaned by GPT-4, PPO, three to four rounds of "
    "MetaRM; 8 x 80 GB.",
    seeds=5,
    run_seed=run_seed,
    judge=judge,
    config={
        "pairs": PAIRS, "noise": NOISE, "voters": VOTERS, "reward models": MODELS, "epochs": EPOCHS, "rate": RATE,
        "batch": BATCH, "grid": [list(each) for each in GRID], "flip shares": list(SHARES), "eta": ETA, "beta": BETA,
        "epochs continued": CONTINUED,
    },
)  # fmt: skip
