"""RewardMATH: one correct solution against nine wrong ones, on recorded scores and on simulated reward models.

Claim: accuracy on a benchmark of one correct solution against nine wrong ones from many sources goes with what policies
reach that are optimised against the reward model, r-square above 0.8 against below 0.13 for RewardBench, and it
predicts over-optimisation (arXiv 2410.01729).

Three parts. Recorded scores (with real data): the scores that public reward models gave to 483 x 10 solutions are
evaluated again, and benchmarks of k comparisons are put to the test on held-out problems. Simulated reward models:
16 models with errors of six types; a wrong solution of type t scores ``-|u + 0.8 e_t| + N(0, 1)``, a correct one
``N(0, 1)``, and ``b`` more in human style; the accuracy of the best of 64 of each model is known exactly, and four
designs of benchmark are compared. Over-optimisation: the policy varies its style, wrong solutions more than right ones,
and the models add ``b`` times style to the score, so that some turn down as n grows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from polyreward.audit.benchmarks.best_of_n import best_of_n_curve, bon_kl
from polyreward.audit.benchmarks.one_to_many import OneToManyBenchmark
from polyreward.audit.benchmarks.readers import read_recorded_scores
from polyreward.audit.benchmarks.validity import benchmark_validity, selection_reliability
from polyreward.errors import MissingFileError
from polyreward.studies.base import Figures, Judgement, Study, StudyConfig, Verdict, arm, paired_bootstrap

MODELS, TYPES, PROBLEMS, POLICY, SAMPLES, WRONG = 16, 6, 300, 600, 256, 9
BEST_OF = 64
NS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
STYLE_SPREAD = 1.5
MISMATCHED, MATCHED, RANDOM, MANY = (
    "one to one, other style",
    "one to one, one type",
    "one to one, any type",
    "one to nine",
)
DESIGNS = (MISMATCHED, MATCHED, RANDOM, MANY)
KS, SIZES, SPLITS = (1, 2, 3, 6), (25, 100), 200
#: Accuracy and MRR in per cent of the recorded scores, by file and aggregation of steps.
RECORDED: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "ArmoRM": {"": (20.50, 42.18)},
    "Eurus-RM": {"": (16.98, 38.30)},
    "internlm2": {"": (37.27, 55.17)},
    "oasst-rm": {"": (7.04, 27.03)},
    "beaver": {"": (7.25, 26.59)},
    "Math_Shepherd": {"prod": (17.18, 34.68), "geometric_mean": (15.73, 33.61)},
}
TOLERANCE = 0.01


class SimulatedModels:
    """Reward models that err on six types of mistakes and like human style, each in its own measure.

    Attributes
    ----------
    severity : (models, 6)
        Mean score of a wrong solution of each type; a correct one has 0.
    liking : (models,)
        What style adds to the score.
    """

    def __init__(self, rng: np.random.Generator, models: int = MODELS) -> None:
        skill = rng.uniform(0.3, 2, models)
        self.severity = -np.abs(skill[:, None] + 0.8 * rng.normal(size=(models, TYPES)))
        self.liking = rng.normal(1, 1, models)
        self.rng = rng

    def correct(self, problems: int, style: np.ndarray | float = 0.0) -> np.ndarray:
        """Scores (models, problems, 1) of correct solutions."""
        noise = self.rng.normal(size=(len(self.liking), problems, 1))
        return np.asarray(noise + self.liking[:, None, None] * style)

    def wrong(self, types: np.ndarray, style: np.ndarray | float = 0.0) -> np.ndarray:
        """Scores (models, ...) of wrong solutions of `types` (problems, m)."""
        noise = self.rng.normal(size=(len(self.liking), *types.shape))
        return np.asarray(self.severity[:, types] + noise + self.liking[:, None, None] * style)


def run_seed(seed: int, config: StudyConfig) -> Figures:
    """Simulate both policies, and in seed 0 evaluate the recorded scores."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    problems, policy = (60, 60) if config.quick else (PROBLEMS, POLICY)
    figures = dict(simulated(rng, problems, policy))
    figures |= over_optimised(rng, problems, policy)
    if config.data is not None and seed == 0:
        figures |= recorded(config.data / "math", 20 if config.quick else SPLITS)
    return figures


