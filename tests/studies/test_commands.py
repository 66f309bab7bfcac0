"""`polyreward reproduce`, `polyreward methods` and the README's table, through the real command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def cli(*arguments, program=("-m", "polyreward"), **options):
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "160", **options.pop("environment", {})}
    environment.pop("POLYREWARD_DATA", None)
    command = [sys.executable, *map(str, program), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **options)


def quick(output, *arguments):
    done = cli("reproduce", "stratified-grpo", "--quick", "--output", output, *arguments)
    assert done.returncode == 0, done.stderr
    return done, json.loads((output / "quick" / "02-stratified-grpo.json").read_text())


@pytest.mark.slow
def test_a_quick_run_prints_a_table_and_writes_no_verdict(tmp_path):
    done, record = quick(tmp_path, "--seeds", 1, "--workers", 1)
    assert "1/1" in done.stderr
    assert "not judged" in done.stdout
    assert "stratified-grpo" in done.stdout
    assert (record["verdict"], record["seeds"], record["quick"]) == ("not judged", 1, True)
    assert str(tmp_path) not in json.dumps(record)


@pytest.mark.slow
@pytest.mark.ray
def test_a_local_ray_cluster_gives_the_same_figures(tmp_path):
    pytest.importorskip("ray")
    _, on_ray = quick(tmp_path / "ray", "--ray", "local", "--workers", 2)
    _, here = quick(tmp_path / "here")
    assert on_ray["seeds"] == 2
    assert on_ray["figures"] == here["figures"]


@pytest.mark.slow
def test_a_failing_seed_is_named_and_the_finished_ones_are_kept(tmp_path):
    def run(behaviour):
        environment = {"TOY_FOLDER": str(tmp_path), "TOY_BEHAVIOUR": behaviour}
        toy = (Path(__file__).parent / "toy_study.py",)
        arguments = ("reproduce", "dump", "--output", tmp_path, "--workers", 1)
        return cli(*arguments, program=toy, environment=environment)

    done = run("fail")
    assert done.returncode == 2
    assert "study 25-dump, seed 2 failed" in done.stderr
    assert "the toy is broken" in done.stderr
    again = run("")
    assert again.returncode == 0, again.stderr
    calls = (tmp_path / "calls").read_text().split()
    assert [calls.count(seed) for seed in "012"] == [1, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("stratifed-grpo",), "did you mean 'stratified-grpo'?"),
        (("dump", "--device", "gpu9"), "'gpu9' is not a device"),
        (("dump", "--seeds", "0"), "--seeds"),
        (("dump", "--quick", "--ray", "127.0.0.1:1"), "cannot connect to a Ray cluster at '127.0.0.1:1'"),
        (("dump", "--data", "/no/such/folder"), "/no/such/folder"),
        (("dump", "--output", __file__, "--quick"), "cannot write"),
    ],
)
def test_bad_input_is_exit_code_2(tmp_path, arguments, message):
    done = cli("reproduce", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_methods_shows_the_verdicts_of_a_folder(tmp_path):
    (tmp_path / "25-dump.json").write_text(json.dumps({"verdict": "inconclusive"}))
    rows = {row["name"]: row["verdict"] for row in json.loads(cli("methods", "--json", "--results", tmp_path).stdout)}
    assert rows["dump"] == "inconclusive"
    assert rows["toolrl"] is None
    assert "inconclusive" in cli("methods", "curriculum", "--results", tmp_path).stdout


def test_methods_without_a_match_says_so():
    done = cli("methods", "teapot")
    assert (done.returncode, done.stdout) == (0, "")
    assert "no method matches 'teapot'" in done.stderr
    assert json.loads(cli("methods", "teapot", "--json").stdout) == []


def test_methods_names_a_damaged_result(tmp_path):
    (tmp_path / "25-dump.json").write_text("{")
    done = cli("methods", "--results", tmp_path)
    assert done.returncode == 2
    assert "25-dump.json is not the result of a study" in done.stderr


class TestReadme:
    @pytest.fixture
    def script(self, tmp_path):
        """The script in a project of its own: two results, and a README with markers."""
        (tmp_path / "scripts").mkdir()
        source = (ROOT / "scripts" / "update_readme.py").read_text(encoding="utf-8")
        (tmp_path / "scripts" / "update_readme.py").write_text(source, encoding="utf-8")
        (tmp_path / "results").mkdir()
        for slug, verdict in (("25-dump", "inconclusive"), ("53-toolrl", "supported")):
            record = {"verdict": verdict, "effect": 7.58697, "interval": [5.2447, 10.288], "effect_of": "ratio a | b"}
            (tmp_path / "results" / f"{slug}.json").write_text(json.dumps(record))
        (tmp_path / "README.md").write_text("above\n<!-- results:begin -->\nold\n<!-- results:end -->\nbelow\n")
        return tmp_path / "scripts" / "update_readme.py"

    def test_the_table_is_written_between_the_markers(self, script):
        readme = script.parents[1] / "README.md"
        stale = cli("--check", program=(script,))
        assert stale.returncode == 1
        assert "out of date" in stale.stderr
        assert "old" in readme.read_text()
        assert cli(program=(script,)).returncode == 0
        lines = readme.read_text().splitlines()
        assert (lines[0], lines[-1]) == ("above", "below")
        assert "old" not in lines
        row = next(line for line in lines if "`toolrl`" in line)
        assert "(https://arxiv.org/abs/2504.13958)" in row
        assert row.endswith("| reward | supported | 7.59 [5.24, 10.3] ratio a \\| b |")
        assert next(line for line in lines if "`sweet-spot`" in line).endswith("| reward | - | - |")
        assert cli("--check", program=(script,)).returncode == 0

    def test_a_readme_without_markers_is_an_error(self, script):
        (script.parents[1] / "README.md").write_text("nothing here\n")
        done = cli(program=(script,))
        assert done.returncode == 1
        assert "results:begin" in done.stderr
