"""What every reward keeps: one value a completion, None where it does not apply, pickles, names, and errors."""

import inspect
import math
import pickle
from dataclasses import dataclass, is_dataclass

import numpy as np
import pytest
import torch

from polyreward.errors import InvalidInputError, MissingColumnError
from polyreward.rewards.composition import affine, clip, gate, named, penalise, tier, weighted_sum
from polyreward.rewards.contract import (
    Reward,
    Sample,
    check_values,
    first_row,
    is_missing,
    name_of,
    text_of,
    values_of,
)
from polyreward.rewards.formats import RegexFormat, TagFormat
from polyreward.rewards.gaussian_boxes import GuiGroundingReward
from polyreward.rewards.groups import GroupReward
from polyreward.rewards.harmo import FormatReward
from polyreward.rewards.length import LengthBudget, ThinkLengthReward, TrapezoidReward
from polyreward.rewards.overlap import (
    OverlapReward,
    PointInBox,
    PointsReward,
    RelativeAccuracyReward,
    TranscriptionReward,
)
from polyreward.rewards.proximity import BoxProximity, GridProximity, SequenceProximity
from polyreward.rewards.ranking import GroupRankReward, grouprank
from polyreward.rewards.roles import RoleAnswersReward, multirole_r1
from polyreward.rewards.score_answers import format_answer
from polyreward.rewards.sweet_spot import SweetSpotReward
from polyreward.rewards.text_diversity import DiversityReward
from polyreward.rewards.tiered_tests import TieredTestsReward
from polyreward.rewards.tool_calls import ToolCallReward, ToolFormatReward, ToolUseCost, toolrl
from polyreward.rewards.unit_tests import UnitTestReward
from polyreward.rewards.verifiers import ExactMatch, FieldsCorrect, LinesCorrect, NumericAnswer, ReasoningGymScore

CALL = '<think>x</think>\n<tool_call>\n{"name": "f", "parameters": {"a": 1}}\n</tool_call>'
GRID = "1 2\n2 1"
PROGRAM = "```python\ndef f(x):\n    return x + 1\n```"
ENTRY = {"question": "3 + 4", "answer": "7", "metadata": {"source_dataset": "chain_sum", "difficulty": {}}}


@dataclass(frozen=True)
class Case:
    """A reward, the reference it reads, an answer that earns the maximum, and a reference it must refuse."""

    reward: Reward
    column: str | None
    reference: object
    best: str
    maximum: float
    bad: tuple = ()
    bounds: tuple[float, float] = (0.0, 1.0)

    def columns(self, rows, **others):
        return ({} if self.column is None else {self.column: [self.reference] * rows}) | others


