import ast
import itertools
import random
import tokenize
from collections import Counter
from io import StringIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.data.code_mutation import (
    BINARY,
    CodeMutator,
    compiles,
    mutate_arguments,
    mutate_digits,
    mutate_operators,
    mutate_stdin,
)
from polyreward.errors import InvalidInputError

PROGRAM = """\
# totals
class Calculator:
    def compute(self, x, y):
        x += y  # first
        x -= -y
        return (x + 1) * y ** 2 if x and not y else ~x

def compare(a, b):
    if a > b and a != b and 3 in [1, 22]:
        return a
    elif a == b or (
        a is not b
    ):
        return [10, 20][0] + 0x1F
    return f"{a + 1} é" + "ü" * 2

if __name__ == "__main__":
    total = compare(10, 20) - 5
    print(total)
"""
GUARD = 'if __name__ == "__main__":'


def operators(code):
    """Operators of each class in a program, as multisets."""
    found = {name: Counter() for name in ("binary", "boolean", "unary", "augmented", "comparison", "if")}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.BinOp):
            found["binary"][type(node.op)] += 1
        elif isinstance(node, ast.BoolOp):
            found["boolean"][type(node.op)] += 1
        elif isinstance(node, ast.UnaryOp):
            found["unary"][type(node.op)] += 1
        elif isinstance(node, ast.AugAssign):
            found["augmented"][type(node.op)] += 1
        elif isinstance(node, ast.Compare):
            found["comparison"].update(type(op) for op in node.ops)
        elif isinstance(node, ast.If):
            found["if"][isinstance(node.test, ast.UnaryOp) and isinstance(node.test.op, ast.Not)] += 1
    return found


def changes(before, after):
    return (before - after).total()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 1))
def test_at_most_one_change_of_each_class(seed, prob):
    changed = mutate_operators(PROGRAM, prob, np.random.default_rng(seed))
    assert compiles(changed)
    before, after = operators(PROGRAM), operators(changed)
    negated = changes(before["if"], after["if"])
    for name in ("binary", "boolean", "augmented", "comparison", "if"):
        assert changes(before[name], after[name]) <= 1
        assert changes(before[name], after[name]) == changes(after[name], before[name])
    assert changes(before["unary"], after["unary"]) <= 1
    assert after["unary"].total() == before["unary"].total() + negated
    assert GUARD in changed


def test_probability_one_changes_one_operator_of_each_class():
    for seed in range(20):
        before, after = operators(PROGRAM), operators(mutate_operators(PROGRAM, 1.0, np.random.default_rng(seed)))
        assert [changes(before[name], after[name]) for name in before] == [1, 1, pytest.approx(1, abs=1), 1, 1, 1]


def test_layout_and_comments_survive():
    changed = mutate_operators(PROGRAM, 1.0, np.random.default_rng(0))
    assert "# totals" in changed
    assert "  # first" in changed
    assert len(changed.splitlines()) == len(PROGRAM.splitlines())


def test_an_operator_that_binds_differently_keeps_the_tree():
    seen = set()
    for seed in range(200):
        tree = ast.parse(mutate_operators("y = a * b + c", 0.9, np.random.default_rng(seed))).body[0].value
        seen.add(type(tree.left).__name__)
    assert seen == {"BinOp"}


def test_operators_next_to_names_stay_readable():
    for seed, code in itertools.product(
        range(30), ("y=a<b", "y=-x", "y=not(x)", "if-x:pass", "y=a and-b", "y=(a)in(b)")
    ):
        assert compiles(mutate_operators(code, 1.0, np.random.default_rng(seed)))


def test_every_other_operator_is_drawn():
    seen = {
        type(ast.parse(mutate_operators("a + b", 1.0, np.random.default_rng(s))).body[0].value.op) for s in range(300)
    }
    assert seen == set(BINARY) - {ast.Add}


