from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(Path(__file__).parents[1] / "src"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}


def cli(*arguments: str, cwd: Path, largest_file: int | None = None) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    return subprocess.run(
        [sys.executable, "-m", "polyreward", "train", *arguments],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """The real command line in this process: (exit code, standard error)."""
    from polyreward.cli import main

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["polyreward", "train", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), capsys.readouterr().err

    return run


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "brevity.py").write_text(
        "def brevity(prompts, completions, **c):\n    return [-0.01 * len(t) for t in completions]\n"
    )
    path = tmp_path / "tiny.toml"
    path.write_text(
        (Path(__file__).parent / "training" / "tiny.toml").read_text().replace("BREVITY", str(tmp_path / "brevity.py"))
    )
    return path


@pytest.mark.slow
def test_several_seeds_run_in_processes_and_end_in_one_report(recipe: Path, tmp_path: Path) -> None:
    arguments = (
        str(recipe),
        "--seeds",
        "2",
        "--set",
        "training.steps=2",
        "--set",
        "evaluation.every=1",
        "--out",
        "out",
    )
    done = cli(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Report: out/report.html" in done.stdout
    assert "polyreward diagnose out/seed-0" in done.stdout
    assert "training 2/2" in done.stderr
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["seeds"] == [0, 1]
    assert len(summary["after"]["per_seed"]) == 2
    assert {path.name for path in out.iterdir()} == {"recipe.toml", "report.html", "summary.json", "seed-0", "seed-1"}
    page = (out / "report.html").read_text()
    for words in (
        "Held-out score by task",
        "Reward: brevity",
        "Probability of drawing each task",
        "Before and after",
        "chain(",
    ):
        assert words in page
    assert "http://" not in page.split("<body>")[1]
    results = [(out / f"seed-{n}" / "result.json").read_text() for n in (0, 1)]
    again = cli(*arguments, cwd=tmp_path)  # complete: the same figures at once
    assert again.returncode == 0
    assert [(out / f"seed-{n}" / "result.json").read_text() for n in (0, 1)] == results


@pytest.mark.slow
def test_a_disk_that_takes_no_more_is_one_clear_error_and_the_run_goes_on_later(recipe: Path, tmp_path: Path) -> None:
    full = cli(str(recipe), "--out", "out", "--set", "training.steps=2", cwd=tmp_path, largest_file=9000)
    assert full.returncode == 2, full.stderr
    assert "cannot write to out" in full.stderr
    assert "run the same command again" in full.stderr
    assert "Traceback" not in full.stderr
    assert not (tmp_path / "out" / "policy").exists()
    later = cli(str(recipe), "--out", "out", "--set", "training.steps=2", cwd=tmp_path)
    assert later.returncode == 0, later.stderr


@pytest.mark.slow
def test_control_c_leaves_a_run_that_the_same_command_finishes_with_the_same_figures(
    recipe: Path, tmp_path: Path
) -> None:
    arguments = (str(recipe), "--seeds", "2", "--set", "training.steps=40", "--set", "training.save_every=20")
    command = [sys.executable, "-m", "polyreward", "train", *arguments, "--out", "stopped"]
    # A session of its own, so that the signal reaches the processes of the run and no other, as a terminal's does.
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        started = {line.split(":")[0] for line in iter(process.stderr.readline, "") if _trains(line, process)}
        process.wait(timeout=100)
    assert started
    assert process.returncode == 130
    assert not list((tmp_path / "stopped").glob("seed-*/result.json"))
    assert list((tmp_path / "stopped").glob("seed-*/checkpoints/checkpoint-*/polyreward.json"))
    assert cli("--resume", "stopped", cwd=tmp_path).returncode == 0
    assert cli(*arguments, "--out", "whole", cwd=tmp_path).returncode == 0
    for name in ("seed-0/metrics.jsonl", "seed-1/metrics.jsonl", "summary.json"):
        assert (tmp_path / "stopped" / name).read_text() == (tmp_path / "whole" / name).read_text()


def _trains(line: str, process: subprocess.Popen[str]) -> bool:
    """Whether the line reports a training step; the first one is answered with Ctrl-C."""
    if ": training " not in line or line.split("training ")[1].startswith("0/"):
        return False
    os.killpg(process.pid, signal.SIGINT)
    return True


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_report_draws_in_a_browser_without_errors(recipe: Path, tmp_path: Path) -> None:
    from polyreward.report.training import write_training_report
    from polyreward.training.recipe import load_recipe
    from polyreward.training.seeds import run_recipe

    run_recipe(load_recipe(recipe, ["training.steps=2"]), tmp_path / "out")
    report = write_training_report(tmp_path / "out")
    assert CHROMIUM is not None
    switches = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=4000 --enable-logging=stderr --dump-dom"
    )
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [CHROMIUM, *switches.split(), profile, report.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "Uncaught" not in done.stderr
    assert done.stdout.count('class="main-svg"') >= 5 * 2


def test_the_run_folder_in_the_way_is_named(call, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "thesis.txt").write_text("precious")
    code, error = call(str(recipe), "--out", str(tmp_path / "busy"))
    assert code == 2
    assert "is not empty and holds no run" in error
    assert (tmp_path / "busy" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "training.stpes=3"], "unknown key 'training.stpes'; did you mean 'steps'"),
        (["--set", "training.group_size=1"], "a group of one has no baseline"),
        (["--set", "training.micro_batch=5"], "micro_batch=5 does not divide"),
        (["--set", "advantage.chain=[{part='Centre'}]"], "no part 'Centre'; did you mean 'Center'"),
        (["--set", "advantage.preset=grop"], "no preset 'grop'; did you mean 'grpo'"),
        (["--set", "rewards.brevity.use=gone.py:f"], "no such file: gone.py"),
        (["--set", "rewards.brevity.use=nowhere:f"], "importing it failed"),
        (["--set", "tasks.families.0.name=chain_smu"], "no task 'chain_smu'; did you mean 'chain_sum'"),
        (["--set", "tasks.tools=['clac']"], "no tool 'clac'; did you mean 'calc'"),
        (["--set", "curriculum.name=dmp"], "curriculum: no curriculum 'dmp'; did you mean 'dump'"),
        (["--model", "./no/such/model"], "policy.model: no such folder: ./no/such/model"),
        (["--model", "EMPTY"], "cannot load"),
        (["--data", "gone.jsonl", "--model", "EMPTY"], "no such file: gone.jsonl"),
        (["--column", "prompt"], "expected KEY=NAME"),
        (["--resume", "nowhere"], "nowhere holds no run"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(
    call, recipe: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    arguments = [str(tmp_path / "empty") if a == "EMPTY" else a for a in arguments]
    code, error = call(str(recipe), "--out", str(tmp_path / "out"), *arguments)
    assert code == 2
    assert message in " ".join(error.split())
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "result.json").exists()
