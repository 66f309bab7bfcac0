"""Groups of mutated HumanEval solutions, ranked by pass rate and by VeRPO; the real-test panel of the VeRPO study.

A solution is mutated by one or two changes of operators and constants; ten mutants of a problem are a rollout group.
Every assert of the problem's ``check`` is a test of its own, and all run in the sandbox. Nothing is learned.
"""

from __future__ import annotations

import ast
import copy
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

from polyreward.errors import MissingFileError
from polyreward.rewards.density_calibrated import DensityCalibratedReward
from polyreward.rewards.execution import AssertTest, Limits, Program, Sandbox

GROUP, FEWEST_TESTS, CLOSE = 10, 4, 1e-9
_OPERATORS: dict[type, tuple[type, ...]] = {
    ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Add,), ast.FloorDiv: (ast.Mult,), ast.Div: (ast.FloorDiv,),
    ast.Mod: (ast.FloorDiv,), ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt, ast.GtE), ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE), ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.And: (ast.Or,), ast.Or: (ast.And,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip


def mutants(data: Path, seed: int, problems: int | None = None) -> dict[str, float]:
    """Shares of the groups in which the two rewards disagree, and what the preferred mutants pass.

    Parameters
    ----------
    data : folder with ``code/HumanEval.jsonl.gz``
    problems : int or None
        Only the first so many.

    Returns
    -------
    "problems": groups in which some test is passed by some mutants and not by others. "disagree": share of them in
    which no mutant is first in both rankings. Of those: share in which the first of VeRPO, of the pass rate, passes the
    test that the fewest mutants pass (at least one does); among equally ranked mutants, their mean.
    """
    path = data / "code" / "HumanEval.jsonl.gz"
    if not path.is_file():
        raise MissingFileError(f"no such file: {path}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][:problems]
    rng, programs, sizes = np.random.default_rng([seed, 4]), [], []
    limits = Limits(wall_seconds=1.0)
    for row in rows:
        tests = split_check(row["test"], row["entry_point"])
        changed = mutate(row["prompt"] + row["canonical_solution"], rng, GROUP) if len(tests) >= FEWEST_TESTS else []
        programs += [Program(code, tests, limits) for code in changed]
        sizes.append(len(changed))
    with Sandbox() as sandbox:
        results = sandbox.run(programs)
    at, groups = 0, []
    for size in sizes:
        if size:
            groups.append(np.array([result.passed for result in results[at : at + size]]))
        at += size
    return compare([table for table in groups if (table.any(axis=0) & ~table.all(axis=0)).any()])


def compare(groups: list[np.ndarray]) -> dict[str, float]:
    """The figures of `mutants`, from what the members of each group pass, bool (members, tests)."""
    part, apart = DensityCalibratedReward(), []
    for table in groups:
        first = [values >= values.max() - CLOSE for values in (part.score(table), table.mean(axis=1))]
        if (first[0] & first[1]).any():
            continue
        number = table.sum(axis=0)
        rare = table[:, number == number[number > 0].min()]
        apart.append([rare[members].mean() for members in first])
    shares = np.mean(apart, axis=0) if apart else np.zeros(2)
    return {
        "problems": float(len(groups)),
        "disagree": len(apart) / max(len(groups), 1),
        "VeRPO passes the rarest": float(shares[0]),
        "pass rate passes the rarest": float(shares[1]),
    }


def split_check(test: str, entry_point: str) -> tuple[AssertTest, ...]:
    """One test for each statement of ``check`` that asserts, with what stands before it and asserts nothing."""
    module = ast.parse(test)
    check = next(n for n in module.body if isinstance(n, ast.FunctionDef) and n.name == "check")
    before: list[ast.stmt] = []
    found = []
    for statement in check.body:
        if not any(isinstance(node, ast.Assert) for node in ast.walk(statement)):
            before.append(statement)
            continue
        if isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Constant):
            continue  # "assert True", which every program passes
        single: Any = copy.copy(check)
        single.body = [*before, statement]
        rest = [single if node is check else node for node in module.body]
        code = ast.unparse(ast.fix_missing_locations(ast.Module(rest, [])))
        found.append(AssertTest(code, entry_point=entry_point))
    return tuple(found)


def mutate(code: str, rng: np.random.Generator, count: int) -> list[str]:
    """Different mutants of a program, by one or two changes each; fewer than `count` only where there are no more."""
    original = ast.unparse(ast.parse(code))
    found: dict[str, None] = {}
    for _ in range(8 * count):
        tree = ast.parse(code)
        for _ in range(int(rng.integers(1, 3))):
            sites = [(node, name, place) for node in ast.walk(tree) for name, place in _sites(node)]
            if not sites:
                return []
            _change(*sites[int(rng.integers(len(sites)))], rng)
        mutant = ast.unparse(ast.fix_missing_locations(tree))
        if mutant != original:
            found[mutant] = None
        if len(found) == count:
            break
    return list(found)


def _sites(node: ast.AST) -> list[tuple[str, int]]:
    """Places of a node that can change: its operators, or its whole number or truth value."""
    if isinstance(node, ast.Compare):
        return [("ops", place) for place, op in enumerate(node.ops) if type(op) in _OPERATORS]
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign):
        return [("op", 0)] if type(node.op) in _OPERATORS else []
    return [("value", 0)] if isinstance(node, ast.Constant) and type(node.value) in (int, bool) else []


def _change(node: Any, name: str, place: int, rng: np.random.Generator) -> None:
    if name == "value":
        flipped = not node.value if isinstance(node.value, bool) else node.value + int(rng.choice([-1, 1]))
        node.value = flipped
        return
    others = _OPERATORS[type(node.ops[place] if name == "ops" else node.op)]
    other = others[int(rng.integers(len(others)))]()
    if name == "ops":
        node.ops[place] = other
    else:
        node.op = other
