"""The HTML report of a training run: what the policy gained, on what, by which rewards, at what price in tool calls.

Reads the run folder only, so it can be written again at any time, also while the run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from polyreward.errors import MissingFileError
from polyreward.report.html import (
    PALETTE,
    Section,
    cards,
    code,
    details,
    figure,
    heading,
    notice,
    table,
    text,
    write_page,
)
from polyreward.training.journal import read_lines
from polyreward.training.recipe import AdvantageSection, BranchSection, Recipe, load_recipe
from polyreward.training.run import MOST_CALLS_TOLD_APART
from polyreward.training.seeds import seed_folders

_KINDS = {"error": "error", "warning": "warning", "info": "info"}
_STRATA = [
    *(f"{n} tool call{'s' * (n != 1)}" for n in range(MOST_CALLS_TOLD_APART)),
    f"{MOST_CALLS_TOLD_APART} or more",
]


def write_training_report(folder: str | Path) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    Raises
    ------
    MissingFileError
        The folder holds no run.
    """
    folder = Path(folder)
    if not (folder / "recipe.toml").is_file():
        raise MissingFileError(f"{folder} holds no run (no recipe.toml in it)")
    recipe = load_recipe(folder / "recipe.toml")
    runs = [_Run(path) for path in seed_folders(folder)]
    runs = [run for run in runs if run.held_out]
    if not runs:
        raise MissingFileError(f"{folder} holds no held-out score yet; the run has not got past its start")
    sections = [
        _held_out(runs),
        _rewards(runs),
        _curriculum(runs),
        _calls(runs),
        _samples(runs[0]),
        _diagnosis(runs[0], recipe),
        _recipe(recipe, folder),
    ]
    return write_page(
        folder / "report.html",
        f"Training run: {recipe.name}",
        [section for section in sections if section.fragments],
        subtitle=_subtitle(recipe, runs),
        lead=_headline(runs),
    )


