from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from polyreward.catalogue import METHODS

ROOT = Path(__file__).parents[1]


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "NO_COLOR": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "polyreward", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_help_names_the_commands() -> None:
    done = cli("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("train", "reproduce", "methods"))


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, polyreward.cli; print([m for m in ('torch', 'numpy', 'polars', 'pydantic') if m in sys.modules])"
    )
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_methods_as_json() -> None:
    rows = json.loads(cli("methods", "--json").stdout)
    assert [row["name"] for row in rows] == [method.name for method in METHODS]
    assert [row["name"] for row in json.loads(cli("methods", "curriculum", "--json").stdout)] == ["tarot", "dump"]


def test_an_unknown_method_is_one_line_with_the_nearest_name() -> None:
    done = cli("reproduce", "dmp")
    assert done.returncode == 2
    assert done.stderr.strip() == "error: unknown method 'dmp'; did you mean 'dump'?"


def test_a_wrong_option_is_exit_code_2() -> None:
    assert cli("methods", "--colour").returncode == 2


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_catalogue_resolves(method) -> None:
    assert method.load_part() is not None
    study = method.load_study()
    assert (study.method, study.slug) == (method.name, method.slug)


def test_the_readme_holds_the_table_of_the_results() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "scripts/update_readme.py"))["updated"](readme, ROOT / "results") == readme
