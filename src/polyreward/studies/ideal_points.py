"""Ideal points of people who prefer the image closer to their kind's favourite digit.

Claim: a reward whose people are mixtures of K shared ideal points is more accurate than one reward for all once K
reaches the number of kinds of people, does not suffer from a larger K, and tells a new person apart from a few
comparisons, where a model of that person alone cannot: 1.7 % more accurate on seen and 36 % on unseen people of
Reddit TL;DR than strong baselines with 20 times the parameters (PAL, arXiv 2406.08469).

The task. Real images (`load_digits`, 16 principal components, unit deviation). The ideal points are the mean images of
the digits 0, 1 and 4, hidden from the models; the closer of two images wins. 60 people have 20 comparisons each on 1200
images; 30 others have from 1 to 50. Rates and penalties are chosen on 200 further images, and all figures are of the
rest, 50 comparisons a person. In a second run a person is a Dirichlet(0.5) mixture of the three points, and in the
control all have the same one. With real data people hold two of Anthropic's personas and say yes or no to statements.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyreward.errors import require
from polyreward.preferences import PreferenceData
from polyreward.reward_models.encoders import Features, HashingEncoder
from polyreward.reward_models.ideal_point_heads import IdealPointHead, fit_new_users
from polyreward.reward_models.model import PreferenceModel
from polyreward.reward_models.pair_losses import PairLoss
from polyreward.reward_models.text_encoders import SentenceEncoder
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
from polyreward.studies.persona_statements import PERSONAS, STATEMENTS, statements

FAVOURITES, COMPONENTS = (0, 1, 4), 16
TRAIN_IMAGES, VALIDATION_IMAGES = 1200, 200
SEEN, UNSEEN, PAIRS, TEST_PAIRS = 60, 30, 20, 50
PROTOTYPES, FEW = (1, 2, 3, 4, 6), (1, 2, 5, 10, 20, 50)
KINDS = len(FAVOURITES)
EPOCHS, BATCH = 120, 256  # 600 steps of the digits
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # of the map; ten times as much for prototypes and people
PENALTIES, STEEPNESS = (0.1, 1.0, 10.0, 100.0), (0.03, 0.1, 0.3, 1.0)
STEPS = np.array([0.0, *0.5 ** np.arange(10.0)])
PERSONA_PAIRS, PERSONA_PROTOTYPES, PERSONA_FEW = 40, (1, 2, 3, 4, 6), 10


@dataclass(frozen=True)
class People:
    """Ideal points (U, 16) of people whose codes begin at `first`."""

    points: np.ndarray
    images: np.ndarray
    first: int = 0

    def compare(self, rng: np.random.Generator, rows: np.ndarray, pairs: int) -> PreferenceData:
        """Comparisons of two different images, `pairs` a person; the closer one is preferred."""
        user = np.repeat(np.arange(len(self.points)), pairs)
        left = rng.integers(len(rows), size=len(user))
        right = rows[(left + rng.integers(1, len(rows), size=len(user))) % len(rows)]
        left = rows[left]
        near, far = (((self.images[side] - self.points[user]) ** 2).sum(axis=1) for side in (left, right))
        flat = np.stack([left, right], axis=1).reshape(-1)
        names = (self.first + user).tolist()
        return PreferenceData(np.arange(len(user)), flat, choice=(near > far).astype(np.int64), annotators=names)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Principal components of the images, float32 (1797, 16) of unit deviation, and the favourites (3, 16)."""
    data: Any = require("sklearn.datasets", "tasks")
    found = data.load_digits()
    centred = found.data - found.data.mean(axis=0)
    components = centred @ np.linalg.svd(centred, full_matrices=False)[2][:COMPONENTS].T
    images = (components / components.std()).astype(np.float32)
    return images, np.stack([images[found.target == digit].mean(axis=0) for digit in FAVOURITES])


def fit(
    encoder: Features, train: PreferenceData, prototypes: int, rate: float, seed: int, quick: bool, **shape: Any
) -> PreferenceModel:
    """PAL-A with squared distances and the logistic loss."""
    rates: dict[str, Any] = {"map_rate": rate, "prototype_rate": 10 * rate, "user_rate": 10 * rate}
    head = partial(IdealPointHead, components=prototypes, distance="sq_l2", activation="gelu", **rates, **shape)
    options: dict[str, Any] = {"epochs": 4 if quick else EPOCHS, "batch_size": BATCH, "validation": None, "seed": seed}
    return PreferenceModel(encoder, head, PairLoss("logistic")).fit(train, **options)


