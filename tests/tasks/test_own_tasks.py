"""The families of our own: seeded, their references right, their noise real, their words known to the tokenizer."""

import json
import random
import re

import pytest

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.rewards import ToolCallReward, ToolFormatReward
from polyreward.tasks.mixture import Family, compact_prompt, rows, solution
from polyreward.tasks.own import OWN_TASKS, own_task

NAMES = sorted(OWN_TASKS)


@pytest.mark.parametrize("name", NAMES)
def test_problems_follow_the_seed_and_solutions_without_noise_are_the_reference(name):
    family = Family(name)
    first, again, other = family.problems(20, 1), family.problems(20, 1), family.problems(20, 2)
    assert first == again != other
    for i, entry in enumerate(first):
        text = solution(name, entry, random.Random(i), 0.0)
        assert entry["answer"] in text
        assert compact_prompt(name, entry) == f"{name} {own_task(name).prompt(entry)}:"
        assert json.loads(json.dumps(entry["metadata"])) is not None


@pytest.mark.parametrize("name", NAMES)
def test_noise_breaks_solutions_but_not_all(name):
    entries, rng = Family(name).problems(300, 0), random.Random(0)
    whole = [solution(name, entry, random.Random(0), 0.0) for entry in entries]
    noisy = [solution(name, entry, rng, 0.5) for entry in entries]
    right = sum(a == b for a, b in zip(whole, noisy, strict=True))
    assert 90 < right < 230


@pytest.mark.parametrize("name", NAMES)
def test_rows_have_equal_columns_also_beside_other_families(name):
    table = rows([Family(name), Family("chain_sum")], 5, 0)
    assert len(table) == 10
    assert all(set(row) == set(table[0]) for row in table)
    questions = rows([Family(name)], 5, 0, style="question")
    assert all(row["prompt"].endswith("\n") and len(row["prompt"]) > 40 for row in questions)


@pytest.mark.parametrize("name", NAMES)
def test_the_small_tokenizer_writes_a_solution_in_few_tokens_and_reads_it_back(name):
    from polyreward.training.policy import make_tokenizer

    tokenizer = make_tokenizer([name])
    for i, entry in enumerate(Family(name).problems(30, 0)):
        text = solution(name, entry, random.Random(i), 0.3)
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert len(ids) <= 60


def test_an_option_that_a_family_does_not_take_or_refuses():
    with pytest.raises(InvalidInputError, match="'write_function' takes no option 'test'; did you mean 'tests'"):
        Family("write_function", options={"test": 3}).problems(1, 0)
    with pytest.raises(InvalidInputError, match=r"'call_tools' with options .*: expected calls from 1 to 4"):
        Family("call_tools", options={"calls": 9}).problems(1, 0)
    with pytest.raises(InvalidInputError, match=r"'describe_counts' .*: expected things from 2 to 6"):
        Family("describe_counts", options={"things": 1}).problems(1, 0)
    with pytest.raises(UnknownNameError, match="did you mean 'write_function'"):
        Family("write_functions")


@pytest.mark.parametrize("exceptions", [0, 1, 2])
def test_function_tests_follow_from_the_specification(exceptions):
    for entry in Family("write_function", options={"exceptions": exceptions, "tests": 3}).problems(50, 0):
        details, cases = entry["metadata"], json.loads(entry["columns"]["tests"])
        assert len(cases) == 3 + exceptions == 3 + len(details["constants"])
        for case in cases:
            a, b, value = map(int, re.fullmatch(r"assert f\((-?\d+), (-?\d+)\) == (-?\d+)", case).groups())
            if a < 0:
                assert value == details["constants"]["negative"]
            elif a == b:
                assert value == details["constants"]["equal"]
            else:
                sign = details["expression"][1]
                first = a + b if sign == "+" else a - b if sign == "-" else a * b
                assert value == first + int(details["expression"][3:])


def test_the_reference_of_a_request_earns_the_maximum():
    calls, well_formed = ToolCallReward(), ToolFormatReward()
    for entry in Family("call_tools", options={"calls": 3}).problems(50, 0):
        assert calls(None, [entry["answer"]], answer=[entry["answer"]]) == [3.0]
        assert well_formed(None, [entry["answer"]], answer=[entry["answer"]]) == [1.0]
