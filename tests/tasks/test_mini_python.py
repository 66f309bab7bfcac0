import numpy as np
import pytest

from polyreward.errors import InvalidInputError
from polyreward.rewards.execution_prediction import execute_programs
from polyreward.tasks import mini_python
from polyreward.tasks.code_prediction import Snippet
from polyreward.tasks.mini_python import (
    ARITHMETIC,
    CLASSES,
    ERRORS,
    INTEGERS,
    LOWEST,
    OUTSIDE,
    PROGRAMS,
    MiniPython,
    parse,
    programs_of,
    source,
    tokens_of,
    without_markers,
)


@pytest.fixture(scope="module")
def language():
    return MiniPython(execute_programs)


def test_numbers_tokens_and_texts_are_one_to_one():
    assert (PROGRAMS, ARITHMETIC, CLASSES) == (200_880, 162_000, 30)
    numbers = np.arange(PROGRAMS)
    tokens = tokens_of(numbers)
    assert tokens.shape == (PROGRAMS, 13)
    np.testing.assert_array_equal(programs_of(tokens), numbers)
    for number in range(0, PROGRAMS, 1999):
        assert parse(source(number)) == number
    assert source(0) == "a = 0 + 0\nb = a + 0\nprint(b + 0)\n"
    assert source(PROGRAMS - 1) == "xs = [5, 5, 5]\ni = 5 % 5\nprint(xs[i])\n"


@pytest.mark.parametrize(
    "code",
    [
        "a = 6 + 0\nb = a + 0\nprint(b + 0)\n",
        "a = 10 + 0\nb = a + 0\nprint(b + 0)\n",
        "a = 0 ** 0\nb = a + 0\nprint(b + 0)\n",
        "xs = [5, 5, 5]\ni = 5 % 5\nprint(xs[i])",
        "",
    ],
)
def test_other_programs_are_not_of_the_language(code):
    assert parse(code) is None


def test_classes_equal_what_the_expressions_say(language):
    rng = np.random.default_rng(0)
    numbers = rng.integers(PROGRAMS, size=600)
    for number, found in zip(numbers.tolist(), language.classes(numbers).tolist(), strict=True):
        lines = source(number).split("\n")
        space, expected = {}, None
        for at, line in enumerate(lines[:3], start=1):
            try:
                exec(line.replace("print(", "r = ("), space)  # three lines of arithmetic made above
            except (ZeroDivisionError, IndexError) as error:
                expected = INTEGERS + ERRORS.index((type(error).__name__, at))
                break
        if expected is None:
            expected = space["r"] - LOWEST if LOWEST <= space["r"] <= 20 else OUTSIDE
        assert found == expected


def test_the_driver_says_what_running_alone_says(language):
    numbers = np.random.default_rng(1).integers(PROGRAMS, size=40).tolist()
    alone = execute_programs([Snippet(source(number)) for number in numbers])
    for number, outcome in zip(numbers, alone, strict=True):
        assert language.printed(number) == (outcome.stdout, without_markers(outcome.stderr))


def test_rendering_the_true_class_gives_the_true_output(language):
    numbers = np.random.default_rng(2).integers(PROGRAMS, size=400)
    classes = language.classes(numbers)
    assert set(range(INTEGERS, CLASSES)) <= set(classes.tolist())
    for number, known in zip(numbers.tolist(), classes.tolist(), strict=True):
        if known != OUTSIDE:
            assert language.rendered(number, known) == language.printed(number)


def test_programs_are_run_once():
    calls = []

    def counting(snippets):
        calls.append(len(snippets))
        return execute_programs(snippets)

    language = MiniPython(counting)
    language.classes(np.arange(mini_python.CHUNK + 1))
    language.classes([0, 5])
    language.printed(7)
    assert calls == [2]


def test_a_run_that_fails_is_an_error():
    def short(snippets):
        return execute_programs([Snippet("1 // 0")])

    with pytest.raises(InvalidInputError, match="could not be run"):
        MiniPython(short).classes([0])
