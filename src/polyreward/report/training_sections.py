"""Sections of a training report that draw what happened: held-out score, rewards, curriculum, tool calls, samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from polyreward.report.html import PALETTE, Section, figure, table, text
from polyreward.report.training_data import Run, binned, over_seeds
from polyreward.training.run import MOST_CALLS_TOLD_APART

STRATA = [
    *(f"{n} tool call{'s' * (n != 1)}" for n in range(MOST_CALLS_TOLD_APART)),
    f"{MOST_CALLS_TOLD_APART} or more",
]


def held_out_section(runs: Sequence[Run]) -> Section:
    """The held-out score by task, over the steps and before and after."""
    import plotly.graph_objects as go

    tasks = list(runs[0].held_out[0]["tasks"])
    plot = go.Figure()
    for k, task in enumerate(["all tasks", *tasks]):
        steps, mean, low, high = over_seeds(
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
    plot.update_yaxes(range=[-0.02, 1.02])
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


def rewards_section(runs: Sequence[Run]) -> Section:
    """What the sampled completions earned under each reward."""
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
                series.append(binned(log["step"][here], log[name][here]))
            steps, mean, _, _ = over_seeds(series)
            plot.add_scatter(
                x=steps, y=mean, name=task, mode="lines", line={"color": PALETTE[k % len(PALETTE)], "width": 2}
            )
        plot.update_layout(
            title=f"Reward: {name.removeprefix('reward/')}", xaxis_title="training step", yaxis_title="mean reward"
        )
        fragments.append(figure(plot, height=300))
    return Section("Rewards during training", fragments)


def curriculum_section(runs: Sequence[Run]) -> Section:
    """How often each task was drawn."""
    import plotly.graph_objects as go

    entries = [[e for e in run.metrics if "curriculum" in e] for run in runs]
    if not entries[0]:
        return Section("Curriculum")
    plot = go.Figure()
    for k, task in enumerate(entries[0][0]["curriculum"]):
        steps, mean, _, _ = over_seeds([[(e["step"], e["curriculum"][task]) for e in run] for run in entries])
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


def calls_section(runs: Sequence[Run]) -> Section:
    """Completions by number of tool calls, and what they earned."""
    import plotly.graph_objects as go

    logs = [run.log() for run in runs if "stratum" in run.log()]
    if not logs or all(len(np.unique(log["stratum"])) < 2 for log in logs):
        return Section("Tool calls")
    plot = go.Figure()
    for k, label in enumerate(STRATA):
        steps, mean, _, _ = over_seeds([binned(log["step"], (log["stratum"] == k).astype(float)) for log in logs])
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
    for k, label in enumerate(STRATA):
        count = sum(int((log["stratum"] == k).sum()) for log in logs)
        means = [_mean(np.concatenate([log[name][log["stratum"] == k] for log in logs])) for name in names]
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


def samples_section(run: Run) -> Section:
    """Answers to the same held-out prompts before and after."""
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


def _mean(values: np.ndarray) -> float | None:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else None
