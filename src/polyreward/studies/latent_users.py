"""Variational preference learning: people whose goals are opposed, real images, a grid world, and real dialogues.

Claim: a reward conditioned on a latent user that is inferred from a few comparisons serves people whose preferences
conflict, where a Bradley-Terry reward is at chance on what they disagree about and its policy serves nobody; rewards
of the pairwise form (VPL-SPO) have about the same range for every user, plain ones do not (arXiv 2408.10075).

The task. Points of the unit square; a person's goal is one of 2 opposite or all 4 corners, and nearer is better. A set
is 8 labelled pairs of one person, whose kind no model is told. All figures are of people who took no part in training,
on new pairs; what is disagreed about are pairs that not all kinds would order alike. A policy in a grid world follows
value iteration on the reward. The same with images of digits, whose kinds prefer what is near the mean image of a
digit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import require
from polyreward.preferences import PreferenceData
from polyreward.reward_models.distributional_preferences import CategoricalPreference, MeanVariance
from polyreward.reward_models.encoders import Features
from polyreward.reward_models.heads import TwoLayerHead
from polyreward.reward_models.latent_training import fit_sets
from polyreward.reward_models.latent_user_head import LatentUserHead, infer_annotators
from polyreward.reward_models.latent_users import (
    CyclicalAnnealer,
    LatentReward,
    PairwiseLatentPreference,
    VariationalPreferences,
    VPLLoss,
    active_units,
)
from polyreward.reward_models.likelihoods import BradleyTerry
from polyreward.reward_models.model import PreferenceModel
from polyreward.reward_models.preference_sets import PreferenceSetEncoder
from polyreward.studies.base import (
    Figures,
    Judgement,
    Study,
    StudyConfig,
    Verdict,
    arm,
    best_rate,
    paired_bootstrap,
    rated,
)
from polyreward.studies.latent_user_dialogues import dialogue_figures

SETS, HELD, PAIRS, ASKED = 2000, 500, 8, 20
WIDTH, LATENT, BETA, CYCLES, EPOCHS, BATCH, RATE = 64, 8, 0.2, 4, 100, 64, 1e-3
RATES = (1e-3, 1e-2)
HEAD_EPOCHS, HEAD_RATE = 30, 3e-3
ROWS, COLUMNS, DISCOUNT, WALK, WALKERS = 9, 12, 0.95, 40, 20
DRAWS, STATES = 200, 1000
DIGITS = (0, 1, 2, 3)
CORNERS = ((0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0))
HH_FILE = "preferences/hh_rlhf_relabeled_both_test.jsonl.gz"

Sets = tuple[Tensor, Tensor, Tensor, Tensor]
"""First and second items (S, N, d), labels (S, N), kind (S,)."""


def distances(items: Tensor, goals: Tensor) -> Tensor:
    """Minus distance of items (..., d) to each of K goals, (..., K): what each kind of person finds an item worth."""
    return -(items.unsqueeze(-2) - goals).norm(dim=-1)


def draw_sets(sample: Callable[..., Tensor], goals: Tensor, sets: int, pairs: int, generator: Any) -> Sets:
    """Labelled pairs of people whose kinds are drawn evenly."""
    kinds = torch.randint(len(goals), (sets,), generator=generator)
    first, second = (sample(sets, pairs, generator) for _ in range(2))
    worth = [distances(items, goals)[torch.arange(sets), :, kinds] for items in (first, second)]
    return first, second, (worth[0] > worth[1]).float(), kinds


def disputed(first: Tensor, second: Tensor, goals: Tensor) -> Tensor:
    """Pairs that not all kinds order alike, bool (...,)."""
    wins = distances(first, goals) > distances(second, goals)
    return wins.any(dim=-1) & ~wins.all(dim=-1)


def uniform(sets: int, pairs: int, generator: Any) -> Tensor:
    """Points of the unit square."""
    return torch.rand(sets, pairs, 2, generator=generator)


def fit_latent(
    train: Sets, seed: int, epochs: int, kind: Any = "concat", pairwise: bool = False
) -> VariationalPreferences:
    """Variational preference learning with the paper's objective."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        d = train[0].shape[-1]
        decoder = (PairwiseLatentPreference if pairwise else LatentReward)(d, LATENT, WIDTH)
        encoder = PreferenceSetEncoder(kind, d, LATENT, WIDTH, PAIRS if kind == "concat" else None, clamp=None)
        annealer = CyclicalAnnealer(epochs, CYCLES, "cosine", scale=BETA)
        model = VariationalPreferences(encoder, decoder, VPLLoss(annealer, "learned", d_latent=LATENT))
    generator = torch.Generator().manual_seed(seed)
    fit_sets(model, *train[:3], epochs=epochs, batch_size=BATCH, learning_rate=RATE, generator=generator)
    return model


