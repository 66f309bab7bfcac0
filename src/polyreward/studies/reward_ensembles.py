"""Reward-model ensembles by seed of pretraining and of fine-tuning, on images of digits with dead pixels.

Claim: members that differ by the seed of pretraining make better ensembles than members that differ by the seed of
fine-tuning, both are better than single reward models, and neither removes an error that all members share: win rates
of the best of 64 are 90.0, 87.3 and 85.3 % (arXiv 2312.09244).

The task. Real images (`load_digits`, 8 x 8, pixels divided by 16) whose columns 0, 1 and 7 are 0 in everything a model
is trained on. Pretraining is a masked-pixel autoencoder 64-64-64-64, fine-tuning Bradley-Terry with centring on 600
noisy preferences between images. The policy's shift fills the dead columns: no gradient ever reached their weights, so
they are what the seed of pretraining drew, the same for all members of one pretraining. The gold reward reads the live
columns alone. Labels with a liking for ink are the error that all members share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyreward.errors import require
from polyreward.preferences import PreferenceData
from polyreward.reward_models.ensembles import RewardEnsemble, aggregate_rewards
from polyreward.reward_models.heads import TwoLayerHead
from polyreward.reward_models.likelihoods import BradleyTerry
from polyreward.reward_models.model import PreferenceModel
from polyreward.reward_models.over_optimisation import (
    EnsembleSplit,
    hack_feature_shift,
    overoptimization_curve,
    underspecification_report,
)
from polyreward.studies.base import Figures, Judgement, Study, StudyConfig, Verdict, arm, paired_bootstrap

DEAD = (0, 1, 7)
PRETRAINS, FINETUNES = 5, 5
TRAIN_IMAGES, PAIRS, PRETRAIN_STEPS, EPOCHS, BATCH, RATE = 1000, 600, 300, 30, 64, 1e-3
CENTERING, STEEPNESS, MASKED = 0.01, 3.0, 0.25
PROMPTS, CANDIDATES, FILL, FAR_FILL = 100, 256, 4.0, 8.0
NS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TEMPERATURES = (2.0, 1.0, 0.5, 0.25, 0.1)
INK_BIAS = 0.5 / 3
AT = NS.index(64)


class PixelEncoder(nn.Module):
    """The encoder of a pretrained autoencoder: images, named by row, to 64 features, learning with the head."""

    identity, width = "pixels", 64

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.network, self.images = network, images

    def forward(self, prompts: Sequence[int], responses: Sequence[int], comparison: Tensor | None = None) -> Tensor:
        """Features (M, 64) of the images `responses`."""
        features: Tensor = self.network(self.images[torch.as_tensor(np.asarray(responses))])
        return features

    @torch.no_grad()
    def encode(self, prompts: Sequence[int], responses: Sequence[int]) -> np.ndarray:
        """The same without gradient."""
        return np.asarray(self(prompts, responses).cpu().numpy())


def digits(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 8, 8) in [0, 1] with dead columns, for training and held out."""
    data: Any = require("sklearn.datasets", "tasks")
    images = data.load_digits().images.astype(np.float32) / 16
    images[:, :, list(DEAD)] = 0
    images = images[rng.permutation(len(images))]
    return images[:TRAIN_IMAGES], images[TRAIN_IMAGES:]


def gold_reward(images: np.ndarray, mean_ink: float) -> np.ndarray:
    """Difference of ink above and below, and left and right, less what is far from usual; of the live columns."""
    live = np.delete(images, DEAD, axis=-1)
    ink = live.sum(axis=(-1, -2))
    above = live[..., :4, :].sum(axis=(-1, -2)) - live[..., 4:, :].sum(axis=(-1, -2))
    aside = live[..., :2].sum(axis=(-1, -2)) - live[..., 3:].sum(axis=(-1, -2))
    return np.asarray(above / 4 + 0.6 * np.tanh(aside / 2) - 0.002 * (ink - mean_ink) ** 2)