CASES = [
    Case(ExactMatch(), "answer", "Paris", "Paris", 1.0, ([],)),
    Case(ExactMatch(extract="<answer>", ignore_case=True), "answer", ["x", "Y"], "<answer>y</answer>", 1.0, ([],)),
    Case(NumericAnswer(), "answer", "some work\n#### 1,234", "so it is 1234", 1.0, ("none", "#### x")),
    Case(LinesCorrect(), "answer", "a\nb", "a\nb", 1.0, ("", "  \n")),
    Case(FieldsCorrect(), "answer", {"a": 1}, '{"a": 1}', 1.0, ("[1]", {}, "x")),
    Case(ReasoningGymScore(), "entry", ENTRY, "<answer>7</answer>", 1.0, ({}, "x", {"answer": "7", "metadata": {}})),
    Case(TagFormat(), None, None, "<think>a</think> <answer>b</answer>", 1.0),
    Case(TagFormat(graded=True), None, None, "<think>a</think> <answer>b</answer>", 1.0),
    Case(RegexFormat("a.*b"), None, None, "a\nb", 1.0),
    Case(TrapezoidReward(1, 2, 4, 8), None, None, "one two three", 1.0),
    Case(TrapezoidReward(tasks={"qa": (1, 2, 4, 8)}), "task", "qa", "one two three", 1.0),
    Case(LengthBudget(10, 20), None, None, "short", 0.0, bounds=(-1.0, 0.0)),
    Case(ThinkLengthReward(4), None, None, "<think>a b c d</think>", 1.0),
    Case(ToolCallReward(), "answer", CALL, CALL, 3.0, ("<tool_call></tool_call>", "<tool_call>\n5", 7, [3]), (-3, 3)),
    Case(ToolFormatReward(), "answer", CALL, CALL, 1.0, (7, [3])),
    Case(ToolUseCost(most=10), None, None, "no call", 0.0, bounds=(-1.0, 0.0)),
    Case(toolrl(), "answer", CALL, CALL, 4.0, (7,), (-3, 4)),
    Case(
        BoxProximity(), "box", (0, 0, 2, 2), "click(1, 1)", 1.0, ((0, 0, 0, 2), (1, 2, 3), "box", (0, 0, math.nan, 1))
    ),
    Case(PointInBox(), "box", (0, 0, 2, 2), "click(2, 1)", 1.0, ((0, 0, 0, 2), (1, 2, 3), "box")),
    Case(GridProximity(block=(1, 2)), "answer", GRID, GRID, 1.0, ("1 2\n2", "", "1 2 3")),
    Case(SequenceProximity(), "answer", "up, left", "up left", 1.0, ("",)),
    Case(OverlapReward(), "box", (0, 0, 2, 2), "[0, 0, 2, 2]", 1.0, ((0, 0, 2), (2, 2, 0, 0))),
    Case(OverlapReward("span", "interval"), "span", (1.5, 3), "from 1.5 to 3", 1.0, ((3, 1), "x")),
    Case(RelativeAccuracyReward(), "answer", 10, "10", 1.0, ("ten",)),
    Case(PointsReward(), "points", [(0, 0), (5, 5)], "(5, 5) (0, 0)", 1.0, ([(0, 0, 0)],)),
    Case(TranscriptionReward(), "answer", "a b", "a b", 1.0, ("",)),
    Case(SweetSpotReward(ExactMatch(), LinesCorrect()), "answer", "a\nb", "a\nb", 1.5, ("",), (0, 1.5)),
    Case(weighted_sum(ExactMatch(), LengthBudget(9, 10), weights=(2, 1)), "answer", "x", "x", 2.0, ([],), (-1, 2)),
    Case(gate(ExactMatch(), LinesCorrect()), "answer", "x", "x", 1.0, ("",)),
    Case(tier(LinesCorrect(), [0.5, 1.0]), "answer", "x", "x", 1.0, ("",)),
    Case(penalise(LinesCorrect(), ThinkLengthReward()), "answer", "x", "x", 1.0, ("",), (-1, 1)),
    Case(clip(affine(LinesCorrect(), 2, 1), 0, 2), "answer", "x", "x", 2.0, ("",), (0, 2)),
    Case(named(ExactMatch(), "right"), "answer", "x", "x", 1.0, ([],)),
    Case(
        GroupRankReward(), "gold", [10, 5, 0], format_answer([10, 5, 0]), 1.3,
        ([], "x", [1, -1], [11], [1, "2"], 7), (-0.5, 1.3),
    ),
    Case(
        grouprank(alignment="histogram", ties="expected"), "gold", {"a": 10, "b": 5, "c": 0},
        format_answer([10, 5, 0], "abc"), 1.3, ({},), (-0.5, 1.3),
    ),
    Case(
        GuiGroundingReward(format_weight=1.0), "box", (0, 0, 2, 2), "[0, 0, 2, 2]", 3.0,
        ((0, 0, 0, 2), (2, 2, 0, 0), (1, 2, 3), "box"), (0.0, 3.0),
    ),
    Case(DiversityReward({"lex": 1.0}), None, None, "all words differ", 1.0),
    Case(
        RoleAnswersReward(), "answer", {"nurse": "yes", "pilot": "no"}, "Nurse: yes\nPilot: no", 1.0,
        ("[1]", {}, "x", ["yes"]),
    ),
    Case(RoleAnswersReward(mode="convergent"), "answer", "B", "nurse: B", 1.0, ("", ["B"])),
    Case(multirole_r1(weights={"lex": 1.0}), "answer", {"nurse": "yes"}, "Nurse: yes", 1.0, ({}, "x")),
    Case(UnitTestReward(), "tests", ["assert f(1) == 2"], PROGRAM, 1.0, ([], "assert f(", [3], "")),
    Case(
        TieredTestsReward("binary"), "tests", [{"code": "assert f(1) == 2", "tier": "basic"}], PROGRAM, 0.25,
        ([], [{"code": "assert f(1)", "tier": "x"}]),
    ),
    Case(FormatReward(("think", "answer")), None, None, "<think>a</think> <answer>b</answer>", 0.5),
]  # fmt: skip
# Rewards of whole groups, and those that need a model, a server or the sandbox: tests of their own modules.
ELSEWHERE = {
    "BestOfN", "ConfidentRule", "EmbeddingSurrogateReward", "GroupLengthReward", "HarmoReward", "HybridReward",
    "JudgeReward", "SquashedReward", "VerifierReward", "VeRPOReward", "ReferenceLikelihood",
    "ExecutionPredictionReward", "RubricMatchReward", "JsonFormatReward", "LengthBucketReward",
}  # fmt: skip
every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.reward.__name__)

