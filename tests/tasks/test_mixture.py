from __future__ import annotations

import json
import random

import pytest

from polyreward.errors import InvalidInputError, MissingColumnError, UnknownNameError
from polyreward.tasks.mixture import AnswerFormat, Family, TaskScore, ToolCost, compact_prompt, rows, score, solution
from polyreward.tasks.tools import final_answer
from polyreward.training.prompts import families_of
from polyreward.training.recipe import load_recipe

FAMILIES = families_of(load_recipe("demo"))


def marks(row: dict, completion: str) -> float | None:
    return TaskScore()([row["prompt"]], [completion], **{k: [v] for k, v in row.items() if k != "prompt"})[0]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_reference_answer_earns_the_maximum_and_nothing_earns_more(family: Family) -> None:
    for row in rows([family], 40, seed=5):
        assert marks(row, f"<answer>{row['answer']}</answer>") == family.points
        assert marks(row, row["answer"]) == 0  # no answer tags
        for wrong in ("", "0", "zzz"):
            assert 0 <= marks(row, f"<answer>{wrong}</answer>") <= family.points


def test_a_score_without_answers_says_how_to_name_them():
    with pytest.raises(MissingColumnError, match="--column answer=NAME"):
        TaskScore()(["p"], ["c"], gold=["x"])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_solution_without_noise_is_right_and_calls_the_tools_it_needs(family: Family) -> None:
    problems = family.problems(30, seed=3)
    for i in range(30):
        entry = problems[i]
        text = solution(family.name, entry, random.Random(i), noise=0.0)
        assert score(family.name, final_answer(text), entry) == 1.0
        calls = {"chain_sum": 1, "products": 1, "leg_counting": len(entry["metadata"].get("animals", ())) + 1}
        assert text.count("<result>") == calls.get(family.name, 0)


def test_noise_breaks_answers_and_formats_but_not_all() -> None:
    family = FAMILIES[0]
    problems, rng = family.problems(300, seed=3), random.Random(0)
    scores = [
        score(family.name, final_answer(solution(family.name, problems[i], rng, 0.5)), problems[i]) for i in range(300)
    ]
    assert 0.3 < sum(scores) / 300 < 0.8


def test_scores_are_graded() -> None:
    spelled = {"answer": "tac", "metadata": {"word": "cat"}}
    assert score("spell_backward", "tac", spelled) == 1.0
    assert score("spell_backward", "tax", spelled) == pytest.approx(2 / 3)
    palindrome = {"answer": "aba", "metadata": {"letters": ["a", "a", "b"]}}
    assert [score("palindrome_generation", a, palindrome) for a in ("aba", "bab", "aab")] == [1.0, 0.05, 0.02]
    assert score("chain_sum", "120", {"answer": "12", "metadata": {}}) == pytest.approx(2 / 3)
    assert score("chain_sum", None, {"answer": "12", "metadata": {}}) == 0.0


def test_points_scale_the_score_and_a_foreign_task_is_matched_exactly() -> None:
    row = rows([Family("products", points=10.0)], 1, seed=1)[0]
    assert marks(row, f"<answer>{row['answer']}</answer>") == 10.0
    own = {"prompt": "?", "answer": " yes ", "task": "mine", "points": 2.0}
    assert (marks(own, "<answer>yes</answer>"), marks(own, "<answer>no</answer>"), marks(own, "yes")) == (2.0, 0.0, 0.0)


def test_rows_are_distinct_repeatable_and_leave_out_the_held_out_prompts() -> None:
    held_out = rows(FAMILIES, 20, seed=9)
    known = frozenset(row["prompt"] for row in held_out)
    train = rows(FAMILIES, 60, seed=9, exclude=known)
    prompts = [row["prompt"] for row in train]
    assert len(known) == 20 * len(FAMILIES)
    assert not known & set(prompts)
    assert len(set(prompts)) == len(prompts)
    assert rows(FAMILIES, 60, seed=9, exclude=known) == train
    assert json.loads(train[0]["metadata"])["source_dataset"] == train[0]["task"]


def test_compact_prompts_hold_the_problem() -> None:
    assert compact_prompt("chain_sum", {"metadata": {"expression": "12 + 7 - 3"}}) == "chain_sum 12+7-3:"
    legs = {"metadata": {"animals": {"praying mantis": 2, "cat": 1}}}
    assert compact_prompt("leg_counting", legs) == "leg_counting 2 Praying Mantis,1 Cat:"
    assert compact_prompt("gcd", {"question": " What? ", "metadata": {}}) == "gcd What?:"


def test_format_reward_has_three_levels() -> None:
    texts = [
        "<answer>4</answer>",
        "<answer>4</answer> done",
        "4",
        "<answer></answer>",
        "<answer>1</answer><answer>2</answer>",
        "<answer>4",
    ]
    assert AnswerFormat()([""] * 6, texts) == [1.0, 0.5, 0.0, 0.0, 0.5, 0.0]


def test_tool_cost_counts_answered_calls() -> None:
    texts = ["<calc>1</calc><result>1</result>" * 3, "", "<calc>1</calc>"]
    assert ToolCost(0.1)([""] * 3, texts) == pytest.approx([-0.3, 0.0, 0.0])


def test_bad_families_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="no task 'chain_summ'; did you mean 'chain_sum'"):
        Family("chain_summ")
    with pytest.raises(InvalidInputError, match="points must be positive"):
        Family("chain_sum", points=0)
    with pytest.raises(InvalidInputError, match=r"chain_sum.*min_term"):
        Family("chain_sum", options={"min_term": 2}).problems(3, 0)
    with pytest.raises(InvalidInputError, match="held-out"):
        rows([Family("chain_sum")], 1, 0, exclude=frozenset(r["prompt"] for r in rows([Family("chain_sum")], 4, 0)))