@torch.no_grad()
def latent_figures(model: VariationalPreferences, context: Sets, asked: Sets, goals: Tensor) -> dict[str, float]:
    """Accuracy on new pairs of unseen people, and whether the latent is used."""
    mean, log_variance = model.encode(*context[:3])
    logits = model.logits(asked[0], asked[1], model.latent(mean))
    kl = float(model.objective.prior.kl(mean, log_variance).mean())
    return _accuracies(logits, asked, goals) | {"kl": kl, "active units": float(active_units(mean))}


def _accuracies(difference: Tensor, asked: Sets, goals: Tensor) -> dict[str, float]:
    right = ((difference > 0) == (asked[2] > 0.5)).float()
    there = disputed(asked[0], asked[1], goals)
    return {"accuracy": float(right.mean()), "disputed": float(right[there].mean())}


def _as_data(sets: Sets, first_person: int = 0) -> PreferenceData:
    """Sets as comparisons of one annotator a set; items are numbered by set, pair and place."""
    count, pairs = sets[2].shape
    people = np.repeat(np.arange(count), pairs) + first_person
    choice = (1 - sets[2]).long().reshape(-1).numpy()
    return PreferenceData(
        np.arange(count * pairs), np.arange(count * pairs * 2), choice=choice, annotators=people.tolist()
    )


def _flat(sets: Sets) -> np.ndarray:
    return np.asarray(torch.stack(sets[:2], dim=2).reshape(-1, sets[0].shape[-1]).numpy())


def fit_single(train: Sets, seed: int, epochs: int, rate: float, likelihood: Any = None) -> PreferenceModel:
    """One reward for all people, on the same comparisons."""
    likelihood = BradleyTerry() if likelihood is None else likelihood
    head = partial(TwoLayerHead, hidden=WIDTH, layers=4, outputs=getattr(likelihood, "outputs", 1))
    model = PreferenceModel(Features(_flat(train)), head, likelihood)
    return model.fit(
        _as_data(train),
        epochs=epochs,
        batch_size=1600,
        learning_rate=rate,
        weight_decay=0.0,
        validation=None,
        seed=seed,
    )


def _score(model: PreferenceModel, items: Tensor, annotator: Any = None) -> Tensor:
    model.encoder = Features(items.reshape(-1, items.shape[-1]).numpy())
    rows = np.arange(items[..., 0].numel())
    return model.score(rows, rows, annotator).view(items.shape[:-1])


def head_figures(train: Sets, context: Sets, asked: Sets, goals: Tensor, seed: int, epochs: int) -> dict[str, float]:
    """The same by `LatentUserHead` in the shared fit: people are annotators, new ones are inferred without training."""
    model = PreferenceModel(Features(_flat(train)), partial(LatentUserHead, latent=LATENT, hidden=WIDTH, layers=3))
    model.fit(
        _as_data(train), epochs=epochs, batch_size=1024, learning_rate=HEAD_RATE, weight_decay=0.0, validation=None,
        seed=seed,
    )  # fmt: skip
    head: Any = model.head
    used = {"kl": head.kl(), "active units": float(head.active_units())}
    model.encoder = Features(_flat(context))
    infer_annotators(model, _as_data(context, len(train[0])))
    names = np.repeat(np.arange(len(context[0])) + len(train[0]), asked[2].shape[1]).tolist()
    difference = _score(model, asked[0], names) - _score(model, asked[1], names)
    return _accuracies(difference, asked, goals) | used


