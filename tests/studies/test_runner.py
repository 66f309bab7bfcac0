import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import toy_study
from toy_study import STUDY

import polyreward
from polyreward.errors import InvalidInputError, StorageError
from polyreward.studies import runner
from polyreward.studies.base import StudyConfig
from polyreward.studies.runner import StudyError, result_path, run_study

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder for the toy, which writes its calls there; worker processes inherit the variable."""
    monkeypatch.setenv("TOY_FOLDER", str(tmp_path))
    return tmp_path


@pytest.fixture
def inline(monkeypatch):
    """Run the seeds in this process; the tests that are about processes do not ask for it."""

    def outcomes(study, config, seeds, workers):
        for seed in seeds:
            yield runner._work(study.run_seed, seed, config)

    monkeypatch.setattr(runner, "_on_processes", outcomes)


def calls(folder):
    path = folder / "calls"
    return sorted(int(line) for line in path.read_text().split()) if path.exists() else []


def behave(monkeypatch, how):
    monkeypatch.setenv("TOY_BEHAVIOUR", how)


@pytest.mark.slow
def test_a_full_run_in_processes(folder):
    seen = []
    result = run_study(STUDY, workers=2, output=folder, progress=lambda *counts: seen.append(counts))
    assert result.path == folder / "25-dump.json"
    record = json.loads(result.path.read_text())
    assert record == result.record
    assert (record["verdict"], record["effect"], record["checks"]) == ("supported", 2.5, {"more": True})
    assert record["effect_of"] == "score, ours minus theirs"
    assert [run["ours"]["score"] for run in record["figures"]] == [1.0, 2.0, 3.0, 4.0]
    assert record["config"] == {"size": 3, "rates": [1.0, 2.0]}
    assert (record["seeds"], record["device"], record["quick"], record["data"]) == (4, "cpu", False, False)
    assert record["versions"]["polyreward"] == polyreward.__version__
    assert {"python", "torch", "numpy"} <= record["versions"].keys()
    assert record["wall_seconds"] >= 0 <= record["seconds"]
    assert record["date"].count("-") == 2
    for text in ("claim", "task", "baselines", "measure", "rule", "full_scale", "summary", "paper", "arxiv"):
        assert record[text]
    assert seen[0] == (0, 4)
    assert seen[-1] == (4, 4)
    assert calls(folder) == [0, 1, 2, 3]
    assert not (folder / ".partial").exists()


def test_seeds_do_not_depend_on_the_number_of_workers(folder, inline):
    first = run_study(STUDY, workers=1, output=folder / "a").record
    second = run_study(STUDY, workers=4, output=folder / "b").record
    assert first["figures"] == second["figures"]


def test_a_result_holds_no_path_of_the_machine(folder, inline):
    config = StudyConfig(data=folder)
    result = run_study(STUDY, config, output=folder)
    assert result.record["data"] is True
    assert str(folder) not in result.path.read_text()


def test_quick_runs_and_runs_of_few_seeds_leave_the_full_result_alone(folder, inline):
    full = run_study(STUDY, output=folder).path
    before = full.read_text()
    quick = run_study(STUDY, StudyConfig(quick=True), output=folder)
    few = run_study(STUDY, seeds=3, output=folder)
    more = run_study(STUDY, seeds=5, output=folder / "more")
    assert quick.path == folder / "quick" / "25-dump.json" == result_path(STUDY, folder, True, 99)
    assert few.path == folder / "few-seeds" / "25-dump.json"
    assert (quick.record["verdict"], quick.record["seeds"]) == ("not judged", 2)
    assert (few.record["verdict"], few.record["seeds"]) == ("not judged", 3)
    assert more.path == folder / "more" / "25-dump.json"
    assert more.record["verdict"] == "supported"
    assert full.read_text() == before


def test_a_failing_seed_is_named_with_its_traceback_and_the_others_are_kept(folder, inline, monkeypatch):
    behave(monkeypatch, "fail")
    with pytest.raises(StudyError, match=r"study 25-dump, seed 2 failed:(.|\n)*run_seed(.|\n)*the toy is broken"):
        run_study(STUDY, output=folder)
    assert not (folder / "25-dump.json").exists()
    behave(monkeypatch, "")
    run_study(STUDY, output=folder)
    assert calls(folder) == [0, 1, 2, 2, 3]


@pytest.mark.slow
def test_a_process_that_dies_is_named(folder, monkeypatch):
    behave(monkeypatch, "die")
    with pytest.raises(StudyError, match="seed 2 failed:\nits process, or one beside it, died"):
        run_study(STUDY, workers=1, output=folder)
    behave(monkeypatch, "")
    assert run_study(STUDY, workers=1, output=folder).record["verdict"] == "supported"
    assert calls(folder).count(0) == 1


@pytest.mark.slow
def test_a_study_that_cannot_be_sent_to_a_process_is_an_error(folder):
    with pytest.raises(StudyError, match="seed 0 failed"):
        run_study(replace(STUDY, run_seed=_local()), workers=1, output=folder)


def _local():
    def run_seed(seed, config):
        return {}

    return run_seed


def test_a_figure_that_is_not_finite_is_refused_by_name(folder, inline, monkeypatch):
    behave(monkeypatch, "nan")
    with pytest.raises(InvalidInputError, match="study 25-dump, seed 2, arm 'ours': 'score' is nan"):
        run_study(STUDY, output=folder)
    assert not (folder / "25-dump.json").exists()


def test_an_effect_that_is_not_finite_is_refused(folder, inline):
    def judge(runs):
        return replace(toy_study.judge(runs), effect=float("inf"))

    with pytest.raises(InvalidInputError, match="effect or interval is not finite"):
        run_study(replace(STUDY, judge=judge), output=folder)


class TestResume:
    @pytest.fixture
    def stopped(self, folder, inline, monkeypatch):
        behave(monkeypatch, "fail")
        with pytest.raises(StudyError):
            run_study(STUDY, output=folder)
        behave(monkeypatch, "")
        (folder / "calls").unlink()
        return folder / ".partial" / "25-dump.json"

    def test_finished_seeds_are_used_again(self, folder, stopped):
        seen = []
        record = run_study(STUDY, output=folder, progress=lambda *counts: seen.append(counts)).record
        assert calls(folder) == [2, 3]
        assert seen[0] == (2, 4)
        assert [run["ours"]["score"] for run in record["figures"]] == [1.0, 2.0, 3.0, 4.0]

    def test_another_configuration_starts_afresh(self, folder, stopped):
        run_study(replace(STUDY, config={"size": 4}), output=folder)
        assert calls(folder) == [0, 1, 2, 3]

    def test_another_version_of_the_library_starts_afresh(self, folder, stopped, monkeypatch):
        monkeypatch.setattr(runner, "_library", lambda: "a part changed")
        run_study(STUDY, output=folder)
        assert calls(folder) == [0, 1, 2, 3]

    @pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"key": 1}', '{"runs": {}}'])
    def test_a_damaged_file_starts_afresh(self, folder, stopped, content):
        stopped.write_text(content)
        run_study(STUDY, output=folder)
        assert calls(folder) == [0, 1, 2, 3]

    def test_more_seeds_go_on_from_fewer(self, folder, stopped):
        run_study(STUDY, seeds=6, output=folder)
        assert calls(folder) == [2, 3, 4, 5]


def test_an_output_that_cannot_be_written_is_found_out_before_the_first_seed(folder, inline):
    (folder / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="cannot write"):
        run_study(STUDY, output=folder / "file")
    assert calls(folder) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"config": StudyConfig(device="gpu9")}, "'gpu9' is not a device"),
    ],
)
def test_options_that_cannot_be_used(folder, options, message):
    with pytest.raises(InvalidInputError, match=message):
        run_study(STUDY, output=folder, **options)


def test_a_gpu_that_is_not_there(folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InvalidInputError, match="no CUDA device"):
        run_study(STUDY, StudyConfig(device="cuda"), output=folder)


def started(folder):
    """The command line with the toy study, waiting in its third seed; the first two are kept."""
    os.mkfifo(folder / "gate")
    process = subprocess.Popen(
        [sys.executable, str(HERE / "toy_study.py"), "reproduce", "dump", "--workers", "1", "--output", str(folder)],
        env={**os.environ, "TOY_FOLDER": str(folder), "TOY_BEHAVIOUR": "wait", "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("{") and json.loads(line)["kept"] == 2:
            return process
    raise AssertionError(process.stderr.read())


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_goes_on_from_its_finished_seeds(folder, stop):
    process = started(folder)
    process.send_signal(stop)
    _, stderr = process.communicate(timeout=60)
    if stop == signal.SIGINT:
        assert process.returncode == 130
        assert "finished seeds are kept" in stderr
        assert "Traceback" not in stderr
    assert not (folder / "25-dump.json").exists()
    (folder / "gate").unlink()
    run_study(STUDY, workers=1, output=folder)
    assert calls(folder) in ([0, 1, 2, 3], [0, 1, 2, 2, 3])
    assert json.loads((folder / "25-dump.json").read_text())["seeds"] == 4