def simulated(rng: np.random.Generator, problems: int, policy: int) -> dict[str, dict[str, float]]:
    """r-square over the models of each design of benchmark with the accuracy of the best of 64."""
    models = SimulatedModels(rng)
    one, any_type = np.zeros((problems, 1), int), rng.integers(TYPES, size=(problems, 1))
    many = rng.integers(TYPES, size=(problems, WRONG))
    designs = {
        MISMATCHED: (models.correct(problems, style=1.0), models.wrong(one)),
        MATCHED: (models.correct(problems), models.wrong(one)),
        RANDOM: (models.correct(problems), models.wrong(any_type)),
        MANY: (models.correct(problems), models.wrong(many)),
    }
    solved, types = policy_samples(rng, policy)
    reached = np.zeros(len(models.liking))
    for index, severity in enumerate(models.severity):
        scores = np.where(solved, 0.0, severity[types]) + rng.normal(size=solved.shape)
        reached[index] = best_of_n_curve(scores, solved, [BEST_OF])[0]
    figures: dict[str, dict[str, float]] = {}
    for name, (chosen, rejected) in designs.items():
        outcomes = [
            OneToManyBenchmark.from_scores(np.concatenate(scores, axis=1)).outcomes()
            for scores in zip(chosen, rejected, strict=True)
        ]
        figures[name] = {}
        for measure in ("accuracy", "mrr"):
            found = benchmark_validity([one[measure].mean() for one in outcomes], reached, n_boot=1)
            figures[name] |= {f"{measure} r2": found["r2"], f"{measure} spearman": found["spearman"]}
    figures["policies"] = {"lowest": float(reached.min()), "highest": float(reached.max()), "first": solved.mean()}
    return figures