def cells() -> Tensor:
    """Centres of the grid world's cells in the unit square, (108, 2)."""
    row, column = np.divmod(np.arange(ROWS * COLUMNS), COLUMNS)
    return torch.tensor(np.stack([(row + 0.5) / ROWS, (column + 0.5) / COLUMNS], axis=1), dtype=torch.float32)


def moves() -> np.ndarray:
    """Cell that each of staying and the four steps leads to, int64 (108, 5); walls keep one where one is."""
    row, column = np.divmod(np.arange(ROWS * COLUMNS), COLUMNS)
    steps = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
    ends = [(np.clip(row + i, 0, ROWS - 1), np.clip(column + j, 0, COLUMNS - 1)) for i, j in steps]
    return np.stack([i * COLUMNS + j for i, j in ends], axis=1)


def arrivals(rewards: np.ndarray) -> np.ndarray:
    """Where the greedy policies of value iteration end from every cell: rewards (U, 108) -> cells (U, 108)."""
    ends = moves()
    value = np.zeros_like(rewards, dtype=np.float64)
    for _ in range(400):
        value = (rewards + DISCOUNT * value)[:, ends].max(axis=2)
    choice = np.take_along_axis(ends[None], (rewards + DISCOUNT * value)[:, ends].argmax(axis=2)[..., None], axis=2)
    at = np.broadcast_to(np.arange(ROWS * COLUMNS), rewards.shape)
    for _ in range(WALK):
        at = np.take_along_axis(choice[..., 0], at, axis=1)
    return np.asarray(at)


def success(rewards: np.ndarray, goal: int) -> float:
    """Share of users and starts that end within a cell of the goal."""
    at, wanted = np.divmod(arrivals(rewards), COLUMNS), np.divmod(goal, COLUMNS)
    return float(((np.abs(at[0] - wanted[0]) <= 1) & (np.abs(at[1] - wanted[1]) <= 1)).mean())


@torch.no_grad()
def range_figures(model: VariationalPreferences, seed: int, draws: int) -> dict[str, float]:
    """Range of the reward over the grid's cells for users drawn from the prior: its mean and its relative deviation."""
    generator = torch.Generator().manual_seed(seed)
    z = model.sample_prior(draws, generator).unsqueeze(1)
    if isinstance(model.decoder, LatentReward):
        rewards = model.decoder.reward(cells(), z)
    else:
        rewards = model.decoder.reward(cells(), z, torch.rand(STATES, 2, generator=generator))
    spans = (rewards.amax(dim=1) - rewards.amin(dim=1)).double().numpy()
    return {"range": float(spans.mean()), "variation of the range": float(spans.std() / max(spans.mean(), 1e-12))}


