import ast

import pytest

from polyreward.errors import InvalidInputError
from polyreward.tasks.program_slots import DEGENERATE, FRAGMENTS, NEEDS, OPTIONS, SLOTS, TESTS, program


def test_shape():
    assert (len(SLOTS), OPTIONS, len(TESTS)) == (4, 8, 4)
    assert [test["tier"] for test in TESTS] == list(NEEDS) == ["basic", "medium", "high", "edge"]
    assert all(len(set(fragments)) == OPTIONS for fragments in FRAGMENTS)
    for choice in ((0, 0, 0, 0), (8, 7, 7, 7), (3, 1, 2, 5)):
        ast.parse(program(choice))
    assert DEGENERATE in program((8, 0, 0, 0))
    assert DEGENERATE not in program((0, 0, 0, 0))


@pytest.mark.parametrize("choice", [(0,) * 3, (0,) * 5, (9, 0, 0, 0), (0, 8, 0, 0), (0, 0, 0, -1)])
def test_bad_choices(choice):
    with pytest.raises(InvalidInputError, match="4 fragments"):
        program(choice)