def policy_samples(rng: np.random.Generator, policy: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of the samples of each problem are right, and of which type the wrong ones are, (policy, samples)."""
    rate = rng.beta(1, 3, size=(policy, 1))
    return rng.random((policy, SAMPLES)) < rate, rng.integers(TYPES, size=(policy, SAMPLES))


def over_optimised(rng: np.random.Generator, problems: int, policy: int) -> dict[str, dict[str, float]]:
    """Accuracy of the best of n where the policy varies style, and what the benchmarks say of the models before."""
    models = SimulatedModels(rng)
    solved, types = policy_samples(rng, policy)
    style = rng.normal(size=solved.shape) * np.where(solved, 1.0, STYLE_SPREAD)
    curves = []
    for severity, liking in zip(models.severity, models.liking, strict=True):
        scores = np.where(solved, 0.0, severity[types]) + rng.normal(size=solved.shape) + liking * style
        curves.append(best_of_n_curve(scores, solved, NS))
    curve = np.array(curves)
    drop, peak = curve.max(axis=1) - curve[:, -1], bon_kl(np.array(NS))[curve.argmax(axis=1)]
    many = rng.integers(TYPES, size=(problems, WRONG))
    own = (rng.normal(size=(problems, 1)), STYLE_SPREAD * rng.normal(size=(problems, WRONG)))
    styles = {"own styles": own, "one style": (np.zeros((problems, 1)), np.zeros((problems, WRONG)))}
    figures: dict[str, dict[str, float]] = {"over-optimisation": {"largest drop": float(drop.max())}}
    for name, (right, wrong) in styles.items():
        scores = np.concatenate([models.correct(problems, right), models.wrong(many, wrong)], axis=2)
        accuracy = [OneToManyBenchmark.from_scores(one).outcomes()["accuracy"].mean() for one in scores]
        figures["over-optimisation"] |= {
            f"accuracy and drop, {name}": _rank_correlation(accuracy, drop),
            f"accuracy and divergence at the peak, {name}": _rank_correlation(accuracy, peak),
        }
        if name == "own styles":
            order = np.argsort(accuracy)
            for kind, part in (("lowest four", order[:4]), ("highest four", order[-4:])):
                figures[f"curve, {kind}"] = dict(
                    zip((f"accuracy at {n}" for n in NS), curve[part].mean(axis=0).tolist(), strict=True)
                )
    return figures


def _rank_correlation(first: Sequence[float], second: np.ndarray) -> float:
    """Spearman's correlation; 0 where one side does not vary."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(benchmark_validity(first, second, n_boot=1)["spearman"])


def recorded(folder: Path, splits: int = SPLITS) -> dict[str, dict[str, float]]:
    """Accuracy and MRR of the recorded scores, and how well k comparisons predict the best of four elsewhere."""
    figures: dict[str, dict[str, float]] = {}
    tables = []
    for name, ways in RECORDED.items():
        for how in ways:
            benchmark = read_recorded_scores(_file(folder / "rewardmath_scores" / f"{name}.json.gz"), how or "prod")
            found = benchmark.evaluate()
            low, high = found["intervals"]["accuracy"]
            figures[_label(name, how)] = {
                "accuracy": 100 * found["accuracy"],
                "accuracy, low": 100 * low,
                "accuracy, high": 100 * high,
                "accuracy with ties": 100 * found["accuracy_with_ties"],
                "mrr": 100 * found["mrr"],
                "tie rate": 100 * found["tie_rate"],
                "pairwise": 100 * found["pairwise_mean"],
            }
        tables.append(benchmark.table())
    for size in (None, *SIZES):
        reliability = selection_reliability(np.stack(tables), KS, problems=size, splits=splits)
        figures[f"reliability, {size or 'half of the'} problems"] = {
            f"{k} comparisons": value for k, value in reliability.items()
        }
    figures |= rewardbench(folder)
    return figures


def rewardbench(folder: Path) -> dict[str, dict[str, float]]:
    """r-square with RewardBench's mathematical pairs, three ways to aggregate steps; nothing where these are absent."""
    pairs = {path.name: path for path in sorted((folder / "rewardbench_scores").glob("*.json.gz"))}
    shared = [path for path in sorted((folder / "rewardmath_scores").glob("*.json.gz")) if path.name in pairs]
    figures = {}
    for first, second in (("prod", "geometric_mean"), ("prod", "prod"), ("geometric_mean", "geometric_mean")):
        if len(shared) >= 3:
            one = [read_recorded_scores(pairs[path.name], first, 0).outcomes()["accuracy"].mean() for path in shared]
            many = [read_recorded_scores(path, second).outcomes()["accuracy"].mean() for path in shared]
            found = benchmark_validity(one, many)
            figures[f"RewardBench by {first}, RewardMATH by {second}"] = {
                "r2": found["r2"],
                "low": found["ci95"]["r2"][0],
                "high": found["ci95"]["r2"][1],
                "models": float(len(shared)),
            }
    return figures


def _label(name: str, how: str) -> str:
    return f"recorded, {name}{f' ({how})' if how else ''}"


def _file(path: Path) -> Path:
    if not path.is_file():
        raise MissingFileError(
            f"{path} does not exist; the folder of real data has the scores of {', '.join(RECORDED)}"
        )
    return path


def judge(runs: Sequence[Figures]) -> Judgement:
    """Apply `STUDY.rule`."""
    r2 = {name: arm(runs, name, "accuracy r2") for name in DESIGNS}
    effect, interval = paired_bootstrap(r2[MANY], r2[MISMATCHED])
    fragile, bounds = paired_bootstrap(arm(runs, "over-optimisation", "accuracy and drop, own styles"))
    above = (r2[MANY] > r2[MISMATCHED]) & (r2[MANY] > r2[MATCHED])
    checks = {
        "one to nine at least 0.8": bool(r2[MANY].mean() >= 0.8),
        "one to one in another style at most 0.35": bool(r2[MISMATCHED].mean() <= 0.35),
        "one to nine above both one-to-one designs of one type in every seed": bool(above.all()),
        "models of low accuracy drop more from their peak, interval below 0": bounds[1] < 0,
    }
    with_data = [run for run in runs if _label("ArmoRM", "") in run]
    if with_data:
        checks |= _recorded_checks(with_data[0])
    refuted = r2[MISMATCHED].mean() > 0.6 or interval[1] < 0 or bounds[0] > 0
    verdict: Verdict = "supported" if all(checks.values()) else "not supported" if refuted else "inconclusive"
    listed = ", ".join(f"{name} {values.mean():.2f}" for name, values in r2.items())
    single = arm(runs, "over-optimisation", "accuracy and drop, one style").mean()
    ends = {
        kind: [arm(runs, f"curve, {kind} four", f"accuracy at {n}").mean() for n in NS]
        for kind in ("lowest", "highest")
    }
    summary = (
        f"r-square with the accuracy of the best of {BEST_OF}: {listed}; by MRR of one to nine "
        f"{arm(runs, MANY, 'mrr r2').mean():.2f}; one to nine above both designs of one type in {int(above.sum())} of "
        f"{len(runs)} seeds. Where the policy varies style: Spearman of accuracy and drop from the peak {fragile:.2f} "
        f"[{bounds[0]:.2f}, {bounds[1]:.2f}] where the benchmark's solutions keep their writers' styles, {single:.2f} "
        "where all have one style; "
        + ", ".join(
            f"the {kind} four of 16 models {c[0]:.2f} at 1, {max(c):.2f} at best, {c[-1]:.2f} at 256"
            for kind, c in ends.items()
        )
        + "."
    )
    if with_data:
        summary += _recorded_summary(with_data[0])
    return Judgement(verdict, effect, interval, summary, checks)


def _recorded_checks(run: Figures) -> dict[str, bool]:
    close = all(
        abs(run[_label(name, how)]["accuracy"] - accuracy) <= TOLERANCE
        and abs(run[_label(name, how)]["mrr"] - mrr) <= TOLERANCE
        for name, ways in RECORDED.items()
        for how, (accuracy, mrr) in ways.items()
    )
    part = {size: run[f"reliability, {size} problems"] for size in SIZES}
    return {
        "recorded accuracy and MRR within 0.01 of the regression values": close,
        **{
            f"three comparisons predict better than one with {size} problems": found["3 comparisons"]
            > found["1 comparisons"]
            for size, found in part.items()
        },
    }


def _recorded_summary(run: Figures) -> str:
    models = "; ".join(
        f"{name[10:]} {part['accuracy']:.2f} [{part['accuracy, low']:.1f}, {part['accuracy, high']:.1f}] and "
        f"{part['mrr']:.2f}"
        for name, part in run.items()
        if name.startswith("recorded, ")
    )
    reliability = "; ".join(
        f"{name[13:]} " + ", ".join(f"{k.split()[0]}: {value:.2f}" for k, value in part.items())
        for name, part in run.items()
        if name.startswith("reliability, ")
    )
    bench = "; ".join(
        f"{name} {part['r2']:.3f} [{part['low']:.2f}, {part['high']:.2f}]"
        for name, part in run.items()
        if name.startswith("RewardBench")
    )
    return (
        f" Recorded accuracy and MRR in %: {models}. r-square over {len(RECORDED)} models of k comparisons with the "
        f"best of four on held-out problems: {reliability}." + (f" r-square: {bench}." if bench else "")
    )


STUDY = Study(
    slug="21-rewardmath",
    method="rewardmath",
    claim="Accuracy on one correct against nine wrong solutions from many sources goes with the results of policies "
    "optimised against the reward model, r-square above 0.8 against below 0.13 for RewardBench, and predicts reward "
    "over-optimisation (arXiv 2410.01729).",
    task="Simulated reward models with errors of six types and a liking for style, a policy whose best of n is known "
    "exactly; with real data the scores that six public reward models gave to 483 x 10 solutions.",
    baselines="One-to-one benchmarks of the same 300 problems: the correct solution in another style, in the same "
    "style with one type of error, in the same style with any type. Nothing is trained: there is no learning rate.",
    measure="r-square over 16 models of the benchmark's accuracy with the accuracy of the best of 64 on 600 problems, "
    "exact over all subsets of 256 samples. Spearman's correlation of accuracy with the drop from the peak of the "
    "curve up to 256, where the policy varies style (deviation 1 of right solutions, 1.5 of wrong ones).",
    rule="Supported: mean r-square of one to nine at least 0.8 and of one to one in another style at most 0.35, one to "
    "nine above both one-to-one designs of one type in every seed, and a negative correlation of accuracy and drop "
    "with its interval, for a benchmark whose solutions keep their writers' styles; with real data also the recorded "
    "accuracies and MRR within 0.01 of the regression values, and three comparisons better than one with 25 and 100 "
    "problems. Not supported: one to one in another style above 0.6 or significantly above one to nine, or the "
    "correlation significantly positive. Otherwise inconclusive.",
    effect="r-square with the best of 64, one to nine - one to one in another style",
    full_scale="New reward models on all 4,830 solutions, best of 256 and PPO policies on MATH500, Gaokao and SAT; "
    "8 x 80 GB.",
    seeds=20,
    run_seed=run_seed,
    judge=judge,
    config={
        "models": MODELS,
        "types of error": TYPES,
        "problems": PROBLEMS,
        "policy problems": POLICY,
        "samples": SAMPLES,
        "wrong solutions": WRONG,
        "style spread of wrong solutions": STYLE_SPREAD,
        "splits": SPLITS,
    },
)