def run_seed(seed: int, config: StudyConfig) -> Figures:
    """All parts of the study for one seed."""
    torch.set_num_threads(1)
    sets, held, epochs = (120, 40, 2) if config.quick else (SETS, HELD, EPOCHS)
    figures: dict[str, dict[str, float]] = {}
    images, means = digit_features()
    parts: dict[str, tuple[Any, Tensor]] = {
        "2 corners": (uniform, torch.tensor(CORNERS[:2])),
        "4 corners": (uniform, torch.tensor(CORNERS)),
        "digits": (None, means),
    }
    for number, (name, (sample, goals)) in enumerate(parts.items()):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        known, late = _halves(images, generator) if sample is None else (sample, sample)
        train = draw_sets(known, goals, sets, PAIRS, generator)
        context, asked = (draw_sets(late, goals, held, pairs, generator) for pairs in (PAIRS, ASKED))
        asked = _of_kinds(asked, context[3], goals)
        models = {
            "VPL": fit_latent(train, seed, epochs),
            "VPL, attention": fit_latent(train, seed, epochs, "attention"),
        }
        if name == "2 corners":
            models["SPO"] = fit_latent(train, seed, epochs, pairwise=True)
        for key, model in models.items():
            figures[f"{key}, {name}"] = latent_figures(model, context, asked, goals)
        singles = {rated(f"BTL, {name}", rate): fit_single(train, seed, epochs, rate) for rate in RATES}
        if name == "2 corners":
            singles["mean-variance, 2 corners"] = fit_single(train, seed, epochs, RATE, MeanVariance())
            singles["categorical, 2 corners"] = fit_single(train, seed, epochs, RATE, CategoricalPreference())
            for key in ("VPL", "SPO"):
                figures[f"{key}, 2 corners"] |= range_figures(models[key], seed, 10 if config.quick else DRAWS)
            figures["head, 2 corners"] = head_figures(
                train, context, asked, goals, seed, 2 if config.quick else HEAD_EPOCHS
            )
            figures |= _navigation(models["VPL"], singles, context)
        for key, single in singles.items():
            figures[key] = _accuracies(_score(single, asked[0]) - _score(single, asked[1]), asked, goals)
    if config.data is not None and (config.data / HH_FILE).exists():
        figures |= dialogue_figures(config.data / HH_FILE, seed, config.quick)
    return figures


def _of_kinds(asked: Sets, kinds: Tensor, goals: Tensor) -> Sets:
    """New pairs with the labels of the people of the context."""
    worth = [distances(items, goals)[torch.arange(len(kinds)), :, kinds] for items in asked[:2]]
    return asked[0], asked[1], (worth[0] > worth[1]).float(), kinds


@torch.no_grad()
def _navigation(model: VariationalPreferences, singles: dict[str, PreferenceModel], context: Sets) -> dict[str, Any]:
    goals, found = (0, ROWS * COLUMNS - 1), {}
    z = model.infer(*context[:3])
    users = [torch.nonzero(context[3] == kind).squeeze(1)[:WALKERS] for kind in (0, 1)]
    rewards = model.decoder.reward(cells(), z.unsqueeze(1)).double().numpy()  # type: ignore[call-arg]
    found["VPL, grid"] = {f"kind {kind}": success(rewards[users[kind].numpy()], goals[kind]) for kind in (0, 1)}
    for rate in RATES:
        alike = _score(singles[rated("BTL, 2 corners", rate)], cells()).double().numpy()[None]
        found[rated("BTL, grid", rate)] = {f"kind {kind}": success(alike, goals[kind]) for kind in (0, 1)}
    return found


def digit_features() -> tuple[Tensor, Tensor]:
    """Eight principal components of the images of digits, in deviations, and the mean of each preferred digit."""
    data: Any = require("sklearn.datasets", "tasks")
    given = data.load_digits()
    centred = given.data - given.data.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    features = centred @ directions[:8].T
    features = torch.tensor(features / features.std(), dtype=torch.float32)
    return features, torch.stack([features[torch.from_numpy(given.target == digit)].mean(dim=0) for digit in DIGITS])


