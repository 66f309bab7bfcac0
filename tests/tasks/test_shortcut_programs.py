import ast

import pytest

from polyreward.errors import InvalidInputError
from polyreward.tasks.shortcut_programs import EASY, FRAGMENTS, OPTIONS, SLOTS, TESTS, program


def test_shape():
    assert (SLOTS, OPTIONS, EASY, len(TESTS)) == (6, 5, 16, 20)
    assert all(len(set(fragments)) == OPTIONS for fragments in FRAGMENTS)
    assert len({test["name"] for test in TESTS}) == 20
    for slot in range(SLOTS):
        for option in range(OPTIONS):
            choice = [0] * SLOTS
            choice[slot] = option
            ast.parse(program(choice))


@pytest.mark.parametrize("choice", [(0,) * 5, (0,) * 7, (5, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, -1)])
def test_bad_choices(choice):
    with pytest.raises(InvalidInputError, match="6 fragments"):
        program(choice)