def recovered(labels: np.ndarray, groups: np.ndarray) -> float:
    """Largest share of the people whose label is their group's, over all ways to name the groups."""
    count = int(max(labels.max(), groups.max())) + 1
    table = np.zeros((count, count))
    np.add.at(table, (labels, groups), 1)
    optimise: Any = require("scipy.optimize", "tasks")
    rows, columns = optimise.linear_sum_assignment(-table)
    return float(table[rows, columns].sum() / len(labels))


def alone(images: np.ndarray, data: PreferenceData, users: int, penalty: float, steepness: float = 0.0) -> np.ndarray:
    """A logistic model of each person by Newton's method, float64 (U, d).

    The margin is ``v (left - right) + steepness (|right|^2 - |left|^2)``: with `steepness` that of a free ideal point
    ``v / (2 steepness)``. The penalty is ``|v|^2 / (2 penalty)``.
    """
    gap, offset = _signed(images, data, users, steepness)
    weights = np.zeros((users, gap.shape[2]))

    def loss(at: np.ndarray) -> np.ndarray:
        margin = np.einsum("und,...ud->...un", gap, at) + offset
        return np.logaddexp(0, -margin).sum(axis=-1) + (at**2).sum(axis=-1) / (2 * penalty)

    for _ in range(30):
        lost = 1 / (1 + np.exp(np.clip(np.einsum("und,ud->un", gap, weights) + offset, -50, 50)))
        slope = np.einsum("un,und->ud", lost, gap) - weights / penalty
        curve = np.einsum("und,un,une->ude", gap, lost * (1 - lost), gap) + np.eye(gap.shape[2]) / penalty
        step = np.linalg.solve(curve, slope[..., None])[..., 0]
        # the best of some lengths, 0 among them: a full step overshoots where the curve is flat
        tried = weights + STEPS[:, None, None] * step
        weights = tried[loss(tried).argmin(axis=0), np.arange(users)]
    return weights


def alone_accuracy(images: np.ndarray, data: PreferenceData, weights: np.ndarray, steepness: float = 0.0) -> float:
    """Accuracy of `alone`."""
    gap, offset = _signed(images, data, len(weights), steepness)
    return float((np.einsum("und,ud->un", gap, weights) + offset > 0).mean())


def _signed(images: np.ndarray, data: PreferenceData, users: int, steepness: float) -> tuple[np.ndarray, np.ndarray]:
    """Chosen less rejected images (U, n, d), and the offset of the margin (U, n); people are in order."""
    flat, choice = np.asarray(data.responses).reshape(-1, 2), np.asarray(data.choice)
    rows = np.arange(len(flat))
    better, worse = (images[flat[rows, side]].astype(np.float64) for side in (choice, 1 - choice))
    offset = steepness * ((worse**2).sum(axis=1) - (better**2).sum(axis=1))
    return (better - worse).reshape(users, -1, images.shape[1]), offset.reshape(users, -1)


def run_seed(seed: int, config: StudyConfig) -> Figures:
    """Fit every arm on the same comparisons; then the people whom no arm has seen."""
    torch.set_num_threads(1)
    quick, rng = config.quick, np.random.default_rng(seed)
    images, favourites = digits()
    train, held, test = np.split(rng.permutation(len(images)), [TRAIN_IMAGES, TRAIN_IMAGES + VALIDATION_IMAGES])
    groups = np.arange(SEEN) % KINDS
    mixed = rng.dirichlet(np.full(KINDS, 0.5), size=SEEN).astype(np.float32)
    populations = {
        "": (People(favourites[groups], images), PROTOTYPES),
        "Dirichlet, ": (People(mixed @ favourites, images), (1, KINDS)),
        "one kind, ": (People(np.repeat(favourites[:1], SEEN, axis=0), images), (1, KINDS)),
    }
    strangers = People(favourites[np.arange(UNSEEN) % KINDS], images, first=SEEN)
    few = strangers.compare(rng, train, max(FEW))
    strange = strangers.compare(rng, test, TEST_PAIRS)
    encoder = Features(images, name="digits")
    figures: dict[str, dict[str, float]] = {}
    for name, (people, prototypes) in populations.items():
        parts = [
            people.compare(rng, rows, count) for rows, count in ((train, PAIRS), (held, TEST_PAIRS), (test, TEST_PAIRS))
        ]
        for count, rate in itertools.product((1, KINDS) if quick else prototypes, RATES[3:4] if quick else RATES):
            model = fit(encoder, parts[0], count, rate, seed, quick)
            found = {"validation": _accuracy(model, parts[1]), "seen": _accuracy(model, parts[2])}
            if not name and count == KINDS:
                found |= _people(model, groups) | _newcomers(model, few, strange)
            figures[rated(f"{name}K={count}", rate)] = found
        if not name:
            figures |= _alone(images, parts, strangers, rng, (train, held), few, strange, quick)
    if config.data is not None:
        figures |= personas(config.data, seed, quick)
    return figures


