"""What the pages show works: imports resolve, TOML parses, commands and options exist, links lead somewhere."""

import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer.main

from polyreward.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """Contents of the fenced blocks in a language ("" for none)."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [content for found, content in fenced if found == language]


def commands(page: Path) -> list[list[str]]:
    """The polyreward commands in indented and fenced blocks, as words."""
    indented = re.findall(r"^    (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    lines = [line for block in blocks(page, "") for line in block.splitlines()] + indented
    shown = [found for line in lines if (found := re.match(r"(?:accelerate launch -m )?polyreward (\w[^#]*)", line))]
    return [shlex.split(found[1].replace("[", "").replace("]", "")) for found in shown]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_examples_parse_and_their_imports_resolve(page: Path) -> None:
    for block in blocks(page, "python"):
        for statement in ast.parse(block).body:
            if isinstance(statement, ast.Import | ast.ImportFrom) and "polyreward.integrations.verl" not in ast.unparse(
                statement
            ):
                exec(ast.unparse(statement), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_toml_examples_parse(page: Path) -> None:
    for block in blocks(page, "toml"):
        assert tomllib.loads(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_their_options_exist(page: Path) -> None:
    known = typer.main.get_command(app).commands
    for name, *arguments in commands(page):
        assert name in known, f"polyreward {name}"
        command = known[name]
        if hasattr(command, "commands"):
            assert arguments[0] in command.commands, f"polyreward {name} {arguments[0]}"
            command = command.commands[arguments[0]]
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for argument in arguments:
            assert not argument.startswith("--") or argument.split("=")[0] in options, f"polyreward {name} {argument}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks" / "README.md"], ids=lambda page: page.stem)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_pages_show_something() -> None:
    assert len([block for page in PAGES for block in blocks(page, "python")]) > 5
    assert len([command for page in PAGES for command in commands(page)]) > 10
