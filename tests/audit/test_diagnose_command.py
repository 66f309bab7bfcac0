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


RECIPE = """
[tasks]
families = [{ name = "chain_sum" }]
[[rewards]]
name = "reward_2"
weight = 0.5
use = "task_score"
[[rewards]]
name = "verifier"
use = "task_score"
[[rewards]]
name = "reward_1"
use = "task_score"
[advantage]
preset = "stratified-grpo"
options = { by = "stratum" }
[evaluation]
score = "reward_2"
"""


def test_a_run_brings_its_weights_its_trusted_reward_and_its_advantage(tmp_path):
    RolloutLog(tmp_path / "rollouts").append(planted("cross-stratum bias", 1), step=1)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    for log in (tmp_path, tmp_path / "rollouts"):
        found = json.loads(run(log, "--json").stdout)
        assert found["facts"]["weights"] == {"verifier": 1.0, "reward_1": 1.0, "reward_2": 0.5}
        assert found["facts"]["reference"] == "reward_2"
        assert found["what_if"]["cosine"] == pytest.approx(1, abs=1e-6), "the run trains with what is suggested"
    given = json.loads(run(tmp_path, "--json", "--weights", "verifier=3", "--reference", "verifier").stdout)
    assert given["facts"]["weights"] == {"verifier": 3.0, "reward_1": 1.0, "reward_2": 0.5}
    assert given["facts"]["reference"] == "verifier"


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
        ("ones.csv", "group,reward/a\n1,0.5\n2,1\n", "each of the 2 groups has one row"),
        ("twice.csv", "group,reward/a,reward/a\n1,0.5,1\n", "has the column 'reward/a' 2 times"),
        ("half.jsonl", '{"group": 1, "reward/a": 1}\n{"group": 1, "rew', "half.jsonl, line 2"),
        ("gap.csv", "group,reward/a,step\n1,0.5,1\n1,1,\n", "column 'step' has no value in row 2"),
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


def test_the_options_of_the_command(logs, tmp_path):
    table = tmp_path / "table.csv"
    rows = ["prompt,kind,acc,extra,arm"]
    rows += [f"p{i // 4},{'ab'[i // 40 % 2]},{(i * 7 % 5) / 5},{i % 3},{i % 2}" for i in range(400)]
    table.write_text("\n".join(rows) + "\n")
    given = ("--map", "rewards=acc,extra", "--map", "group=prompt", "--task", "kind", "--stratum", "arm", "--json")
    facts = json.loads(run(table, *given).stdout)["facts"]
    assert facts["rewards"] == ["acc", "extra"]
    assert (facts["rollouts"], facts["groups"], sorted(facts["tasks"])) == (400, 100, ["a", "b"])
    assert facts["reference"] == "acc"
    mapped = run(table, "--map", "rewards=acc", "--map", "group=prompt,kind", "--map", "task=kind,arm", "--json")
    assert len(json.loads(mapped.stdout)["facts"]["tasks"]) == 4
    report = tmp_path / "report.html"
    result = run(table, *given[:-1], "--html", report)
    assert f"Report: {report}" in result.output.replace("\n", "")
    assert "<html" in report.read_text()


def test_a_trusted_column_is_found_by_its_name(tmp_path):
    batch = clean(1)
    held_out = RewardBatch(
        batch.rewards[:, 1:], batch.names[1:], batch.groups, {**batch.columns, "held_out_score": batch.rewards[:, 0]}
    )
    held_out.write_parquet(tmp_path / "log.parquet")
    assert json.loads(run(tmp_path / "log.parquet", "--json").stdout)["facts"]["reference"] == "held_out_score"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--task", "tsk"], "no column 'tsk'"),
        (["--stratum", "arm"], "no column 'arm'"),
        (["--map", "rewards="], "--map 'rewards=': expected NAME=VALUE"),
        (["--map", "task=nothing"], "no column 'nothing' (mapped to 'task')"),
        (["--weights", "reward_1=1,2"], "--weights reward_1=1,2: expected one number"),
        (["--weights", "reward_1=nan"], "the weight of reward 'reward_1' is nan"),
        (["--reference", "nothing"], "the reference 'nothing'"),
    ],
)
def test_options_that_do_not_fit_are_named(logs, options, words):
    result = run(logs / "clean.parquet", *options)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def follow(*arguments):
    command = [sys.executable, "-m", "polyreward", "diagnose", *map(str, arguments), "--follow", "--every", "0.1"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_until(process, words, stream="stdout"):
    seen = ""
    while words not in seen:
        line = getattr(process, stream).readline()
        assert line, (seen, process.stderr.read())
        seen += line
    return seen


def interrupt(process):
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate()
    assert process.returncode == 0
    assert "Traceback" not in errors
    return rest + errors


@pytest.mark.slow
def test_follow_looks_again_when_the_log_grows_and_ends_on_ctrl_c(tmp_path):
    log = RolloutLog(tmp_path / "rollouts")
    batch = RewardBatch(torch.arange(8.0), ("score",), torch.arange(8) // 4)
    process = follow(log.folder, "--html", tmp_path / "report.html")
    assert "no such file or folder" in read_until(process, "waiting for")
    log.append(batch, step=0)
    assert "8 rollouts" in read_until(process, "Ctrl-C ends")
    part = log.append(batch, step=1)
    assert "16 rollouts" in read_until(process, "Ctrl-C ends")
    # a part of which only the first half is there yet
    (tmp_path / "rollouts" / "part-00000002-00.parquet").write_bytes(part.read_bytes()[:200])
    assert "16 rollouts" in read_until(process, "Ctrl-C ends")
    assert "16" in (tmp_path / "report.html").read_text()
    assert "stopped following" in interrupt(process)


@pytest.mark.slow
def test_follow_waits_for_the_end_of_a_line_and_prints_a_line_of_json_a_look(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("")
    process = follow(log, "--json", "--map", "rewards=r", "--map", "group=g")
    read_until(process, "is empty", "stderr")
    with log.open("a") as stream:
        stream.write('{"g": 1, "r": 0}\n{"g": 1, "r": 1}\n{"g": 2, "r"')
        stream.flush()
        assert json.loads(process.stdout.readline())["facts"]["rollouts"] == 2
        stream.write(": 1}\n")
        stream.flush()
        assert json.loads(process.stdout.readline())["facts"]["rollouts"] == 3
    interrupt(process)


@pytest.mark.slow
def test_follow_ends_with_the_finding_to_fail_on_or_with_a_row_that_is_wrong(tmp_path, logs):
    process = follow(logs / "strata.parquet", "--fail-on", "warning")
    output, _ = process.communicate()
    assert process.returncode == 1
    assert "cross-stratum bias" in output
    bad = tmp_path / "bad.csv"
    bad.write_text("group,reward/a\n1,0.5\n1,good\n")
    process = follow(bad)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "'good' in row 2" in errors