def _accuracy(model: PreferenceModel, data: PreferenceData) -> float:
    return model.evaluate(data)["accuracy"]


def _people(model: PreferenceModel, groups: np.ndarray) -> dict[str, float]:
    """Do the weights tell the kinds of people apart."""
    head = model.head
    assert isinstance(head, IdealPointHead)
    with torch.no_grad():
        weights = head.weights(torch.arange(len(groups))).numpy()
    cluster: Any = require("sklearn.cluster", "tasks")
    found = cluster.KMeans(KINDS, n_init=10, random_state=0).fit_predict(weights)
    return {
        "kinds by the largest weight": recovered(weights.argmax(axis=1), groups),
        "kinds by clusters of the weights": recovered(found, groups),
    }


def first_of_each(data: PreferenceData, count: int) -> PreferenceData:
    """The first `count` comparisons of each person; people are in order and have equally many."""
    each = len(data) // len(data.annotator_names)
    return data.select(np.arange(len(data)) % each < count)


def _newcomers(model: PreferenceModel, few: PreferenceData, test: PreferenceData) -> dict[str, float]:
    """Accuracy on people of whom the model learns the weights alone."""
    found = {}
    for count in FEW:
        known = fit_new_users(copy.deepcopy(model), first_of_each(few, count))
        found[f"unseen, {count}"] = _accuracy(known, test)
    return found


def _alone(
    images: np.ndarray,
    seen: Sequence[PreferenceData],
    strangers: People,
    rng: np.random.Generator,
    rows: tuple[np.ndarray, np.ndarray],
    few: PreferenceData,
    test: PreferenceData,
    quick: bool,
) -> dict[str, dict[str, float]]:
    """A model of each person alone; penalties are chosen with as many comparisons as it will have."""
    # other comparisons of the same new people would tell the answer: the penalty is chosen on the seen ones
    people = People(strangers.points, strangers.images)
    choose = people.compare(rng, rows[0], max(FEW)), people.compare(rng, rows[1], TEST_PAIRS)
    figures = {}
    some = slice(1, 2) if quick else slice(None)
    for steepness, penalty in itertools.product((0.0, *list(STEEPNESS)[some]), list(PENALTIES)[some]):
        name = f"free point, {steepness:g}" if steepness else "logistic"
        weights = alone(images, seen[0], SEEN, penalty, steepness)
        found = {
            "validation": alone_accuracy(images, seen[1], weights, steepness),
            "seen": alone_accuracy(images, seen[2], weights, steepness),
        }
        for count in FEW:
            for quantity, own, others in (("validation", *choose), ("unseen", few, test)):
                weights = alone(images, first_of_each(own, count), UNSEEN, penalty, steepness)
                found[f"{quantity}, {count}"] = alone_accuracy(images, others, weights, steepness)
        figures[rated(name, penalty)] = found
    return figures


