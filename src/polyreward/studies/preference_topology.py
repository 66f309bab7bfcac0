"""Chains and trees of preference pairs: how certain they make rewards, in theory and for a fitted reward model.

Claim: at the same number n of pairs, preferences between responses that share prefixes (trees) lower the mean inference
distance by up to log n / log log n against independent pairs, and their reward models win 65 % of comparisons
(arXiv 2402.10184).

The task. Responses are the 65536 leaves of a 4-ary tree of height 8; two that share h steps are ``4^(-alpha h)`` apart.
A chain compares n random pairs, a tree n pairs among the n leaves of a balanced random prefix tree. The mean inference
distance decides the verdict. Beside it: which part of the design matters, the exact posterior variance of the same
designs, and reward models fitted to noisy labels of a reward that walks at random down a tree of height 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from polyreward.data.bayesian_network import InducedBayesianNetwork, ResponseTree, rate_ratio
from polyreward.data.prefix_trees import PairSampler, PrefixTree, SampledPairs
from polyreward.preferences import PreferenceData
from polyreward.reward_models.encoders import Features
from polyreward.reward_models.heads import LinearHead
from polyreward.reward_models.model import PreferenceModel
from polyreward.studies.base import Figures, Judgement, Study, StudyConfig, Verdict, arm, paired_bootstrap

BRANCHING, HEIGHT, QUERIES = 4, 8, 20
SIZES = (256, 1024, 4096)
REGIMES = ((0.1, 1e-3), (0.3, 1e-3), (0.5, 1e-3), (1.0, 1e-3), (0.3, 1e-2), (1.0, 1e-2))
DIVERSE, CLOSE = ((0.3, 1e-3), (0.5, 1e-3)), (1.0, 1e-2)
DESIGN_N, POSTERIOR_ALPHAS = 1024, (0.3, 0.5)
MODEL_HEIGHT, BEST_OF, DRAWS, TEST_PAIRS = 6, 64, 4000, 20_000
MODELS = ((0.6, 30.0, 1024), (0.6, 30.0, 256), (0.3, 30.0, 1024), (0.6, 3.0, 1024))


def regime(alpha: float, variance: float, n: int) -> str:
    """Name of an arm of the first part."""
    return f"alpha {alpha:g}, variance {variance:g}, n {n}"


def model_case(alpha: float, beta: float, n: int) -> str:
    """Name of an arm of the fitted reward models."""
    return f"reward models, alpha {alpha:g}, beta {beta:g}, n {n}"


def distinct_steps(prompt: Any, prefixes: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """A policy that continues a prefix by different steps at random, so that its trees are balanced."""
    groups, place = np.unique(prefixes, axis=0, return_inverse=True)
    place = place.reshape(-1) if prefixes.shape[1] else np.zeros(len(prefixes), np.int64)
    groups_count = len(groups) if prefixes.shape[1] else 1
    each = len(prefixes) // groups_count
    steps = rng.permuted(np.tile(np.arange(BRANCHING), (groups_count, 1)), axis=1)[:, :each]
    out = np.empty(len(prefixes), np.int64)
    out[np.argsort(place, kind="stable")] = steps.reshape(-1)
    return out[:, None]


def balanced_tree(leaves: int, height: int, rng: np.random.Generator) -> PrefixTree:
    """A random prefix tree with so many leaves, a power of 2: full at the top, one path below."""
    branching, left = [], leaves
    for _ in range(height):
        branching.append(min(BRANCHING, left))
        left //= branching[-1]
    return PrefixTree.sample(distinct_steps, None, height, branching, 1, rng)


def leaf_numbers(steps: np.ndarray) -> np.ndarray:
    """Leaves (R,) of `ResponseTree` at the end of steps (R, height)."""
    return np.asarray(steps @ BRANCHING ** np.arange(steps.shape[1] - 1, -1, -1))


def random_leaves(count: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Steps (count, height) of independent uniform responses."""
    return rng.integers(BRANCHING, size=(count, height))