def pretrain(images: Tensor, seed: int, steps: int) -> nn.Module:
    """Encoder of an autoencoder that restores masked pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        decoder = nn.Linear(64, 64)
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=RATE)
        for _ in range(steps):
            batch = images[torch.randint(len(images), (BATCH,))]
            seen = batch * (torch.rand_like(batch) >= MASKED)
            loss = (decoder(encoder(seen)) - batch).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return encoder


def fit_members(
    images: Tensor, data: PreferenceData, encoders: Sequence[nn.Module], finetunes: int, epochs: int, seed: int
) -> RewardEnsemble:
    """A member for every pretraining and fine-tuning seed, in the order of `EnsembleSplit.grid`."""
    members = []
    for network in encoders:
        for finetune in range(finetunes):
            # the encoder is copied by value: every fine-tuning starts from the same pretraining
            copy = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
            copy.load_state_dict(network.state_dict())
            model = PreferenceModel(PixelEncoder(copy, images), _random_linear, BradleyTerry(centering=CENTERING))
            model.fit(
                data, epochs=epochs, batch_size=BATCH, learning_rate=RATE, encoder_learning_rate=RATE, weight_decay=0.0,
                clip=None, validation=None, seed=1000 * seed + finetune,
            )  # fmt: skip
            members.append(model)
    return RewardEnsemble(members)


def _random_linear(width: int) -> nn.Module:
    return TwoLayerHead(width, layers=1)


def run_seed(seed: int, config: StudyConfig) -> Figures:
    """Train all members on true and on biased labels, and compare the schemes on shifted candidates."""
    torch.set_num_threads(1)
    quick = config.quick
    pretrains, finetunes = (2, 2) if quick else (PRETRAINS, FINETUNES)
    epochs, prompts = (2, 5) if quick else (EPOCHS, PROMPTS)
    rng = np.random.default_rng(seed)
    train, held = digits(rng)
    mean_ink = float(train.sum(axis=(1, 2)).mean())
    first, second = rng.integers(TRAIN_IMAGES, size=(2, PAIRS))
    second = np.where(first == second, (second + 1) % TRAIN_IMAGES, second)
    worth, ink = gold_reward(train, mean_ink), train.sum(axis=(1, 2))
    uniform = rng.random(PAIRS)

    def labelled(value: np.ndarray) -> PreferenceData:
        lost = uniform > 1 / (1 + np.exp(-STEEPNESS * (value[first] - value[second])))
        return PreferenceData(np.arange(PAIRS), np.stack([first, second], 1).reshape(-1), choice=lost.astype(int))

    images = torch.from_numpy(train.reshape(-1, 64))
    steps = 30 if quick else PRETRAIN_STEPS
    encoders = [pretrain(images, 100 * seed + p, steps) for p in range(pretrains)]
    split = EnsembleSplit.grid(pretrains, finetunes)
    draw = rng.integers(len(held), size=(prompts, CANDIDATES))
    filled = rng.random((prompts, CANDIDATES, 8, len(DEAD)), dtype=np.float32)
    gold = gold_reward(held[draw], mean_ink)
    unit = (gold - gold.mean()) / gold.std()
    figures: dict[str, dict[str, float]] = {}
    ensemble = fit_members(images, labelled(worth), encoders, finetunes, epochs, seed)
    inside = _score(ensemble, held)
    figures["members"] = _accuracies(inside, gold_reward(held, mean_ink), rng)
    for name, fill in (("", FILL), (", far", FAR_FILL), (", no shift", 0.0)):
        scores = _scaled(inside, _score(ensemble, _shifted(held[draw], filled * fill)))
        figures |= {f"{scheme}{name}": part for scheme, part in _schemes(scores, unit, split).items()}
        report = underspecification_report(inside, scores.reshape(len(scores), -1), split)
        figures[f"rank correlation{name}"] = {
            f"{where}, {kind}": report[key][kind]
            for where, key in (("in distribution", "rank_corr_id"), ("candidates", "rank_corr_ood"))
            for kind in ("same_pretrain", "different_pretrain")
        }
    biased = fit_members(images, labelled(worth + INK_BIAS * (ink - mean_ink)), encoders, finetunes, epochs, seed)
    liked = _scaled(_score(biased, held), _score(biased, held[draw]))
    live_ink = held[draw].sum(axis=(-1, -2))
    for scheme, members in (("single", [[m] for m in range(len(liked))]), ("pretrain", split.pretrain_ensembles())):
        picks = [liked[m, :, : NS[AT]].mean(axis=0).argmax(axis=1) for m in members]
        shift = [hack_feature_shift(live_ink, pick, live_ink) for pick in picks]
        figures[f"{scheme}, labels that like ink"] = {"ink": float(np.mean(shift))}
    figures["oracle, labels that like ink"] = {
        "ink": hack_feature_shift(live_ink, unit[:, : NS[AT]].argmax(axis=1), live_ink)
    }
    return figures


def _shifted(images: np.ndarray, fill: np.ndarray) -> np.ndarray:
    shifted = images.copy()
    shifted[..., list(DEAD)] = fill
    return shifted


def _score(ensemble: RewardEnsemble, images: np.ndarray) -> np.ndarray:
    """Scores of every member, (M, ...)."""
    flat = torch.from_numpy(np.ascontiguousarray(images.reshape(-1, 64)))
    for member in ensemble.members:
        member.encoder.images = flat
    rows = np.arange(len(flat))
    return np.asarray(ensemble.member_scores(rows, rows).numpy().reshape(-1, *images.shape[:-2]), dtype=np.float64)


def _scaled(inside: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Every member with mean 0 and deviation 1 on the held-out images as in training."""
    shape = (-1, *[1] * (scores.ndim - 1))
    return np.asarray((scores - inside.mean(axis=1).reshape(shape)) / inside.std(axis=1).reshape(shape))