def personas(folder: Path, seed: int, quick: bool) -> dict[str, dict[str, float]]:
    """People who hold one persona of each pair, asked whether they would say a statement; four kinds in all.

    An answer's features are those of the statement, with a minus for no. Statements are new in the test.
    """
    rng = np.random.default_rng(seed)
    encoder = SentenceEncoder.packaged()
    features, side, topic = statements(folder, rng, encoder if encoder is not None else HashingEncoder(512))
    name = f"personas ({'MiniLM' if encoder is not None else 'hashed words'})"
    parts = np.split(rng.permutation(len(side)), [len(side) * 6 // 10, len(side) * 7 // 10])
    kinds = np.array(list(itertools.product((0, 1), repeat=2)))

    def ask(users: int, rows: np.ndarray, count: int, first: int = 0) -> PreferenceData:
        user = np.repeat(np.arange(users), count)
        asked = rng.choice(rows, size=len(user))
        yes = kinds[user % len(kinds), topic[asked]] == side[asked]
        flat = np.stack([2 * asked, 2 * asked + 1], axis=1).reshape(-1)
        return PreferenceData(asked, flat, choice=1 - yes.astype(np.int64), annotators=(first + user).tolist())

    train, held, test = (ask(40, rows, n) for rows, n in zip(parts, (PERSONA_PAIRS, 50, 50), strict=True))
    few, strange = ask(20, parts[0], PERSONA_FEW, 40), ask(20, parts[2], 50, 40)
    answers = np.stack([features, -features], axis=1).reshape(-1, features.shape[1])
    figures = {}
    counts, rates = (PERSONA_PROTOTYPES[:1], RATES[3:4]) if quick else (PERSONA_PROTOTYPES, RATES[1:])
    for count, rate in itertools.product(counts, rates):
        model = fit(Features(answers, name=name), train, count, rate, seed, quick, latent=32)
        found = {"validation": _accuracy(model, held), "seen": _accuracy(model, test)}
        found[f"unseen, {PERSONA_FEW}"] = _accuracy(fit_new_users(model, few), strange)
        figures[rated(f"{name}, K={count}", rate)] = found
    return figures


def judge(runs: Sequence[Figures]) -> Judgement:
    """Apply `STUDY.rule`."""
    rates = [rate for rate in RATES if rated("K=1", rate) in runs[0]]

    def best(name: str, quantity: str = "validation", grid: Sequence[float] = rates) -> str:
        return rated(name, best_rate(runs, name, quantity, grid))

    def seen(name: str) -> np.ndarray:
        return arm(runs, best(name), "seen")

    def lonely(kind: str, count: int) -> np.ndarray:
        names = ["logistic"] if kind == "logistic" else [f"free point, {value:g}" for value in STEEPNESS]
        grids = {name: [value for value in PENALTIES if rated(name, value) in runs[0]] for name in names}
        arms = [best(name, f"validation, {count}", grid) for name, grid in grids.items() if grid]
        chosen = max(arms, key=lambda name: arm(runs, name, f"validation, {count}").mean())
        return arm(runs, chosen, f"unseen, {count}")

    ours, wide = best(f"K={KINDS}"), f"K={max(PROTOTYPES) if best_known(runs, rates) else KINDS}"
    few = {count: arm(runs, ours, f"unseen, {count}") for count in FEW}
    gain, gain_interval = paired_bootstrap(seen(f"K={KINDS}"), seen("K=1"))
    spare = float((seen(wide) - seen(f"K={KINDS}")).mean())
    lead, lead_interval = paired_bootstrap(few[5], lonely("logistic", 5))
    free, free_interval = paired_bootstrap(few[5], lonely("free point", 5))
    short = float((seen(f"K={KINDS}") - few[20]).mean())
    kinds = float(arm(runs, ours, "kinds by the largest weight").mean())
    control = float((seen(f"one kind, K={KINDS}") - seen("one kind, K=1")).mean())
    checks = {
        "seen, K=3 - K=1 at least 0.15, interval above 0": gain >= 0.15 and gain_interval[0] > 0,
        "seen, K=6 within 0.03 of K=3": abs(spare) <= 0.03,
        "unseen with 5, K=3 - logistic at least 0.08, interval above 0": lead >= 0.08 and lead_interval[0] > 0,
        "unseen with 20 at most 0.03 below seen": short <= 0.03,
        "the largest weight tells the kind of at least 95 %": kinds >= 0.95,
        "one kind, K=3 - K=1 at most 0.01": control <= 0.01,
    }
    refuted = gain <= 0.05 or lead <= 0
    verdict: Verdict = "supported" if all(checks.values()) else "not supported" if refuted else "inconclusive"
    prototypes = [count for count in PROTOTYPES if rated(f"K={count}", rates[0]) in runs[0]]
    curve = ", ".join(f"{seen(f'K={count}').mean():.3f} (K={count})" for count in prototypes)
    shots = "; ".join(
        f"{count}: {few[count].mean():.3f}, {lonely('logistic', count).mean():.3f}, "
        f"{lonely('free point', count).mean():.3f}"
        for count in FEW
    )
    clusters = float(arm(runs, ours, "kinds by clusters of the weights").mean())
    summary = (
        f"Accuracy on seen people: {curve}; K=3 - K=1 {gain:+.3f} [{gain_interval[0]:.3f}, {gain_interval[1]:.3f}]. "
        f"Unseen people by the number of their comparisons (ours, logistic, free ideal point): {shots}; with 5, ours - "
        f"logistic {lead:+.3f} [{lead_interval[0]:.3f}, {lead_interval[1]:.3f}], ours - free point {free:+.3f} "
        f"[{free_interval[0]:.3f}, {free_interval[1]:.3f}]. The kind is told by the largest weight for {kinds:.1%}, by "
        f"clusters of the weights for {clusters:.1%}. Dirichlet: {seen('Dirichlet, K=1').mean():.3f} (K=1), "
        f"{seen(f'Dirichlet, K={KINDS}').mean():.3f} (K=3). One kind of people: K=3 - K=1 {control:+.4f}."
        + _told_personas(runs)
    )
    return Judgement(verdict, gain, gain_interval, summary, checks)


def best_known(runs: Sequence[Figures], rates: Sequence[float]) -> bool:
    """Whether the largest number of prototypes was run; a quick run leaves it out."""
    return rated(f"K={max(PROTOTYPES)}", rates[0]) in runs[0]


def _told_personas(runs: Sequence[Figures]) -> str:
    told = ""
    for name in sorted({name.partition(", K=")[0] for name in runs[0] if name.startswith("personas")}):
        shown = []
        for count in PERSONA_PROTOTYPES:
            rates = [rate for rate in RATES if rated(f"{name}, K={count}", rate) in runs[0]]
            if rates:
                chosen = rated(f"{name}, K={count}", best_rate(runs, f"{name}, K={count}", "validation", rates))
                mean, interval = paired_bootstrap(arm(runs, chosen, "seen"))
                unseen = arm(runs, chosen, f"unseen, {PERSONA_FEW}").mean()
                shown.append(f"K={count} {mean:.3f} [{interval[0]:.3f}, {interval[1]:.3f}], unseen {unseen:.3f}")
        told += f" {name[0].upper()}{name[1:]}, four kinds: {'; '.join(shown)} (with {PERSONA_FEW} comparisons)."
    return told


STUDY = Study(
    slug="35-pal",
    method="pal",
    claim="People as mixtures of K shared ideal points: accuracy jumps when K reaches the number of kinds of people, "
    "and a new person is told from a few comparisons; 1.7 % more accurate on seen and 36 % on unseen people of Reddit "
    "TL;DR than strong baselines with 20 times the parameters (arXiv 2406.08469).",
    task="The closer of two images of digits to a person's ideal point wins; the points are the means of the digits 0, "
    "1 and 4. 60 people with 20 comparisons each, 30 new ones with 1 to 50; mixtures of the points, and one point for "
    "all as a control. With real data, yes or no to statements of two pairs of personas.",
    baselines="One ideal point for all (K=1), map's rates 0.0001 to 0.01 (personas from 0.0003), ten times as much for "
    "prototypes and people, as for every K, the best by accuracy on validation images or statements; by Newton's "
    "method, without a rate, a logistic regression of each person, penalties 0.1 to 100, and a free ideal point, the "
    "same and steepness 0.03 to 1, chosen for each number of comparisons on validation images.",
    measure="Accuracy on comparisons of test images, of people the fit has seen, and of new ones of whom the weights "
    "alone are learned (150 steps, rate 0.05).",
    rule="On the mean of 5 seeds: supported with seen K=3 - K=1 at least 0.15 and its 95 % interval above 0, K=6 "
    "within 0.03 of K=3, unseen with 5 comparisons at least 0.08 above the logistic regression with its interval above "
    "0, unseen with 20 at most 0.03 below seen, the largest weight telling the kind of at least 95 % of the seen "
    "people, and no gain of K=3 above 0.01 where all are of one kind. Not supported: a gain of at most 0.05, or unseen "
    "no better than the logistic regression. Otherwise inconclusive. Free ideal points, Dirichlet and personas are "
    "reported.",
    effect="accuracy on seen people, K=3 - K=1",
    full_scale="OPT-350m on TL;DR (kind B, cumulative cross-entropy), Pick-a-Pic and Pick-a-Filter with frozen CLIP-H, "
    "personas with a sentence encoder, 5 runs each; 1 x 80 GB.",
    seeds=5,
    run_seed=run_seed,
    judge=judge,
    config={
        "favourites": FAVOURITES,
        "components": COMPONENTS,
        "seen": SEEN,
        "unseen": UNSEEN,
        "pairs": PAIRS,
        "test pairs": TEST_PAIRS,
        "prototypes": PROTOTYPES,
        "few": FEW,
        "epochs": EPOCHS,
        "batch": BATCH,
        "rates": RATES,
        "penalties": PENALTIES,
        "steepness": STEEPNESS,
        "personas": PERSONAS,
        "statements": STATEMENTS,
    },
)