def test_a_change_is_as_likely_as_the_probability_says():
    rng, tries = np.random.default_rng(0), 4000
    changed = sum(mutate_operators("a + b", 0.1, rng) != "a + b" for _ in range(tries))
    assert changed / tries == pytest.approx(0.1, abs=0.02)
    both = sum(mutate_operators("a + b + c", 0.1, rng) != "a + b + c" for _ in range(tries))
    assert both / tries == pytest.approx(1 - 0.9**2, abs=0.025)


@pytest.mark.parametrize(
    "code",
    [
        GUARD + "\n    pass\n",
        "if '__main__' == __name__ and True:\n    pass\n",
        "if not (__name__ != '__main__'):\n    pass\n",
        'def f():\n    if __name__ == "__main__" or x:\n        pass\n',
    ],
)
def test_the_main_guard_is_left_alone(code):
    for seed in range(50):
        assert mutate_operators(code, 1.0, np.random.default_rng(seed)) == code


def test_the_body_under_a_guard_is_not():
    code = GUARD + "\n    print(1 + 2)\n"
    changed = mutate_operators(code, 1.0, np.random.default_rng(0))
    assert changed != code
    assert changed.startswith(GUARD)


def test_probability_zero_is_the_identity():
    mutator = CodeMutator(0.0, 0)
    assert mutator.mutate(PROGRAM) == PROGRAM
    assert mutator.mutate("") == ""
    assert mutator.mutate_stdin("ab 12\n") == "ab 12\n"
    assert mutator.mutate_arguments([1, 2.5, "a", (None, True)]) == [1, 2.5, "a", (None, True)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_what_comes_back_compiles_and_repeats(seed, prob):
    changed = CodeMutator(prob, seed).mutate(PROGRAM)
    assert changed is None or compiles(changed)
    assert changed == CodeMutator(prob, seed).mutate(PROGRAM)
    assert changed == CodeMutator(prob, np.random.default_rng(seed)).mutate(PROGRAM)


def numbers(code):
    tokens = tokenize.generate_tokens(StringIO(code).readline)
    return [token.string for token in tokens if token.type == tokenize.NUMBER]


def test_digits_change_everywhere_but_beside_brackets():
    code = "x1 = 10 + 205  # 7\ny = [3, 4, 5]\nz = y[2]\nt = 'a 9'\nw = 1_0.5e2\n"
    for seed in range(50):
        changed = mutate_digits(code, 1.0, np.random.default_rng(seed))
        old, new = numbers(code), numbers(changed)
        assert [old[i] for i in (2, 4, 5)] == [new[i] for i in (2, 4, 5)] == ["3", "5", "2"]
        for a, b in [(old[i], new[i]) for i in (0, 1, 3, 6)]:
            assert len(a) == len(b)
            for p, q in zip(a, b, strict=True):
                assert (q in "123456789" and q != p) if p.isdigit() else p == q
        assert "x1" in changed
        assert "# 7" in changed
        assert "'a 9'" in changed


def test_digits_that_no_longer_compile_drop_the_program():
    assert mutate_digits("x = 0b11\n", 1.0, np.random.default_rng(0)) is None
    assert CodeMutator(1.0, 0).mutate("x = 0b11\n") is None
    assert CodeMutator(1.0, 0, digits=False).mutate("x = 0b11\n") == "x = 0b11\n"


def test_digits_change_at_the_given_rate():
    rng, code = np.random.default_rng(0), "x = " + "1" * 1000 + ".0"
    changed = mutate_digits(code, 0.1, rng)
    assert sum(a != b for a, b in zip(code, changed, strict=True)) == pytest.approx(100, abs=30)


def test_a_program_that_does_not_compile_is_dropped():
    assert CodeMutator(0.1, 0).mutate("x = (") is None
    assert CodeMutator(0.1, 0).mutate("x = '\0'") is None
    assert CodeMutator(0.0, 0, operators=False, digits=False).mutate("def f(:") is None


def test_a_very_deep_program_is_left_alone():
    code = "x = " + "+".join(["a"] * 900)
    assert compiles(CodeMutator(1.0, 0, digits=False).mutate(code) or "")


@pytest.mark.parametrize("code", ["x = 1\r\ny = x + 2\r\n", "x = 1\n\f\ny = x + 2\n", "é = 'ü'; y = é + 'x' # ñ"])
def test_line_ends_form_feeds_and_wide_characters(code):
    seen = {mutate_operators(code, 1.0, np.random.default_rng(seed)) for seed in range(40)}
    assert len(seen) == 12
    assert all(len(changed) - len(code) in (0, 1) for changed in seen)
    assert compiles(mutate_digits(code, 1.0, np.random.default_rng(0)))


def test_random_operators_inside_f_strings_compile():
    for seed in range(60):
        assert compiles(mutate_operators('print(f"{a + 1:{w * 2}} {b - 1}")', 0.7, np.random.default_rng(seed)))


@given(st.text(max_size=30), st.integers(0, 100))
def test_stdin_keeps_its_shape(text, seed):
    changed = mutate_stdin(text, 1.0, np.random.default_rng(seed))
    assert len(changed) == len(text)
    for old, new in zip(text, changed, strict=True):
        if old.isdigit():
            assert new in "0123456789"
        elif old.isalnum():
            assert new.isascii()
            assert new.isalpha()
        else:
            assert new == old


def test_stdin_at_the_given_rate():
    changed = mutate_stdin("é" * 2000, 0.1, np.random.default_rng(0))
    assert changed.count("é") == pytest.approx(1800, abs=60)


def test_arguments_are_shifted_scaled_or_negated():
    rng = np.random.default_rng(0)
    whole = [mutate_arguments(100, 1.0, rng) for _ in range(500)]
    assert all(isinstance(value, int) for value in whole)
    assert {-100} | set(range(95, 106)) <= set(whole)
    assert set(whole) <= {-100} | set(range(50, 151))
    real = [mutate_arguments(1.0, 1.0, rng) for _ in range(500)]
    assert all(isinstance(value, float) for value in real)
    assert min(real) >= -4
    assert max(real) <= 6
    assert real.count(-1.0) == pytest.approx(500 / 3, abs=50)


def test_arguments_of_every_shape():
    rng, value = np.random.default_rng(0), {"a": [1, (2.0, "xy")], "b": None, 3: True, "c": {4}}
    changed = mutate_arguments(value, 1.0, rng)
    assert list(changed) == ["a", "b", 3, "c"]
    assert isinstance(changed["a"][1], tuple)
    assert changed["a"][1][1] != "xy"
    assert (changed["b"], changed[3], changed["c"]) == (None, True, {4})
    assert value == {"a": [1, (2.0, "xy")], "b": None, 3: True, "c": {4}}
    assert isinstance(mutate_arguments(10**400, 1.0, np.random.default_rng(3)), int)
    unchanged = sum(mutate_arguments([7] * 10, 0.1, rng).count(7) for _ in range(300))
    assert 2600 < unchanged < 2800


@pytest.mark.parametrize("prob", [-0.1, 1.1, float("nan")])
def test_bad_probability(prob):
    with pytest.raises(InvalidInputError, match=r"prob must be in \[0, 1\]"):
        CodeMutator(prob)


def test_code_must_be_text():
    with pytest.raises(InvalidInputError, match="code is int"):
        CodeMutator().mutate(3)


def test_random_programs_keep_compiling():
    random.seed(0)
    for seed in range(100):
        words = [random.choice(["a", "1", "(b)", "-c", "not d", "f(x)", "g[2]"]) for _ in range(6)]
        joints = [random.choice([" + ", "*", " and ", " or ", "<", " in ", " is not ", "//"]) for _ in range(5)]
        code = "y = " + "".join(itertools.chain(*itertools.zip_longest(words, joints, fillvalue="")))
        if compiles(code):
            changed = CodeMutator(0.6, seed).mutate(code)
            assert changed is None or compiles(changed)