def _accuracies(inside: np.ndarray, gold: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
    left, right = rng.integers(len(gold), size=(2, 4000))
    better = gold[left] > gold[right]
    accuracy = ((inside[:, left] > inside[:, right]) == better)[:, left != right].mean(axis=1)
    return {"accuracy": float(accuracy.mean()), "largest distance": float(np.abs(accuracy - accuracy.mean()).max())}


def _schemes(scores: np.ndarray, gold: np.ndarray, split: EnsembleSplit) -> dict[str, dict[str, float]]:
    """Gold reward of what each scheme picks, mean over the ensembles of the scheme; scores (M, P, N)."""
    ns = [n for n in NS if n <= gold.shape[1]]
    flat = scores.reshape(len(scores), -1)
    schemes = {
        "single": [np.array([m]) for m in range(len(scores))],
        "fine-tune": split.finetune_ensembles(),
        "pretrain": split.pretrain_ensembles(),
    }
    figures: dict[str, dict[str, float]] = {}
    for scheme, ensembles in schemes.items():
        for how in ("mean", "median", "min", "mean_minus_std") if scheme != "single" else ("mean",):
            curves, tilted = [], []
            for members in ensembles:
                proxy = aggregate_rewards(flat[members], how).reshape(gold.shape)
                curves.append(overoptimization_curve(proxy, gold, ns)["gold"])
                tilted.append(_regularised(proxy, gold))
            name = scheme if how == "mean" else f"{scheme} ({how.replace('_', ' ')})"
            figures[name] = {f"gold at {n}": float(v) for n, v in zip(ns, np.mean(curves, axis=0), strict=True)}
            figures[name] |= {
                f"gold at temperature {t:g}": float(v)
                for t, v in zip(TEMPERATURES, np.mean(tilted, axis=0), strict=True)
            }
    oracle = overoptimization_curve(gold, gold, ns)["gold"]
    figures["oracle"] = {f"gold at {n}": float(v) for n, v in zip(ns, oracle, strict=True)}
    own, other = [], []
    for member in range(len(scores)):
        apart = np.flatnonzero(split.pretrain_ids != split.pretrain_ids[member])
        own.append(overoptimization_curve(scores[member], scores[member], ns)["proxy"][min(AT, len(ns) - 1)])
        others = scores[apart].mean(axis=0)
        other.append(overoptimization_curve(scores[member], others, ns)["gold"][min(AT, len(ns) - 1)])
    # in deviations of each member's own scores on these candidates
    spread = float(scores.std(axis=(1, 2)).mean())
    figures["single"] |= {"own reward": float(np.mean(own)) / spread, "other reward": float(np.mean(other)) / spread}
    return figures


def _regularised(proxy: np.ndarray, gold: np.ndarray) -> list[float]:
    """Gold reward of the policy that maximises proxy less temperature times divergence from uniform, exactly."""
    found = []
    for temperature in TEMPERATURES:
        weights = np.exp((proxy - proxy.max(axis=1, keepdims=True)) / temperature)
        found.append(float(((weights * gold).sum(axis=1) / weights.sum(axis=1)).mean()))
    return found


def judge(runs: Sequence[Figures]) -> Judgement:
    """Apply `STUDY.rule`."""
    gold = {name: arm(runs, name, "gold at 64") for name in ("single", "fine-tune", "pretrain", "oracle")}
    effect, interval = paired_bootstrap(gold["pretrain"], gold["fine-tune"])
    gain, gain_interval = paired_bootstrap(gold["fine-tune"], gold["single"])
    correlation = {
        where: arm(runs, "rank correlation", f"{where}, different_pretrain").mean()
        for where in ("in distribution", "candidates")
    }
    same = arm(runs, "rank correlation", "candidates, same_pretrain").mean()
    accuracy = arm(runs, "members", "accuracy").mean()
    apart = arm(runs, "members", "largest distance").max()
    gap = arm(runs, "single", "own reward") - arm(runs, "single", "other reward")
    ink = {name: arm(runs, f"{name}, labels that like ink", "ink").mean() for name in ("single", "pretrain", "oracle")}
    kept = ink["pretrain"] / ink["single"] if ink["single"] > 0 else 0.0
    checks = {
        "different pretrainings agree less on candidates, by at least 0.15": bool(
            correlation["in distribution"] - correlation["candidates"] >= 0.15
        ),
        "accuracies of the members within 0.02 of their mean": bool(apart <= 0.02),
        "own reward of the best of 64 at least 0.3 above that of others": bool(gap.mean() >= 0.3),
        "pretrain - fine-tune at least 0.08, interval above 0": effect >= 0.08 and interval[0] > 0,
        "fine-tune - single at least 0.03, interval above 0": gain >= 0.03 and gain_interval[0] > 0,
        "the pretrain ensemble keeps 80 % of the shared liking for ink": bool(kept >= 0.8),
    }
    refuted = interval[1] < 0 or gain_interval[1] < 0 or kept < 0.4
    verdict: Verdict = "supported" if all(checks.values()) else "not supported" if refuted else "inconclusive"
    control = {
        name: arm(runs, f"{name}, no shift", "gold at 64").mean() for name in ("single", "fine-tune", "pretrain")
    }
    far = {name: arm(runs, f"{name}, far", "gold at 64").mean() for name in ("single", "fine-tune", "pretrain")}
    every = {name: arm(runs, name, "gold at 256").mean() for name in gold}
    ways = {
        how: [arm(runs, f"{name} ({how})", "gold at 64").mean() for name in ("fine-tune", "pretrain")]
        for how in ("median", "min", "mean minus std")
    }
    tilt = {
        name: max(arm(runs, name, f"gold at temperature {t:g}").mean() for t in TEMPERATURES)
        for name in ("single", "fine-tune", "pretrain")
    }

    def listed(figures: dict[str, Any]) -> str:
        return ", ".join(f"{name} {float(np.mean(value)):.2f}" for name, value in figures.items())

    summary = (
        f"Gold reward of the best of 64, in deviations: {listed(gold)}; pretrain - fine-tune {effect:+.3f} "
        f"[{interval[0]:.3f}, {interval[1]:.3f}], fine-tune - single {gain:+.3f} [{gain_interval[0]:.3f}, "
        f"{gain_interval[1]:.3f}]. Best of 256: {listed(every)}. Aggregates at 64, fine-tune and pretrain: "
        + ", ".join(f"{how} {a:.2f} and {b:.2f}" for how, (a, b) in ways.items())
        + f". Accuracy of the members {accuracy:.3f}, at most {apart:.3f} from their mean; rank correlation of "
        f"different pretrainings {correlation['in distribution']:.3f} in distribution, {correlation['candidates']:.3f} "
        f"on candidates (same pretraining {same:.3f}). Own less other reward {gap.mean():.2f}. Fill to 8: {listed(far)}"
        f"; without shift: {listed(control)}. Regularised policy at its best temperature: {listed(tilt)}. Ink of the "
        f"picks where labels like ink: {listed(ink)}; the pretrain ensemble keeps {kept:.0%}."
    )
    return Judgement(verdict, effect, interval, summary, checks)


STUDY = Study(
    slug="09-reward-ensembles",
    method="reward-ensembles",
    claim="Ensembles over pretraining seeds resist over-optimisation better than ensembles over fine-tuning seeds, "
    "these better than single reward models, and neither removes errors that the members share: win rates at the best "
    "of 64 of 90.0, 87.3 and 85.3 % (arXiv 2312.09244).",
    task="Preferences between images of digits with three dead columns; candidates whose dead columns are filled with "
    "noise from 0 to 4; a gold reward of the live columns.",
    baselines="Single reward models and fine-tune ensembles of 5, of the same members as the pretrain ensembles: 25 "
    "members of 5 pretrainings and 5 fine-tunings, the same data, steps and learning rate. Mean aggregate; median, "
    "min and mean - std beside it.",
    measure="Gold reward, in deviations over the candidates, of the best of 64 by each scheme, exact over all subsets "
    "of 256 candidates of 100 prompts, mean over the scheme's ensembles. Members have mean 0 and deviation 1 on "
    "held-out images.",
    rule="Supported: rank correlation of different pretrainings at least 0.15 lower on candidates than in "
    "distribution, accuracies within 0.02 of their mean, own less other reward at least 0.3, pretrain - "
    "fine-tune at least 0.08 and fine-tune - single at least 0.03 with intervals above 0, and the pretrain "
    "ensemble's shift in ink at least 80 % of the single models' where labels like ink. Not supported: either "
    "difference below 0 with its interval, or less than 40 % of the shift. Otherwise inconclusive. Fill to 8, no "
    "shift and the regularised policy are reported beside it.",
    effect="gold reward at the best of 64, pretrain - fine-tune ensemble, in deviations",
    full_scale="T5-XL reward models of 5 pretraining seeds on TL;DR and helpfulness, T5-XXL and a judge as evaluators, "
    "best of 64 and PPO over several KL weights; 8 x 80 GB.",
    seeds=5,
    run_seed=run_seed,
    judge=judge,
    config={
        "pretrainings": PRETRAINS,
        "fine-tunings": FINETUNES,
        "pairs": PAIRS,
        "pretraining steps": PRETRAIN_STEPS,
        "epochs": EPOCHS,
        "batch": BATCH,
        "rate": RATE,
        "centering": CENTERING,
        "steepness": STEEPNESS,
        "masked": MASKED,
        "prompts": PROMPTS,
        "candidates": CANDIDATES,
        "fill": FILL,
        "ink bias": INK_BIAS,
    },
)