def _halves(images: Tensor, generator: Any) -> list[Any]:
    """Samplers of two halves of the images, for people known and unseen."""
    order = torch.randperm(len(images), generator=generator)
    return [partial(_images, images[part]) for part in order.split(len(order) // 2 + 1)]


def _images(images: Tensor, sets: int, pairs: int, generator: Any) -> Tensor:
    return images[torch.randint(len(images), (sets, pairs), generator=generator)]


def judge(runs: Sequence[Figures]) -> Judgement:
    """Apply `STUDY.rule`."""
    best = {part: best_rate(runs, f"BTL, {part}", "accuracy", RATES) for part in ("2 corners", "4 corners", "digits")}
    single = {part: arm(runs, rated(f"BTL, {part}", rate), "disputed") for part, rate in best.items()}
    latent = {part: arm(runs, f"VPL, {part}", "disputed") for part in best}
    effect, interval = paired_bootstrap(latent["2 corners"], single["2 corners"])
    four, four_interval = paired_bootstrap(latent["4 corners"], single["4 corners"])
    spread = {name: arm(runs, f"{name}, 2 corners", "variation of the range").mean() for name in ("VPL", "SPO")}
    spo = arm(runs, "SPO, 2 corners", "disputed").mean()
    units = min(arm(runs, f"VPL, {part}", "active units").min() for part in best)
    grid = [arm(runs, "VPL, grid", f"kind {kind}").mean() for kind in (0, 1)]
    alone = [arm(runs, rated("BTL, grid", best["2 corners"]), f"kind {kind}").mean() for kind in (0, 1)]
    chance = float(single["2 corners"].mean())
    checks = {
        "2 corners: VPL - BTL at least 0.25 on disputed pairs, interval above 0": effect >= 0.25 and interval[0] > 0,
        "4 corners: VPL - BTL at least 0.25 on disputed pairs, interval above 0": four >= 0.25 and four_interval[0] > 0,
        "2 corners: BTL between 0.45 and 0.55 on disputed pairs": 0.45 <= chance <= 0.55,
        "variation of the range: SPO less than half of VPL": bool(spread["SPO"] < 0.5 * spread["VPL"]),
        "SPO at least 0.65 on disputed pairs": bool(spo >= 0.65),
        "grid: VPL at least 0.8 for both kinds": bool(min(grid) >= 0.8),
        "grid: BTL serves at most one kind": bool(min(alone) < 0.8),
        "no posterior collapsed": bool(units > 0),
    }
    refuted = latent["2 corners"].mean() < 0.65 or spread["SPO"] >= spread["VPL"] or units == 0
    verdict: Verdict = "supported" if all(checks.values()) else "not supported" if refuted else "inconclusive"

    def mean(name: str, quantity: str) -> float:
        return float(arm(runs, name, quantity).mean())

    def listed(part: str) -> str:
        return (
            ", ".join(
                f"{key} {mean(f'{key}, {part}', 'disputed'):.3f} (all {mean(f'{key}, {part}', 'accuracy'):.3f}, "
                f"divergence {mean(f'{key}, {part}', 'kl'):.1f}, {mean(f'{key}, {part}', 'active units'):.1f} active "
                "units)"
                for key in ("VPL", "VPL, attention")
            )
            + f", BTL {single[part].mean():.3f} (all {mean(rated(f'BTL, {part}', best[part]), 'accuracy'):.3f})"
        )

    summary = (
        f"Disputed pairs of unseen people. 2 corners: {listed('2 corners')}; SPO {spo:.3f} (divergence "
        f"{mean('SPO, 2 corners', 'kl'):.1f}, {mean('SPO, 2 corners', 'active units'):.1f} active units), head in the "
        f"shared fit {mean('head, 2 corners', 'disputed'):.3f} (divergence {mean('head, 2 corners', 'kl'):.1f}, "
        f"{mean('head, 2 corners', 'active units'):.1f} active units), mean-variance "
        f"{mean('mean-variance, 2 corners', 'disputed'):.3f}, categorical "
        f"{mean('categorical, 2 corners', 'disputed'):.3f}; VPL - BTL {effect:+.3f} [{interval[0]:.3f}, "
        f"{interval[1]:.3f}]. 4 corners: {listed('4 corners')}; {four:+.3f} [{four_interval[0]:.3f}, "
        f"{four_interval[1]:.3f}]. Digits: {listed('digits')}. Range of the reward over draws of the prior: VPL "
        f"{mean('VPL, 2 corners', 'range'):.1f} with variation {spread['VPL']:.2f}, SPO "
        f"{mean('SPO, 2 corners', 'range'):.2f} with {spread['SPO']:.2f}. Grid: VPL reaches {grid[0]:.2f} and "
        f"{grid[1]:.2f}, BTL {alone[0]:.2f} and {alone[1]:.2f}."
    )
    if all("VPL, dialogues" in run for run in runs):
        gain, around = paired_bootstrap(
            arm(runs, "VPL, dialogues", "accuracy"), arm(runs, "BTL, dialogues", "accuracy")
        )
        summary += (
            f" Dialogues ({'sentence' if mean('dialogues', 'sentence encoder') == 1 else 'hashing'} encoder, "
            f"{mean('dialogues', 'unseen comparisons'):.0f} comparisons of unseen annotators): VPL "
            f"{mean('VPL, dialogues', 'accuracy'):.3f}, BTL {mean('BTL, dialogues', 'accuracy'):.3f}, {gain:+.3f} "
            f"[{around[0]:.3f}, {around[1]:.3f}], divergence {mean('VPL, dialogues', 'kl'):.2f}, "
            f"{mean('VPL, dialogues', 'active units'):.1f} active units."
        )
    return Judgement(verdict, effect, interval, summary, checks)


STUDY = Study(
    slug="33-vpl",
    method="vpl",
    claim="A reward conditioned on a latent user, inferred from a few comparisons, serves people whose preferences "
    "conflict near as well as their own reward, where a single Bradley-Terry reward is at chance on what they "
    "dispute and its policy serves nobody; pairwise rewards (VPL-SPO) have the same scale for all users (arXiv "
    "2408.10075).",
    task="Points of the unit square, people whose goals are 2 or 4 of its corners, 8 labelled pairs a set; a 9 x 12 "
    "grid world; images of digits whose kinds prefer what is near the mean of one digit; dialogues judged for "
    "helpfulness or harmlessness where real data is given.",
    baselines="BTL of the same width and one hidden layer more, on the same comparisons and epochs, at the better of "
    f"rates {RATES}; mean-variance and categorical preferences. VPL at rate {RATE:g} alone, with the concat encoder; "
    "the attention encoder and the head of the shared fit beside it.",
    measure="Accuracy on 20 new pairs of each of 500 unseen people, z inferred from 8 pairs, overall and on pairs "
    "that not all kinds order alike; relative deviation of the reward's range over 200 draws of the prior; share of "
    "starts from which a greedy policy is within a cell of the user's goal after 40 steps.",
    rule="Supported: VPL - BTL at least 0.25 on disputed pairs with 2 and with 4 corners, intervals above 0; BTL "
    "between 0.45 and 0.55 there with 2; the variation of SPO's range less than half of VPL's, and SPO at least 0.65 "
    "on disputed pairs; VPL reaches both kinds' goals from at least 0.8 of the starts and BTL not; no posterior "
    "collapsed. Not supported: VPL below 0.65 on disputed pairs with 2 corners, SPO's range at least as variable, or "
    "a collapsed posterior. Otherwise inconclusive. Digits and dialogues are reported beside it.",
    effect="accuracy on disputed pairs with 2 corners, VPL - BTL",
    full_scale="maze2d-large with IQL policies on relabelled data; UltraFeedback of 2 and 4 kinds of users with "
    "GPT-2 and Llama-2-7B; 3 seeds, 8 x 80 GB.",
    seeds=5,
    run_seed=run_seed,
    judge=judge,
    config={
        "sets": SETS, "held-out sets": HELD, "pairs": PAIRS, "new pairs": ASKED, "width": WIDTH, "latent": LATENT,
        "beta": BETA, "cycles": CYCLES, "epochs": EPOCHS, "batch": BATCH, "rate": RATE, "BTL rates": RATES,
        "discount": DISCOUNT, "draws": DRAWS, "states": STATES, "digits": DIGITS,
    },
)  # fmt: skip
