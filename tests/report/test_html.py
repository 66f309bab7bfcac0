import io
import re
import shutil
import subprocess

import plotly.graph_objects as go
import pytest
from rich.console import Console

from polyreward.audit.diagnose import diagnose
from polyreward.report.diagnosis import write_diagnosis
from polyreward.report.html import Section, figure, page, show, table, text
from polyreward.report.terminal import show_diagnosis
from polyreward.tasks.synthetic_logs import PROBLEMS, clean, planted

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OUTSIDE = re.compile(r"""<(?:script|link|img|iframe)[^>]+(?:src|href)\s*=""")


def test_everything_is_escaped():
    made = page(
        "<b>",
        [Section("<i>", [text("<u>"), table(["<s>"], [["<em>"]]), figure(go.Figure(go.Bar(x=["</script>"], y=[1])))])],
    )
    for tag in ("<b>", "<i>", "<u>", "<s>", "<em>"):
        assert tag not in made[made.rindex("<body>") :].replace("<\\/script>", "")
    assert 'x":["\\u003c' in made or "<\\/script>" in made


def test_plotly_is_written_once_and_only_when_needed():
    plot = figure(go.Figure(go.Bar(x=[1], y=[1])))
    assert len(page("a", [Section("s", [text("no figure")])])) < 10_000
    one, two = (len(page("a", [Section("s", [plot] * n)])) for n in (1, 2))
    assert one > 1_000_000
    assert two - one < 20_000
    assert not OUTSIDE.search(page("a", [Section("s", [plot])]))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (True, "yes"),
        (12345, "12,345"),
        (0.12345, "0.123"),
        (0.0, "0"),
        (2e-7, "2.0e-07"),
        (54321.9, "54,322"),
        ("a", "a"),
    ],
)
def test_numbers_are_shown_with_three_digits(value, shown):
    assert show(value) == shown


@pytest.mark.parametrize("problem", [*PROBLEMS, None])
def test_report_of_every_problem(problem, tmp_path):
    diagnosis = diagnose(planted(problem, 1) if problem else clean(1))
    made = write_diagnosis(tmp_path / "r.html", diagnosis, "log").read_text()
    assert not OUTSIDE.search(made)
    if problem:
        assert made.count("Plotly.newPlot('") >= 1
        assert diagnosis.problems()[0].part in made
    else:
        assert "None of the checks below found a problem" in made


def test_findings_link_to_their_figures(tmp_path):
    made = write_diagnosis(tmp_path / "r.html", diagnose(planted("conflict", 1)), "log").read_text()
    assert '<a href="#finding-0">' in made
    assert '<section id="finding-0">' in made
    assert "95&nbsp;%" in made


def test_the_style_sheet_holds_no_broken_string():
    style = re.search(r"<style>(.*?)</style>", page("a", []), re.DOTALL)[1]
    assert all(line.count('"') % 2 == 0 for line in style.splitlines())
    assert style.count("{") == style.count("}")


def test_code_in_the_terminal_can_be_copied():
    console = Console(file=io.StringIO(), width=60)
    diagnosis = diagnose(planted("cross-stratum bias", 1), weights={"reward_1": 0.5, "reward_2": 0.25})
    show_diagnosis(diagnosis, "log", console)
    printed = console.file.getvalue()
    for line in (diagnosis.what_if.code + "\n" + diagnosis.what_if.recipe).splitlines():
        assert line in printed.splitlines()
    assert printed.count("advantage = ") == 1


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("problem", ["cross-stratum bias", "drift", "conflict"])
def test_report_draws_in_a_browser_without_errors(problem, tmp_path):
    report = write_diagnosis(tmp_path / "r.html", diagnose(planted(problem, 1)), "log")
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=8000 --dump-dom"
    )
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", report.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=110)
    body = run.stdout[run.stdout.rindex("<main>") :]
    assert body.count("js-plotly-plot") == body.count("Plotly.newPlot('") >= 2
    assert "Uncaught" not in run.stderr
    assert "ERR_" not in run.stderr