ODD = [
    "",
    " ",
    "<answer>",
    "</answer><answer>",
    "<think></think>",
    "<tool_call>\n{}\n</tool_call>",
    "<tool_call>" + "[" * 100_000 + "</tool_call>",
    "<answer>" + "9" * 6000 + "</answer>",
    '{"a": ' * 2000,
    "1e999 nan inf -1e999 1/0 #### /",
    "\x00\ud800 ½ ٣ ²",
    "\\boxed{{{",
    None,
    [],
    [{"role": "assistant", "content": None}],
    [{"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": 3}], "tool_calls": [None, {}, 3]}],
    [None, 3],
    {"role": "assistant"},
    7,
]


@every
def test_the_reference_earns_the_maximum(case):
    assert case.reward(["q"] * 2, [case.best, "?"], **case.columns(2))[0] == pytest.approx(case.maximum)


@every
def test_one_finite_value_a_completion_inside_the_range_whatever_the_model_wrote(case):
    values = case.reward(["q"] * len(ODD), ODD, **case.columns(len(ODD)))
    assert len(values) == len(ODD)
    low, high = case.bounds
    assert all(type(v) is float and low - 1e-9 <= v <= high + 1e-9 for v in values)


@every
def test_chat_messages_are_read_like_text(case):
    chat = [[{"role": "assistant", "content": text}] for text in (case.best, "?")]
    parts = [[{"role": "assistant", "content": [{"type": "text", "text": t}]}] for t in (case.best, "?")]
    plain = case.reward(None, [case.best, "?"], **case.columns(2))
    assert case.reward([[{"role": "user", "content": "q"}]] * 2, chat, **case.columns(2)) == plain
    assert case.reward(None, parts, **case.columns(2)) == plain


@every
def test_an_empty_batch_gives_an_empty_list(case):
    assert case.reward([], [], **case.columns(0)) == []
    assert case.reward([], []) == []


@every
def test_missing_reference_does_not_apply(case):
    if case.column is None:
        return
    for missing in (None, math.nan):
        values = case.reward(None, [case.best] * 2, **{case.column: [missing, case.reference]})
        rest = case.reward.__name__ == "2*exact_match + length_budget"  # a sum keeps the member that applies
        assert values[0] == (0.0 if rest else None)
        assert values[1] == pytest.approx(case.maximum)


@every
def test_missing_column_and_wrong_length_are_named(case):
    if case.column is None:
        return
    with pytest.raises(MissingColumnError, match=f"reads the column '{case.column}'"):
        case.reward(None, ["x"], **{case.column[:-1] + "_": ["y"]})
    with pytest.raises(InvalidInputError, match=f"'{case.column}' has 2 entries"):
        case.reward(None, ["x"], **case.columns(2))


@every
def test_bad_reference_is_an_error_with_reward_column_and_row(case):
    for bad in case.bad:
        with pytest.raises(InvalidInputError, match=rf"column '{case.column}', row 1"):
            case.reward(None, [case.best] * 2, **{case.column: [case.reference, bad]})


@every
def test_pickles_and_stays_equal(case):
    copy = pickle.loads(pickle.dumps(case.reward))
    batch = ([None, None], [case.best, "?"])
    assert copy.__name__ == case.reward.__name__ != ""
    assert copy(*batch, **case.columns(2)) == case.reward(*batch, **case.columns(2))
    assert is_dataclass(case.reward)


@every
def test_takes_what_trl_passes_and_does_not_depend_on_the_order_of_rows(case):
    class State:
        global_step = 3

    texts = [case.best, "?", "", case.best]
    extras = {"trainer_state": State(), "log_extra": print, "log_metric": print, "environments": None}
    ids = [[0] * len(text.split()) for text in texts]
    values = case.reward(prompts=texts, completions=texts, completion_ids=ids, **case.columns(4), **extras)
    assert values == case.reward(None, texts, **case.columns(4))
    order = [2, 0, 3, 1]
    shuffled = case.reward(None, [texts[i] for i in order], **case.columns(4))
    assert shuffled == [values[i] for i in order]


