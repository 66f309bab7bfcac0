"""The HTML report of a training run: what the policy gained, on what, by which rewards, at what price in tool calls.

Reads the run folder only, so it can be written again at any time, also while the run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from polyreward.advantages.config import to_code
from polyreward.errors import MissingFileError, PolyrewardError
from polyreward.report.html import Section, cards, code, details, heading, notice, text, write_page
from polyreward.report.training_data import Run
from polyreward.report.training_sections import (
    calls_section,
    curriculum_section,
    held_out_section,
    rewards_section,
    samples_section,
)
from polyreward.training.evaluation import mean_interval
from polyreward.training.parts import make_advantage
from polyreward.training.recipe import Recipe, load_recipe
from polyreward.training.seeds import seed_folders


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
    runs = [Run(path) for path in seed_folders(folder)]
    runs = [run for run in runs if run.held_out]
    if not runs:
        raise MissingFileError(f"{folder} holds no held-out score yet; the run has not got past its start")
    sections = [
        held_out_section(runs),
        rewards_section(runs),
        curriculum_section(runs),
        calls_section(runs),
        samples_section(runs[0]),
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


def _subtitle(recipe: Recipe, runs: Sequence[Run]) -> str:
    policy = recipe.policy.model or "a small decoder made and warm-started for this run"
    source = recipe.data.path or f"{len(recipe.tasks.families)} task families"
    unfinished = sum(not run.done for run in runs)
    state = f" {unfinished} of {len(runs)} runs are not finished." if unfinished else ""
    return (
        f"{policy}, trained for {recipe.training.steps} steps on {source} with {len(recipe.rewards)} rewards, "
        f"{len(runs)} seed{'s' * (len(runs) != 1)}.{state}"
    )


def _headline(runs: Sequence[Run]) -> list[str]:
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
    mean, _, high = mean_interval(values)
    return f"{mean:.3f}" if len(values) < 2 else f"{mean:.3f} ± {high - mean:.3f}"


def _diagnosis(run: Run, recipe: Recipe) -> Section:
    fragments = [heading("How rewards become advantages in this run"), code(_advantage(recipe))]
    if run.log():
        fragments += [heading("What polyreward diagnose finds in the rollout log"), *_findings(run.folder, recipe)]
    fragments.append(text("The full diagnosis, with figures and the what-if of other advantages:"))
    fragments.append(code(f"polyreward diagnose {run.folder}"))
    return Section("Advantages and diagnosis", fragments)


def _findings(folder: Path, recipe: Recipe) -> list[str]:
    from polyreward.audit.diagnose import diagnose
    from polyreward.data.rollouts import read_rollouts

    try:
        found = diagnose(
            read_rollouts(folder / "rollouts", measure_texts=True),
            reference=recipe.evaluation.score,
            weights={reward.name: reward.weight for reward in recipe.rewards},
            transform=make_advantage(recipe.advantage, recipe.rewards),
        )
    except PolyrewardError as error:
        return [text(f"The log cannot be diagnosed: {error}")]
    fragments = [text("Findings describe the rewards as they were sampled, whichever advantage the run used.")]
    if not found.problems():
        fragments.append(notice("no problem found", "None of the checks found a problem in this log.", "good"))
    for finding in found.findings:
        label = "note" if finding.severity == "info" else finding.severity
        fragments.append(notice(f"{label}: {finding.kind}", finding.statement, finding.severity))
    if found.what_if is not None:
        fragments.append(text("The advantage that the findings call for, to compare with the one above:"))
        fragments.append(code(found.what_if.code))
    return fragments


def _advantage(recipe: Recipe) -> str:
    return to_code(make_advantage(recipe.advantage, recipe.rewards)).replace("), ", "),\n      ")


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