def designs(n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Compared leaves (n, 2) of every design."""
    independent, tree = random_leaves(2 * n, HEIGHT, rng), balanced_tree(n, HEIGHT, rng)
    wide, few = balanced_tree(2 * n, HEIGHT, rng), random_leaves(n, HEIGHT, rng)
    chain = PairSampler("chain", n=n)
    pairs: dict[str, tuple[np.ndarray, SampledPairs]] = {
        "chain": (independent, chain(independent, rng)),
        "tree": (tree.responses, PairSampler("tree", "uniform", n)(tree, rng)),
        "tree, each leaf twice": (tree.responses, PairSampler("tree", "cyclic", n)(tree, rng)),
        "tree of 2n leaves, each once": (wide.responses, chain(wide, rng)),
    }
    found = {name: leaf_numbers(responses)[drawn.pairs] for name, (responses, drawn) in pairs.items()}
    again = rng.integers(n, size=(n, 2))
    again[:, 1] = (again[:, 0] + 1 + again[:, 1] % (n - 1)) % n
    found["n independent leaves, reused"] = leaf_numbers(few)[again]
    # two independent responses may be the same leaf, which says nothing of itself
    return {name: leaves[leaves[:, 0] != leaves[:, 1]] for name, leaves in found.items()}


def run_seed(seed: int, config: StudyConfig) -> Figures:
    """Inference distances, posterior variances and fitted reward models."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    quick = config.quick
    sizes, queries, height = ((16, 64), 3, 4) if quick else (SIZES, QUERIES, HEIGHT)
    drawn = {n: designs(n, rng) for n in sizes}
    if quick:  # the same leaves, seen from a smaller tree
        drawn = {n: {k: v // BRANCHING ** (HEIGHT - height) for k, v in parts.items()} for n, parts in drawn.items()}
        drawn = {n: {k: v[v[:, 0] != v[:, 1]] for k, v in parts.items()} for n, parts in drawn.items()}
    asked = rng.integers(BRANCHING**height, size=(queries, 2))
    figures: dict[str, dict[str, float]] = {}
    for alpha, variance in REGIMES:
        bare = InducedBayesianNetwork.of_tree(ResponseTree(BRANCHING, height, alpha))
        for n in sizes:
            figures[regime(alpha, variance, n)] = {
                name: bare.with_comparisons(drawn[n][name], variance).mean_distance(asked) for name in ("chain", "tree")
            }
    n = sizes[-1] if quick else DESIGN_N
    for alpha in POSTERIOR_ALPHAS:
        bare = InducedBayesianNetwork.of_tree(ResponseTree(BRANCHING, height, alpha))
        networks = {name: bare.with_comparisons(leaves, 1e-3) for name, leaves in drawn[n].items()}
        figures[f"designs, alpha {alpha:g}"] = {k: v.mean_distance(asked) for k, v in networks.items()}
        figures[f"posterior, alpha {alpha:g}"] = {
            k: v.mean_distance(asked, posterior=True) for k, v in networks.items()
        }
    cases = [(0.6, 30.0, 16)] if quick else MODELS
    for alpha, beta, n in cases:
        figures[model_case(alpha, beta, n)] = _reward_models(alpha, beta, n, 3 if quick else MODEL_HEIGHT, rng)
    return figures


def _reward_models(alpha: float, beta: float, n: int, height: int, rng: np.random.Generator) -> dict[str, float]:
    """A chain's and a tree's reward model of one random reward: accuracy, win rate at the best of 64, tokens read."""
    tree = ResponseTree(BRANCHING, height, alpha)
    leaves = np.arange(tree.leaves)[:, None]
    steps = [
        np.asarray(leaves // BRANCHING ** (height - h) == np.arange(BRANCHING**h), dtype=np.float32)
        * float(np.sqrt((tree.distances[h - 1] - tree.distances[h]) / 2))
        for h in range(1, height + 1)
    ]
    features = np.concatenate(steps, axis=1)
    reward = features @ rng.normal(size=features.shape[1]).astype(np.float32)
    independent, prefixes = random_leaves(2 * n, height, rng), balanced_tree(n, height, rng)
    drawn = {
        "chain": (independent, PairSampler("chain", n=n)(independent, rng)),
        "tree": (prefixes.responses, PairSampler("tree", "lca_uniform", n)(prefixes, rng)),
    }
    test, sets = rng.integers(tree.leaves, size=(TEST_PAIRS, 2)), rng.integers(tree.leaves, size=(DRAWS, BEST_OF))
    apart = reward[test[:, 0]] != reward[test[:, 1]]
    # the prior of the walk's steps has deviation 1 where features are multiplied by beta
    encoder = Features(beta * features)
    figures: dict[str, float] = {}
    picks = {}
    for name, (responses, pairs) in drawn.items():
        compared = leaf_numbers(responses)[pairs.pairs]
        gap = beta * (reward[compared[:, 0]] - reward[compared[:, 1]])
        second = (rng.logistic(size=len(gap)) > gap).astype(np.int64)
        data = PreferenceData(np.arange(len(compared)), compared.reshape(-1), choice=second)
        model = PreferenceModel(encoder, LinearHead).fit(
            data, optimizer="lbfgs", epochs=4, weight_decay=1 / len(compared), validation=None, clip=None
        )
        rows = np.arange(tree.leaves)
        score = model.score(rows, rows).numpy()
        ahead = np.sign(score[test[:, 0]] - score[test[:, 1]]) * np.sign(reward[test[:, 0]] - reward[test[:, 1]])
        figures[f"accuracy, {name}"] = float((0.5 + 0.5 * ahead[apart]).mean())
        picks[name] = reward[np.take_along_axis(sets, score[sets].argmax(axis=1)[:, None], 1)[:, 0]]
        figures[f"best of {BEST_OF}, {name}"] = float(picks[name].mean())
        figures[f"tokens a pair, {name}"] = pairs.report()["tokens"] / len(pairs)
        figures[f"responses, {name}"] = float(pairs.report()["responses"])
    figures["win rate of tree"] = float((0.5 + 0.5 * np.sign(picks["tree"] - picks["chain"])).mean())
    return figures


def judge(runs: Sequence[Figures]) -> Judgement:
    """Apply `STUDY.rule`."""
    sizes = [n for n in SIZES if regime(*DIVERSE[0], n) in runs[0]] or [16, 64]

    def ratios(alpha: float, variance: float, n: int) -> np.ndarray:
        name = regime(alpha, variance, n)
        return arm(runs, name, "chain") / arm(runs, name, "tree")

    mean = {(a, s, n): float(ratios(a, s, n).mean()) for a, s in REGIMES for n in sizes}
    large = sizes[1:]
    first = [mean[a, s, n] for a, s in DIVERSE for n in large]
    growth = [mean[*DIVERSE[0], n] for n in sizes]
    close = [mean[*CLOSE, n] for n in sizes]
    effect, interval = paired_bootstrap(ratios(*DIVERSE[0], large[0]), np.zeros(len(runs)))
    checks = {
        "chain / tree at least 1.5 for alpha 0.3 and 0.5, n of at least 1024": min(first) >= 1.5,
        "the ratio grows with n at alpha 0.3": bool((np.diff(growth) > 0).all()),
        "the ratio is within 0.9 and 1.2 at alpha 1, variance 0.01": min(close) >= 0.9 and max(close) <= 1.2,
    }
    refuted = float(np.mean(first)) <= 1.1
    verdict: Verdict = "supported" if all(checks.values()) else "not supported" if refuted else "inconclusive"
    parts = [
        "Mean inference distance of chains over that of trees, n "
        + ", ".join(str(n) for n in sizes)
        + ": "
        + "; ".join(
            f"alpha {a:g}, variance {s:g}: {', '.join(f'{mean[a, s, n]:.2f}' for n in sizes)}" for a, s in REGIMES
        )
        + f" (log n / log log n is {', '.join(f'{rate_ratio(n):.2f}' for n in sizes)}). At alpha 0.3, n {large[0]}: "
        f"{effect:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]."
    ]
    for kind in ("designs", "posterior"):
        for alpha in POSTERIOR_ALPHAS:
            name = f"{kind}, alpha {alpha:g}"
            means = {key: float(arm(runs, name, key).mean()) for key in runs[0][name]}
            title = "Inference distance" if kind == "designs" else "Exact posterior variance"
            parts.append(f"{title} at alpha {alpha:g}: {', '.join(f'{k} {v:.3f}' for k, v in means.items())}.")
    for case in (name for name in runs[0] if name.startswith("reward models")):
        wins = arm(runs, case, "win rate of tree")
        won, (low, high) = paired_bootstrap(wins, np.zeros(len(runs)))
        gain = "a gain" if low > 0.5 else "a loss" if high < 0.5 else "no gain"
        accuracy = {k: float(arm(runs, case, f"accuracy, {k}").mean()) for k in ("tree", "chain")}
        tokens = {k: float(arm(runs, case, f"tokens a pair, {k}").mean()) for k in ("tree", "chain")}
        parts.append(
            f"{case[0].upper()}{case[1:]}: the tree's wins {won:.2f} [{low:.2f}, {high:.2f}] at the best of {BEST_OF} "
            f"({gain}), accuracy {accuracy['tree']:.3f} and {accuracy['chain']:.3f}, tokens a pair "
            f"{tokens['tree']:.1f} and {tokens['chain']:.1f}."
        )
    return Judgement(verdict, effect, interval, " ".join(parts), checks)


STUDY = Study(
    slug="10-topological-rlhf",
    method="topological-rlhf",
    claim="At the same number n of pairs, preferences between responses that share prefixes lower the mean inference "
    "distance of rewards by up to log n / log log n against independent pairs; reward models of trees win 65 % of "
    "comparisons on average (arXiv 2402.10184).",
    task="65536 responses, leaves of a 4-ary tree of height 8, that share h steps and are 4^(-alpha h) apart; n "
    "comparisons of variance s. Reward models: a reward that walks down a tree of height 6, noisy labels.",
    baselines="A chain of n random pairs of independent responses. Parts of the design: a tree with each leaf in one "
    "pair, n independent responses that are reused. The exact Gaussian posterior variance of every design. Reward "
    "models are linear in the nodes of the prefix, with the prior of the walk, on the same number of pairs; both are "
    "fitted to the optimum of a convex loss, which leaves no learning rate to tune.",
    measure="Mean inference distance of 20 random pairs of responses; chain over tree. Win rate of the tree's reward "
    "model over the chain's by the true reward of the best of 64.",
    rule="Supported: chain / tree, mean over seeds, at least 1.5 for alpha 0.3 and 0.5, s = 1e-3, n 1024 and 4096; "
    "growing with n at alpha 0.3; within 0.9 and 1.2 at alpha 1, s = 1e-2. Not supported: at most 1.1 on average in "
    "the first regime. Otherwise inconclusive. Posterior variance and reward models are reported beside it; a win rate "
    "whose interval does not lie above 0.5 is no gain.",
    effect="mean inference distance, chain / tree, at alpha 0.3, s = 1e-3, n = 1024",
    full_scale="Llama-2-7B on HH-RLHF, GSM-8K and DialogSum, equal numbers of pairs, labels and comparisons by GPT-4, "
    "PPO and best of N; 8 x 80 GB.",
    seeds=12,
    run_seed=run_seed,
    judge=judge,
    config={
        "branching": BRANCHING, "height": HEIGHT, "queries": QUERIES, "n": list(SIZES),
        "regimes (alpha, variance)": [list(each) for each in REGIMES], "n of designs": DESIGN_N,
        "reward models (alpha, beta, n)": [list(each) for each in MODELS], "best of": BEST_OF,
    },
)  # fmt: skip