@every
def test_columns_may_be_arrays(case):
    if not isinstance(case.reference, str | int | tuple):
        return
    array = np.array([case.reference] * 2)
    assert case.reward(None, [case.best, "?"], **{case.column: array})[0] == pytest.approx(case.maximum)


@every
def test_references_may_be_arrays_as_in_list_columns_of_parquet(case):
    if case.column is None or not isinstance(case.reference, str | list | tuple):
        return
    accepted = [case.reference] if isinstance(case.reference, str) else case.reference
    if isinstance(case.reference, str) and not isinstance(case.reward, ExactMatch | GridProximity | SequenceProximity):
        return
    column = np.empty(2, dtype=object)
    column[:] = [np.array(accepted), np.array(accepted, dtype=object)]
    assert case.reward(None, [case.best] * 2, **{case.column: column}) == pytest.approx([case.maximum] * 2)


def test_arrays_in_what_a_reward_reads_are_lists_at_any_depth_and_others_are_left_alone():
    seen = []

    @dataclass(frozen=True)
    class Probe(Reward):
        @property
        def reads(self):
            return ("rows",)

        def score(self, sample: Sample) -> float:
            seen.append(sample.columns)
            return 0.0

    ragged = np.empty(2, dtype=object)
    ragged[:] = [np.array([1, 2]), {"a": np.array([3])}]
    image = np.zeros((2, 2))
    Probe()(None, ["x"], rows=[ragged], image=[image])
    assert seen[0]["rows"] == [[1, 2], {"a": [3]}]
    assert seen[0]["image"] is image
    calls = np.array([{"name": "f", "parameters": {"a": np.array([1, 2])}}], dtype=object)
    right = CALL.replace('"a": 1', '"a": [1, 2]')
    assert ToolCallReward()(None, [right], answer=[calls]) == [3.0]
    assert GridProximity(block=(1, 2))(None, [GRID], answer=[np.array([[1, 2], [2, 1]])]) == [1.0]


@pytest.mark.parametrize("make", [np.array, torch.tensor, np.float32])
def test_single_numbers_among_the_columns_are_no_columns_and_serve_as_step(make):
    assert ExactMatch()(None, ["a"], answer=["a"], temperature=make(1.0)) == [1.0]
    columns = {"answer": [CALL] * 2, "step": make(75.0)}
    assert ToolFormatReward(limits="dynamic")(None, [CALL, ""], **columns) == [1.5, -1.0]
    with pytest.raises(InvalidInputError, match=r"column 'answer' has .*, expected a list of 1"):
        ExactMatch()(None, ["a"], answer=make(1.0))


OF_RECIPES = {
    "answer_harmo", "codeboost", "judge", "nover", "rlpr", "verifree", "VeRPOReward", "ReferenceLikelihood"
}  # fmt: skip


def test_the_table_of_names_has_every_reward_that_a_recipe_can_make():
    import importlib

    from polyreward.rewards import REWARDS

    made_of_rewards = {"Composed", "SweetSpotReward", "GroupRankReward"}
    listed = {type(case.reward).__name__ for case in CASES} - made_of_rewards | {"toolrl", "multirole_r1", "grouprank"}
    judgements = {"RubricMatchReward", "JsonFormatReward", "LengthBucketReward", "judgement_reward"}
    assert listed | OF_RECIPES | judgements == {path.rpartition(":")[2] for path in REWARDS.values()}
    for name, path in REWARDS.items():
        module, _, attribute = path.partition(":")
        part = getattr(importlib.import_module(module), attribute)
        options = {"pattern": "a", "budget": 1, "limit": 2, "tasks": {"a": (0, 1, 2, 3)}}
        if name == "judge":
            options = {"base_url": "http://localhost:1/v1", "model": "m"}
        reward = part(**{key: value for key, value in options.items() if key in inspect.signature(part).parameters})
        assert callable(reward)
        assert attribute in OF_RECIPES or reward.__name__ == name  # these are named after their kind or their parts


def test_the_package_exports_what_it_says():
    import polyreward.rewards as room

    assert sorted(room.__all__) == sorted(set(room.__all__))
    assert all(hasattr(room, name) for name in room.__all__)
    assert inspect.ismodule(room.sweet_spot)  # no export hides a module