class _Run:
    """What one seed has written so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seed = load_recipe(folder / "recipe.toml").seed if (folder / "recipe.toml").is_file() else 0
        self.held_out = read_lines(folder / "held_out.jsonl")
        self.metrics = read_lines(folder / "metrics.jsonl")
        self.done = (folder / "result.json").is_file()
        self._log: dict[str, np.ndarray] | None = None

    def log(self) -> dict[str, np.ndarray]:
        """Columns of the rollout log: step, task, stratum and the rewards."""
        if self._log is None:
            from polyreward.data.rollouts import read_rollouts

            try:
                batch = read_rollouts(self.folder / "rollouts", columns=("step", "task", "stratum"))
            except MissingFileError:
                self._log = {}
                return self._log
            columns = {name: np.asarray(values) for name, values in batch.columns.items()}
            columns |= {f"reward/{name}": batch.reward(name).numpy() for name in batch.names}
            self._log = columns
        return self._log


def _subtitle(recipe: Recipe, runs: Sequence[_Run]) -> str:
    policy = recipe.policy.model or "a small decoder made and warm-started for this run"
    source = recipe.data.path or f"{len(recipe.tasks.families)} task families"
    unfinished = sum(not run.done for run in runs)
    state = f" {unfinished} of {len(runs)} runs are not finished." if unfinished else ""
    return (
        f"{policy}, trained for {recipe.training.steps} steps on {source} with {len(recipe.rewards)} rewards, "
        f"{len(runs)} seed{'s' * (len(runs) != 1)}.{state}"
    )


def _headline(runs: Sequence[_Run]) -> list[str]:
    from polyreward.training.evaluation import mean_interval

    before = [run.held_out[0]["score"] for run in runs]
    after = [run.held_out[-1]["score"] for run in runs]
    change, low, high = mean_interval([b - a for a, b in zip(before, after, strict=True)])
    facts = [
        ("held-out score before training", _with_interval(before)),
        ("held-out score after training", _with_interval(after)),
        ("change, 95 % interval over seeds" if len(runs) > 1 else "change, one seed", f"{change:+.3f}"),
    ]
    if len(runs) > 1:
        sure = low > 0
        spread = f"95 % interval {low:+.3f} to {high:+.3f}"
        words = (
            f"Training raised the held-out score by {change:.3f} ({spread} over {len(runs)} seeds)."
            if sure
            else f"The change of {change:+.3f} is within what seeds alone make ({spread})."
        )
        return [cards(facts), notice("Result", words, "good" if sure else "warning")]
    return [cards(facts), notice("Result", "One seed shows no interval; run with --seeds 3 for one.", "info")]


def _with_interval(values: Sequence[float]) -> str:
    from polyreward.training.evaluation import mean_interval

    mean, _, high = mean_interval(values)
    return f"{mean:.3f}" if len(values) < 2 else f"{mean:.3f} ± {high - mean:.3f}"


def _held_out(runs: Sequence[_Run]) -> Section:
    import plotly.graph_objects as go

    tasks = list(runs[0].held_out[0]["tasks"])
    plot = go.Figure()
    for k, task in enumerate(["all tasks", *tasks]):
        steps, mean, low, high = _over_seeds(
            [
                [(e["step"], e["score"] if k == 0 else e["tasks"].get(task, np.nan)) for e in run.held_out]
                for run in runs
            ]
        )
        color = "#1f2933" if k == 0 else PALETTE[(k - 1) % len(PALETTE)]
        if len(runs) > 1 and k == 0:
            plot.add_scatter(
                x=[*steps, *steps[::-1]],
                y=[*high, *low[::-1]],
                fill="toself",
                mode="lines",
                line={"width": 0},
                fillcolor="rgba(31,41,51,0.12)",
                hoverinfo="skip",
                showlegend=False,
            )
        plot.add_scatter(
            x=steps,
            y=mean,
            name=task,
            mode="lines+markers",
            marker={"size": 5},
            line={"color": color, "width": 3.5 if k == 0 else 2},
        )
    plot.update_layout(title="Held-out score by task", xaxis_title="training step", yaxis_title="score (1 = all right)")
    plot.update_yaxes(range=[0, 1.02])
    shade = " The band is the lowest to the highest seed." if len(runs) > 1 else ""
    rows = [
        [
            task,
            float(np.mean([run.held_out[0]["tasks"].get(task, np.nan) for run in runs])),
            float(np.mean([run.held_out[-1]["tasks"].get(task, np.nan) for run in runs])),
            float(np.mean([run.held_out[0]["calls"].get(task, np.nan) for run in runs])),
            float(np.mean([run.held_out[-1]["calls"].get(task, np.nan) for run in runs])),
        ]
        for task in tasks
    ]
    return Section(
        "What the policy learned",
        [
            text("The held-out prompts are fixed and never trained on. A score of 1 is a perfect answer."),
            figure(plot, f"Mean over seeds, step 0 is the policy before training.{shade}", 380),
            table(["task", "score before", "score after", "tool calls before", "tool calls after"], rows),
        ],
    )


def _rewards(runs: Sequence[_Run]) -> Section:
    import plotly.graph_objects as go

    logs = [run.log() for run in runs if run.log()]
    if not logs:
        return Section("Rewards during training")
    names = [name for name in logs[0] if name.startswith("reward/")]
    tasks = list(runs[0].held_out[0]["tasks"])
    fragments = [text("What the sampled completions earned under each reward, by task. Each figure has its own scale.")]
    for name in names:
        plot = go.Figure()
        for k, task in enumerate(tasks):
            series = []
            for log in logs:
                here = log["task"] == task
                series.append(_binned(log["step"][here], log[name][here]))
            steps, mean, _, _ = _over_seeds(series)
            plot.add_scatter(
                x=steps, y=mean, name=task, mode="lines", line={"color": PALETTE[k % len(PALETTE)], "width": 2}
            )
        plot.update_layout(
            title=f"Reward: {name.removeprefix('reward/')}", xaxis_title="training step", yaxis_title="mean reward"
        )
        fragments.append(figure(plot, height=300))
    return Section("Rewards during training", fragments)


def _curriculum(runs: Sequence[_Run]) -> Section:
    import plotly.graph_objects as go

    entries = [[e for e in run.metrics if "curriculum" in e] for run in runs]
    if not entries[0]:
        return Section("Curriculum")
    plot = go.Figure()
    for k, task in enumerate(entries[0][0]["curriculum"]):
        steps, mean, _, _ = _over_seeds([[(e["step"], e["curriculum"][task]) for e in run] for run in entries])
        plot.add_scatter(
            x=steps,
            y=mean,
            name=task,
            mode="lines",
            stackgroup="all",
            line={"width": 0.5, "color": PALETTE[k % len(PALETTE)]},
        )
    plot.update_layout(title="Probability of drawing each task", xaxis_title="training step", yaxis_title="probability")
    plot.update_yaxes(range=[0, 1])
    return Section(
        "Curriculum",
        [
            text("The curriculum draws a task more often while its completions still differ in reward."),
            figure(plot, "Mean over seeds; the bands of one step add up to 1."),
        ],
    )


def _calls(runs: Sequence[_Run]) -> Section:
    import plotly.graph_objects as go

    logs = [run.log() for run in runs if "stratum" in run.log()]
    if not logs or all(len(np.unique(log["stratum"])) < 2 for log in logs):
        return Section("Tool calls")
    plot = go.Figure()
    for k, label in enumerate(_STRATA):
        steps, mean, _, _ = _over_seeds([_binned(log["step"], (log["stratum"] == k).astype(float)) for log in logs])
        plot.add_scatter(
            x=steps,
            y=mean,
            name=label,
            mode="lines",
            stackgroup="all",
            line={"width": 0.5, "color": PALETTE[k % len(PALETTE)]},
        )
    plot.update_layout(title="Completions by number of tool calls", xaxis_title="training step", yaxis_title="share")
    plot.update_yaxes(range=[0, 1])
    names = [name for name in logs[0] if name.startswith("reward/")]
    rows = []
    for k, label in enumerate(_STRATA):
        count = sum(int((log["stratum"] == k).sum()) for log in logs)
        means = [
            float(np.nanmean(np.concatenate([log[name][log["stratum"] == k] for log in logs]))) if count else None
            for name in names
        ]
        rows.append([label, count, *means])
    return Section(
        "Tool calls",
        [
            text(
                "Completions with different numbers of tool calls are different strata of a group: rewards differ "
                "for reasons that have nothing to do with how well a call was made."
            ),
            figure(plot, "All tasks together, mean over seeds."),
            table(["stratum", "completions", *[f"mean {n.removeprefix('reward/')}" for n in names]], rows),
        ],
    )


def _samples(run: _Run) -> Section:
    first, last = run.held_out[0]["samples"], run.held_out[-1]["samples"]
    rows = []
    for a, b in zip(first, last, strict=False):
        for when, sample in (("before", a), ("after", b)):
            task, prompt = (a["task"], a["prompt"][-160:]) if when == "before" else ("", "")
            rows.append([task, prompt, when, sample["completion"][:400] or "(empty)", sample["score"]])
    return Section(
        "Before and after",
        [
            text(f"The same held-out prompts, answered by the policy before and after training (seed {run.seed})."),
            table(["task", "prompt", "when", "completion", "score"], rows),
        ],
    )


def _diagnosis(run: _Run, recipe: Recipe) -> Section:
    fragments = [heading("How rewards become advantages in this run"), code(_advantage_line(recipe))]
    if run.log():
        fragments += [heading("What polyreward diagnose finds in the rollout log"), *_findings(run.folder, recipe)]
    fragments.append(text("The full diagnosis, with figures and the what-if of other advantages:"))
    fragments.append(code(f"polyreward diagnose {run.folder}"))
    return Section("Advantages and diagnosis", fragments)


def _findings(folder: Path, recipe: Recipe) -> list[str]:
    from polyreward.audit.diagnose import diagnose
    from polyreward.data.rollouts import read_rollouts
    from polyreward.errors import PolyrewardError
    from polyreward.training.parts import make_advantage

    try:
        found = diagnose(
            read_rollouts(folder / "rollouts"),
            weights={reward.name: reward.weight for reward in recipe.rewards},
            transform=make_advantage(recipe.advantage, recipe.rewards),
        )
    except PolyrewardError as error:
        return [text(f"The log cannot be diagnosed: {error}")]
    if not found.findings:
        return [notice("No finding", "No reward is drowned, no stratum biased, no task without signal.", "good")]
    fragments = [text("Findings describe the rewards as they were sampled, whichever advantage the run used.")]
    fragments += [notice(f"{f.severity}: {f.kind}", f.statement, _KINDS[f.severity]) for f in found.findings]
    if found.what_if is not None:
        fragments.append(text("The advantage that the findings call for, to compare with the one above:"))
        fragments.append(code(found.what_if.code))
    return fragments


def _advantage_line(recipe: Recipe) -> str:
    section = recipe.advantage
    weights = {reward.name: reward.weight for reward in recipe.rewards}
    if section.blend:
        return "blend(" + ", ".join(f"{b.weight} * {_form(b, weights)}" for b in section.blend) + ")"
    return _form(section, weights)


def _form(section: AdvantageSection | BranchSection, weights: dict[str, float]) -> str:
    if not section.chain:
        options = ", ".join(f"{key}={value!r}" for key, value in section.options.items())
        return f"{(section.preset or 'grpo').replace('-', '_')}({options})"
    lines = []
    for entry in section.chain:
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
        options = ", ".join(f"{key}={value!r}" for key, value in given.items() if key != "part")
        if entry["part"] == "WeightedSum" and "weights" not in entry:
            options = f"{weights!r}"
        lines.append(f"    {entry['part']}({options}),")
    return "\n".join(["chain(", *lines, ")"])


def _recipe(recipe: Recipe, folder: Path) -> Section:
    written = (folder / "recipe.toml").read_text(encoding="utf-8")
    return Section(
        "Recipe",
        [
            text("The run with every default filled in. The same file gives the same figures on the same machine."),
            details("recipe.toml", [code(written)]),
            details("settings as JSON", [code(json.dumps(recipe.model_dump(mode="json"), indent=1))]),
        ],
    )


def _binned(steps: np.ndarray, values: np.ndarray, bins: int = 40) -> list[tuple[float, float]]:
    """Means of about `bins` stretches of steps, so that a curve is read and not its noise."""
    present = ~np.isnan(values)
    steps, values = steps[present], values[present]
    if not steps.size:
        return []
    width = max(1, int(np.ceil(steps.max() / bins)))
    codes = (steps - 1) // width
    found, inverse = np.unique(codes, return_inverse=True)
    totals = np.bincount(inverse, weights=values) / np.bincount(inverse)
    return [(float(code * width + (width + 1) / 2), float(total)) for code, total in zip(found, totals, strict=True)]


def _over_seeds(
    series: Sequence[Sequence[tuple[float, float]]],
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Steps, mean, lowest and highest over seeds, at each step that any seed has."""
    steps = sorted({step for one in series for step, _ in one})
    tables = [dict(one) for one in series]
    values = np.array([[table.get(step, np.nan) for step in steps] for table in tables], dtype=float).reshape(
        len(tables), -1
    )
    if not steps:
        return [], [], [], []
    return steps, np.nanmean(values, 0).tolist(), np.nanmin(values, 0).tolist(), np.nanmax(values, 0).tolist()
