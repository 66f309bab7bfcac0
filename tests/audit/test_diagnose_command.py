import json
import signal
import subprocess
import sys

import pytest
import torch
import typer
from typer.testing import CliRunner

from polyreward.batch import RewardBatch
from polyreward.commands.diagnose import diagnose
from polyreward.data.rollouts import RolloutLog
from polyreward.tasks.synthetic_logs import clean, planted

app = typer.Typer()
app.command()(diagnose)


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    clean(1).write_parquet(folder / "clean.parquet")
    planted("cross-stratum bias", 1).write_parquet(folder / "strata.parquet")
    return folder


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_exit_codes(logs):
    assert run(logs / "clean.parquet", "--fail-on", "warning").exit_code == 0
    assert run(logs / "strata.parquet").exit_code == 0
    assert run(logs / "strata.parquet", "--fail-on", "warning").exit_code == 1
    assert run(logs / "strata.parquet", "--fail-on", "error").exit_code == 0


def test_summary_names_the_problem_and_the_fix(logs):
    output = run(logs / "strata.parquet").output
    assert "cross-stratum bias" in output
    assert "stratified_grpo(blend=0.8, by='stratum')" in output
    assert "No problem found" in run(logs / "clean.parquet").output


def test_json(logs):
    result = json.loads(run(logs / "strata.parquet", "--json").stdout)
    assert result["schema"] == "polyreward.diagnosis/1"
    assert set(result) == {"schema", "worst", "facts", "findings", "not_checked", "what_if", "tables"}
    finding = result["findings"][0]
    assert set(finding) == {"kind", "severity", "subject", "figure", "interval", "statement", "part", "fix"}
    assert finding["part"] == "stratified-grpo"
    low, high = finding["interval"]
    assert low < finding["figure"] < high


def test_options_reach_the_diagnosis(logs):
    result = run(
        logs / "clean.parquet", "--json", "--weights", "reward_1=0.01", "--reference", "reward_2", "--no-what-if"
    )
    result = json.loads(result.stdout)
    assert result["facts"]["reference"] == "reward_2"
    assert result["facts"]["weights"]["reward_1"] == 0.01
    mapped = run(logs / "strata.parquet", "--json", "--map", "stratum=task", "--no-what-if")
    assert json.loads(mapped.stdout)["worst"] == "info"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.parquet", None, "missing.parquet"),
        ("empty.csv", "", "empty.csv is empty"),
        ("headers.csv", "group,reward/a\n", "no rows"),
        ("text.csv", "group,reward/a\n1,0.5\n1,good\n", "'good' in row 2"),
        ("ragged.csv", "group,reward/a\n1,0.5\n1,0.5,7\n", "ragged.csv"),
        ("infinite.csv", "group,reward/a\n1,0.5\n1,inf\n", "reward 'a' is inf in row 2"),
        ("broken.parquet", "no parquet", "broken.parquet"),
        ("nothing.csv", "group,score\n1,0.5\n", "score"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    result = run(path)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output


def test_bad_options_exit_2(logs):
    for option in (
        ["--fail-on", "sometimes"],
        ["--weights", "reward_1"],
        ["--weights", "reward_1=much"],
        ["--reference", "x"],
    ):
        assert run(logs / "clean.parquet", *option).exit_code == 2


def test_failed_report_leaves_nothing(logs, tmp_path):
    (tmp_path / "file").write_text("")
    assert run(logs / "clean.parquet", "--html", tmp_path / "file" / "report.html").exit_code == 2
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_follow_looks_again_when_the_log_grows_and_ends_on_ctrl_c(tmp_path):
    log = RolloutLog(tmp_path / "rollouts")
    rewards = torch.arange(8.0)
    log.append(RewardBatch(rewards, ("score",), torch.arange(8) // 4), step=0)
    command = [sys.executable, "-m", "polyreward", "diagnose", str(log.folder), "--follow", "--every", "0.1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def read_until(words):
        seen = ""
        while words not in seen:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            seen += line
        return seen

    assert "8 rollouts" in read_until("Ctrl-C ends")
    log.append(RewardBatch(rewards, ("score",), torch.arange(8) // 4), step=1)
    assert "16 rollouts" in read_until("Ctrl-C ends")
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate()
    assert "stopped following" in rest
    assert process.returncode == 0
    assert "Traceback" not in errors