def test_every_public_reward_is_in_the_list_and_names_paper_and_range():
    import importlib
    import pkgutil

    import polyreward.rewards as room

    listed = {type(case.reward) for case in CASES}
    for module in pkgutil.iter_modules(room.__path__):
        if module.name == "executor":  # its reward is another reward, run elsewhere
            continue
        for part in vars(importlib.import_module(f"polyreward.rewards.{module.name}")).values():
            if isinstance(part, type) and issubclass(part, Reward) and part not in (Reward, GroupReward):
                assert part in listed or part.__name__ in ELSEWHERE, part
                assert "ange" in part.__doc__, part
                assert "arXiv" in part.__doc__ or part.__name__ == "Composed", part


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("a", "a"),
        ([{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}, {"content": "c"}], "ac"),
        ([{"role": "user", "content": "a"}], ""),
        ({"role": "assistant", "content": "a"}, "a"),
        ([{"role": "assistant", "content": [{"text": "a"}, {"image": 1}, {"text": "b"}]}], "ab"),
        (None, ""),
    ],
)
def test_text_of(completion, text):
    assert text_of(completion) == text


def test_missing_is_none_or_nan():
    assert [is_missing(v) for v in (None, math.nan, np.float32("nan"), 0, "", "nan")] == [True] * 3 + [False] * 3


def test_a_reward_without_score_says_so():
    @dataclass(frozen=True)
    class HalfDone(Reward):
        pass

    assert HalfDone().__name__ == "half_done"
    with pytest.raises(TypeError, match="HalfDone defines neither"):
        HalfDone()(None, ["x"])


def test_prompts_of_another_number_are_refused():
    with pytest.raises(InvalidInputError, match="1 prompts for 2 completions"):
        ExactMatch()(["q"], ["a", "b"], answer=["a", "b"])


def test_sample_knows_step_and_tokens():
    seen = []

    @dataclass(frozen=True)
    class Probe(Reward):
        def score(self, sample: Sample) -> float:
            seen.append((sample.row, sample.step, sample.tokens, sample.columns.get("task")))
            return math.nan

    class State:
        global_step = 12

    assert Probe()(None, ["a b", "c"], completion_ids=[[1, 2, 3], []], task=["x", None], step=[5, None]) == [None, None]
    Probe()(None, ["a"], step=7, note="not a column")
    Probe()(None, ["a"], trainer_state=State(), step=[5])
    assert seen == [(0, 5.0, 3, "x"), (1, None, 0, None), (0, 7.0, None, None), (0, 12.0, None, None)]


def _returning(result):
    def reward(prompts, completions, **columns):
        return result

    return reward


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "reward 'reward' returned 1 values for 2 completions"),
        (3.0, "returned float, expected a list of 2"),
        (None, "returned NoneType"),
        ([1.0, "1"], "returned '1' for completion 1"),
        ([1.0, math.inf], "returned inf for completion 1; rewards must be finite"),
        ([[1.0, 2.0], 1.0], r"returned \[1.0, 2.0\] for completion 0"),
        (torch.ones(2, 2), r"returned tensor\(\[1., 1.\]\) for completion 0"),
        ([1.0, 10**400], "for completion 1, expected a number"),
        ("ab", "returned str, expected a list"),
        ({1: 0.0, 2: 0.0}, "returned dict, expected a list"),
        ({1.0, 2.0}, "returned set, expected a list"),
        (torch.tensor(1.0), "returned Tensor, expected a list"),
    ],
)
def test_wrong_results_of_a_member_are_named(result, message):
    with pytest.raises(InvalidInputError, match=message):
        values_of(_returning(result), None, ["a", "b"], {})


def test_values_of_reads_numbers_of_any_kind():
    for result in (
        [1, None],
        (True, math.nan),
        iter([1, None]),
        np.array([1.0, np.nan]),
        torch.tensor([1.0, math.nan]),
    ):
        np.testing.assert_array_equal(values_of(_returning(result), None, ["a", "b"], {}), [1.0, np.nan])


def test_errors_count_rows_from_the_first():
    token = first_row.set(10)
    try:
        with pytest.raises(InvalidInputError, match="'r' returned inf for completion 12"):
            check_values([0.0, 0.0, math.inf], 3, "r")
        with pytest.raises(InvalidInputError, match="column 'answer', row 11: an empty list"):
            ExactMatch()(None, ["a", "a"], answer=["a", []])
    finally:
        first_row.reset(token)


def test_asynchronous_members_are_refused():
    async def later(prompts, completions, **columns):
        return [1.0]

    with pytest.raises(InvalidInputError, match="'later' is asynchronous"):
        values_of(later, None, ["a"], {})


def test_name_of():
    assert name_of(ExactMatch()) == "exact_match"
    assert name_of(_returning([])) == "reward"
