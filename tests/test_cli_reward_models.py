"""`polyreward fit`, `score` and `audit` through the real command line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import polars
import pytest

from polyreward.cli import main

ROOT = Path(__file__).parents[1]
GOOD, BAD = ("good", "kind", "clear"), ("bad", "rude", "vague")


def command(*arguments: object) -> tuple[list[str], dict[str, str]]:
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "NO_COLOR": "1", "COLUMNS": "200"}
    return [sys.executable, "-m", "polyreward", *map(str, arguments)], environment


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def cli(*arguments: object) -> Done:
    """The command line in this process, which has torch in it already."""
    out, error = io.StringIO(), io.StringIO()
    code: Any = 0
    with (
        mock.patch.object(sys, "argv", ["polyreward", *map(str, arguments)]),
        mock.patch.dict(os.environ, {"NO_COLOR": "1", "COLUMNS": "200"}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
        warnings.catch_warnings(),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    return Done(code or 0, out.getvalue(), error.getvalue())


def write_pairs(path: Path, count: int = 300, seed: int = 0) -> Path:
    """Answers of three words, the one with more good words chosen; two annotators."""
    rng = np.random.default_rng(seed)
    with path.open("w") as stream:
        for number in range(count):
            answers = [rng.choice(GOOD + BAD, 3).tolist() for _ in range(2)]
            worth = [sum(1 if word in GOOD else -1 for word in answer) for answer in answers]
            if worth[0] == worth[1]:
                continue
            better = int(worth[1] > worth[0])
            row = {
                "prompt": f"question {number}",
                "chosen": " ".join(answers[better]),
                "rejected": " ".join(answers[1 - better]),
                "annotator": f"person-{number % 2}",
            }
            stream.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("fit")
    data = write_pairs(folder / "pairs.jsonl")
    done = cli("fit", data, "--out", folder / "model", "--set", "encoder.width=64", "--set", "fit.learning_rate=0.05")
    assert done.returncode == 0, done.stderr
    return folder / "model", data


def test_fit_writes_a_model_its_figures_and_a_report(fitted: tuple[Path, Path]) -> None:
    model, _ = fitted
    record = json.loads((model / "fit.json").read_text())
    assert record["command"]["encoder"] == "hashing"
    assert record["audit"]["figures"]["accuracy"] > 0.9
    assert (model / "report.html").is_file()
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in model.iterdir()}
    assert not (model / "fit.pt").exists()


def test_fit_does_not_replace_a_model_unasked(fitted: tuple[Path, Path]) -> None:
    model, data = fitted
    done = cli("fit", data, "--out", model)
    assert done.returncode == 2
    assert "--fresh" in done.stderr


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_score_keeps_rows_and_order(fitted: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    model, data = fitted
    out = tmp_path / f"scores.{kind}"
    done = cli("score", model, data, "--out", out, "--rows", 7)
    assert done.returncode == 0, done.stderr
    given = [json.loads(line) for line in data.read_text().splitlines()]
    if kind == "jsonl":
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    else:
        rows = (polars.read_csv if kind == "csv" else polars.read_parquet)(out).to_dicts()
    scores = [json.loads(row["score"]) if kind == "csv" else row["score"] for row in rows]
    assert [row["chosen"] for row in rows] == [row["chosen"] for row in given]
    assert np.mean([chosen > rejected for chosen, rejected in scores]) > 0.9
    assert not list(tmp_path.glob("*.part"))


def test_score_takes_single_completions_and_unjudged_lists(fitted: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = fitted
    data = tmp_path / "rows.jsonl"
    data.write_text(
        '{"prompt": "q", "completion": "good kind"}\n{"prompt": "q", "responses": ["bad", "good", "rude"]}\n'
    )
    done = cli("score", model, data, "--out", tmp_path / "scores.jsonl")
    assert done.returncode == 0, done.stderr
    one, three = (json.loads(line)["score"] for line in (tmp_path / "scores.jsonl").read_text().splitlines())
    assert isinstance(one, float)
    assert len(three) == 3
    assert max(three) == three[1]


def test_a_stopped_score_goes_on_where_it_was(fitted: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = fitted
    whole, out = tmp_path / "whole.jsonl", tmp_path / "scores.jsonl"
    assert cli("score", model, data, "--out", whole).returncode == 0
    part = tmp_path / "scores.jsonl.part"
    assert cli("score", model, data, "--out", tmp_path / "other.jsonl", "--rows", 10).returncode == 0
    key = {"model": str(model), "data": str(data), "annotator": None, "layout": "auto", "columns": []}
    lines = whole.read_text().splitlines(keepends=True)
    part.write_text(json.dumps(key) + "\n" + "".join(lines[:20]) + lines[20][:30])  # torn in the middle of a row
    done = cli("score", model, data, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "20 rows are done already" in done.stderr
    assert out.read_text() == whole.read_text()


def test_the_unfinished_output_of_another_command_is_left_alone(fitted: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = fitted
    part = tmp_path / "scores.jsonl.part"
    part.write_text('{"model": "another"}\n')
    done = cli("score", model, data, "--out", tmp_path / "scores.jsonl")
    assert done.returncode == 2
    assert "another command" in done.stderr
    assert part.read_text() == '{"model": "another"}\n'


def test_audit_shows_figures_and_writes_a_page(fitted: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = fitted
    page = tmp_path / "audit.html"
    done = cli("audit", "rm", model, data, "--html", page)
    assert done.returncode == 0, done.stderr
    assert all(words in done.stdout for words in ("accuracy", "calibration error", "Per annotator", "person-0"))
    content = page.read_text()
    assert all(f"<h2>{title}</h2>" in content for title in ("Figures", "Calibration", "Per annotator"))
    again = cli("audit", "rm", model, data, "--json")
    record = json.loads(again.stdout)
    assert record["figures"]["accuracy"] > 0.9
    assert record["counts"]["unknown annotators"] == 0


def test_audit_of_ratings_draws_the_best_of_n(fitted: tuple[Path, Path], tmp_path: Path) -> None:
    """People like one good word and hate three, and the model does not know: selecting by it overdoes it."""
    model, _ = fitted
    rng, data = np.random.default_rng(0), tmp_path / "rated.jsonl"
    with data.open("w") as stream:
        for number in range(80):
            counts = rng.permutation([0, 0, 1, 1, 2, 2, 3, 3])
            answers = [" ".join([*rng.choice(GOOD, k), *rng.choice(BAD, 3 - k)]) for k in counts]
            ratings = [[2, 5, 3, 1][k] for k in counts]
            stream.write(json.dumps({"prompt": f"q{number}", "responses": answers, "ratings": ratings}) + "\n")
    done = cli("audit", "rm", model, data, "--html", tmp_path / "audit.html")
    assert done.returncode == 0, done.stderr
    assert "Best of n" in done.stdout
    assert "over-optimisation" in done.stdout
    assert "<h2>Best of n</h2>" in (tmp_path / "audit.html").read_text()


def test_audit_of_recorded_scores_is_a_line_a_file(tmp_path: Path) -> None:
    tags = ["human_to_GPT-4", "a", "b", "c"]
    files = []
    for name, right in (("good", 9.0), ("poor", 0.5)):
        rows = [{"problem": f"p{i}", "solution_reference": tags, "score": [right, 1.0, 0.0, 0.2]} for i in range(4)]
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(rows))
    done = cli("audit", "rm", "recorded", *files, "--benchmark", "rewardmath")
    assert done.returncode == 0, done.stderr
    good, poor = (line for line in done.stdout.splitlines() if line.startswith(("good", "poor")))
    assert "1.000 [0.510, 1.000]" in good
    assert "0.500" in poor  # of three wrong solutions one scores higher: rank 2
    both = json.loads(cli("audit", "rm", "recorded", *files, "--benchmark", "rewardmath", "--json").stdout)
    assert [entry["figures"]["accuracy"] for entry in both] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("recorded", "DATA"), "needs a reward model"),
        (("MODEL", "DATA", "--benchmark", "rewardmat"), "unknown benchmark 'rewardmat'"),
        (("MODEL", "DATA", "DATA", "--html", "x.html"), "report of one FILE"),
        (("MODEL", "DATA", "--by", "worker"), "worker"),
        (("nothing", "DATA"), "does not exist"),
    ],
)
def test_wrong_audits_are_one_line(fitted: tuple[Path, Path], arguments: tuple[str, ...], message: str) -> None:
    names = {"MODEL": fitted[0], "DATA": fitted[1]}
    done = cli("audit", "rm", *(names.get(part, part) for part in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_stopped_fit_goes_on_to_the_same_model(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", 1000)
    options = (data, "--held-out", 0, "--epochs", 400, "--set", "fit.patience=null", "--set", "encoder.width=4096")
    options = (*options, "--set", "fit.batch_size=16", "--head", "two-layer", "--set", "head.hidden=32")
    assert cli("fit", *options, "--out", tmp_path / "whole", "--epochs", 6).returncode == 0
    call, environment = command("fit", *options, "--out", tmp_path / "stopped", "--epochs", 6)
    running = subprocess.Popen(call, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "stopped" / "fit.pt").exists():
        assert running.poll() is None
        assert time.monotonic() < deadline
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "The same command goes on" in errors
    assert cli("fit", *options, "--out", tmp_path / "stopped", "--epochs", 6).returncode == 0
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert one == other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--head", "liner"), "unknown head 'liner'"),
        (("--set", "head.bais=1"), "head has no option 'bais'"),
        (("--set", "hed.bias=1"), "unknown part 'hed'"),
        (("--set", "fit.epoch=1"), "unknown option of a fit 'epoch'"),
        (("--column", "choice"), "expected KEY=VALUE"),
        (("--by", "worker"), "worker"),
    ],
)
def test_wrong_options_of_fit_are_one_line(fitted: tuple[Path, Path], tmp_path: Path, arguments, message) -> None:
    _, data = fitted
    done = cli("fit", data, "--out", tmp_path / "m", *arguments)
    assert done.returncode == 2, done.stdout
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_missing_files_are_one_line(fitted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = fitted
    monkeypatch.chdir(tmp_path)
    for arguments in (("fit", tmp_path / "no"), ("score", tmp_path / "no", data), ("score", model, tmp_path / "no")):
        done = cli(*arguments)
        assert done.returncode == 2
        assert "does not exist" in done.stderr
        assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
