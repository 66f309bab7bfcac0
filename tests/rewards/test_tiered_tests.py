import gzip
import itertools
import json
import math
import os
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyreward.advantages.presets import grpo
from polyreward.advantages.transform import compute_advantages
from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError, MissingColumnError, UnknownNameError
from polyreward.rewards.execution import Sandbox
from polyreward.rewards.tiered_tests import (
    PORTFOLIO,
    TIERS,
    DeadGroupWatch,
    NoSignalWarning,
    TestCase,
    TieredReward,
    TieredSuite,
    TieredTestsReward,
    TierSchedule,
    TierWeights,
    same_output,
    sandbox_runner,
    succeeded,
    tier_name,
)

SUITE = TieredSuite([TestCase(tier, "yes", tier) for tier in TIERS] + [TestCase("none", "yes", None)])
B, M, H, E = TIERS


def passing(*tiers):
    """A runner under which these tiers pass."""
    return lambda code, stdin, timeout: (0, "yes\n" if stdin in tiers else "no\n")


def reward(name, runner, **options):
    return TieredReward(SUITE, *PORTFOLIO[name], runner, **options)


@pytest.mark.parametrize(
    ("name", "progress", "tiers", "value", "active"),
    [
        ("var_asce_normal", 0.9, (B, H), 0.50, {B, M, H, E}),
        ("var_asce_normal", 0.3, (B, H), 0.15, {B, M}),
        ("var_asce_rev", 0.1, (B, H), 0.35, {H}),
        ("uni", 0.5, (B, M, H, E), 0.75, {B, M, H}),
        ("var", 0.7, (B, E), 0.50, {B, M, H, E}),
        ("basic_only", 0.0, (B, M, H, E), 1.0, {B}),
        ("complex_only", 0.9, (B, M, E), 0.0, {H}),
        ("edge_only", 0.5, (E,), 1.0, {E}),
        ("binary", 0.0, (B, M, H), 0.75, {B, M, H, E}),
    ],
)
def test_worked_examples(name, progress, tiers, value, active):
    found = reward(name, passing(*tiers))("```python\n```", progress)
    assert found.reward == pytest.approx(value)
    assert found.active == active
    assert found.per_tier.tolist() == [tier in tiers and tier in active for tier in TIERS]
    assert found.per_tier.dtype == bool


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("var_asce_normal", (0.15, 0.30, 0.65, 1.0)),
        ("var_asce_rev", (0.35, 0.70, 0.85, 1.0)),
        ("uni", (0.25, 0.5, 0.75, 1.0)),
        ("var", (0.35, 0.70, 0.85, 1.0)),
    ],
)
def test_most_in_each_phase(name, most):
    part = reward(name, passing(*TIERS, "none"))
    for progress, value in zip((0.0, 0.2, 0.4, 0.6), most, strict=True):
        for moment in (progress, progress + 0.1999):
            assert part("", moment).reward == pytest.approx(value)
            assert part.attainable(moment) == pytest.approx(value)
    whole = reward(name, passing(*TIERS), normalise=True)
    assert [whole("", f).reward for f in (0.1, 0.3, 0.5, 0.9)] == [1, 1, 1, 1]
    assert whole.attainable(0.1) == 1


def test_limits_belong_to_the_next_phase():
    schedule = PORTFOLIO["uni"][0]
    assert [len(schedule(f)) for f in (0.0, 0.1999, 0.2, 0.4, 0.6, 1.0, 7.5)] == [1, 1, 2, 3, 4, 4, 4]
    assert [schedule.phase(f) for f in (0, 0.2, 0.4, 0.6)] == [0, 1, 2, 3]
    tripled = schedule.scaled(3)
    assert [len(tripled(f)) for f in (0.59, 0.61, 1.21, 1.81)] == [1, 2, 3, 4]


@given(st.floats(0, 3), st.floats(0, 3))
def test_easy_to_hard_only_adds_tiers(f, g):
    for name in ("uni", "var", "var_asce_normal"):
        assert PORTFOLIO[name][0].monotone
        assert PORTFOLIO[name][0](min(f, g)) <= PORTFOLIO[name][0](max(f, g))
    assert PORTFOLIO["var_asce_rev"][0].monotone  # it adds easier ones
    assert not TierSchedule([(0.5, {B, M}), (1.0, {H})]).monotone


def by_hand(tiers, passed, weights, phases, f):
    active = phases[-1][1]
    for until, names in phases:
        if f < until:
            active = names
            break
    return sum(weights.get(t, 0) for t, p in zip(tiers, passed, strict=True) if p and t in active)


@given(
    st.lists(st.tuples(st.sampled_from([*TIERS, "minimal"]), st.booleans()), min_size=1, max_size=9),
    st.lists(st.floats(0, 2), min_size=5, max_size=5),
    st.floats(0, 1.5),
)
def test_equals_plain_python(cases, worth, f):
    weights = dict(zip((*TIERS, "minimal"), worth, strict=True))
    phases = [(0.3, {B, "minimal"}), (0.9, {M, E}), (1.0, set(TIERS))]
    suite = TieredSuite([TestCase(str(number), "yes", tier) for number, (tier, _) in enumerate(cases)])
    part = TieredReward(
        suite,
        TierSchedule(phases),
        TierWeights(weights),
        lambda c, stdin, t: (0, "yes" if cases[int(stdin)][1] else ""),
    )
    found = part("", f)
    assert found.reward == pytest.approx(by_hand(*zip(*cases, strict=True), weights, phases, f))
    for tier, passes in zip(TIERS, found.per_tier, strict=True):
        own = [p for t, p in cases if t == tier]
        assert passes == (bool(own) and all(own) and tier in found.active)


def test_the_suite_is_not_changed_and_only_active_cases_run():
    ran = []

    def runner(code, stdin, timeout):
        ran.append(stdin)
        return "finished", "yes"

    part = reward("uni", runner)
    before = SUITE.cases
    assert part("", 0.0).reward == 0.25
    assert ran == [B]
    assert part("", 0.9).reward == 1.0
    assert part.suite.cases == before


def test_scaling_all_weights_changes_no_standardised_advantage():
    passed = np.array(list(itertools.product([0.0, 1.0], repeat=4)))
    batch = lambda rewards: RewardBatch(rewards[:, None], ("tests",), np.zeros(16, int))  # noqa: E731
    part = grpo(epsilon=0.0)
    base = np.array([PORTFOLIO["var_asce_normal"][1][tier] for tier in TIERS])
    expected = compute_advantages(part, batch(passed @ base))
    assert compute_advantages(part, batch(passed @ (7.3 * base))).numpy() == pytest.approx(expected.numpy())
    first = [
        compute_advantages(part, batch(passed[:, 0] * PORTFOLIO[n][1][B])).numpy()
        for n in ("uni", "var", "var_asce_normal")
    ]
    assert first[0] == pytest.approx(first[1])
    assert first[0] == pytest.approx(first[2])


@pytest.mark.parametrize(
    ("expected", "printed", "lines", "parity", "tokens"),
    [
        ("1\n2\n", "1\n2\n", True, True, True),
        ("1\n2\n", "1\n", False, True, False),  # only the first line is right
        ("1", "1\n2\n", False, True, False),
        ("1\n", "1\n2\n", False, False, False),
        ("1\n2", " 1 \n2  \n\n", True, True, True),
        ("1 2", "1  2", False, False, True),
        ("1\n2", "1 2", False, False, True),
        ("1", "", False, False, False),
        ("1", "01", False, False, False),
    ],
)
def test_comparison(expected, printed, lines, parity, tokens):
    assert same_output(expected, printed) == lines
    assert same_output(expected, printed, strict=False) == parity
    assert same_output(expected, printed, "tokens") == tokens
    assert same_output(expected, printed, "exact") == (expected == printed)
    suite = TieredSuite([TestCase("", expected, B)])
    for strict, outcome in ((True, lines), (False, parity)):
        part = TieredReward(suite, *PORTFOLIO["basic_only"], lambda *a: ("ok", printed), strict=strict)
        assert part("", 0.0).reward == outcome


def test_status():
    assert all(succeeded(status) for status in (0, "finished", "passed", "ok", "success", True, np.int64(0)))
    assert not any(succeeded(status) for status in (1, -9, "timeout", "exit 1", "error", False, None, "memory"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "program", ["", "print()", "1 / 0", "print('yes')\nraise SystemExit(3)", "while True: pass", "yes", "print('yes"]
)
def test_programs_that_fail_everywhere_in_the_sandbox(program):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = reward("binary", None, timeout=0.3)(f"```python\n{program}\n```", 0.0)
    assert found.reward == 0
    assert not found.per_tier.any()


@pytest.mark.slow
def test_the_sandbox_as_runner():
    lines = (
        "import sys",
        "name = sys.stdin.read()",
        "while name == 'high': pass",
        "print('yes' if name != 'edge' else 'no')",
    )
    program = "\n".join(("```python", *lines, "```"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = reward("binary", sandbox_runner, timeout=0.5)(program, 0.0)
        together = reward("binary", None, timeout=0.5)(program, 0.0)
    for found in (alone, together):  # the case that runs for ever fails, and only that one
        assert found.per_tier.tolist() == [True, True, False, False]
        assert found.reward == 0.5
    assert reward("binary", passing(*TIERS))("no program", 0.0).reward == 1.0  # the runner is asked, with ""


def test_tier_names():
    assert [tier_name(label) for label in ("basic", " Edge ", "intermediate", "complex", None, "minimal")] == [
        "basic", "edge", "medium", "high", "minimal", "minimal",
    ]  # fmt: skip
    with pytest.raises(UnknownNameError, match="'hgh'; did you mean 'high'"):
        tier_name("hgh")
    for label in ("expert", 3):
        with pytest.raises(ValueError):
            TestCase("", "", label)


FOUR = {B: 0.25, M: 0.25, H: 0.25, E: 0.25}


@pytest.mark.parametrize(
    "make",
    [
        lambda: TierSchedule([]),
        lambda: TierSchedule([(0.4, {B}), (0.2, {M})]),
        lambda: TierSchedule([(0.2, {B}), (0.2, {M})]),
        lambda: TierSchedule([(0.0, {B}), (0.2, {M})]),
        lambda: TierSchedule([(-1, {B})]),
        lambda: TierSchedule([(math.nan, {B}), (1, {M})]),
        lambda: TierSchedule([(0.2, set()), (1, {M})]),
        lambda: TierSchedule([(0.2, {"expert"})]),
        lambda: TierSchedule([(0.2, "basic")]),
        lambda: TierSchedule([0.2, 0.4]),
        lambda: TierSchedule(5),
        lambda: PORTFOLIO["uni"][0](-0.1),
        lambda: PORTFOLIO["uni"][0](math.nan),
        lambda: PORTFOLIO["uni"][0].scaled(0),
        lambda: TierWeights({B: 1.0}),
        lambda: TierWeights({**FOUR, "expert": 1}),
        lambda: TierWeights({**FOUR, B: -0.1}),
        lambda: TierWeights({**FOUR, B: math.inf}),
        lambda: TierWeights([0.25] * 4),
        lambda: TieredSuite([]),
        lambda: TieredSuite(["x"]),
        lambda: TestCase(1, "", B),
        lambda: reward("uni", None, timeout=0),
        lambda: reward("uni", passing())("", -1.0),
    ],
)
def test_bad_parts(make):
    with pytest.raises(ValueError):
        make()


def test_parts_from_plain_data():
    part = TieredReward(
        [TestCase("", "yes", "complex")], [(0.5, ["basic"]), (None, ["complex"])], {**FOUR, H: 2}, passing("")
    )
    assert part("", 0.1).reward == 0
    assert part("", 0.5).reward == 2
    assert hash(part.weights) == hash(TierWeights({**FOUR, H: 2}))


# In training --------------------------------------------------------------------------------------------------------


@dataclass
class State:
    global_step: int
    max_steps: int = 100
    epoch: float = 0.0


class Counted(Sandbox):
    def __init__(self):
        super().__init__()
        self.calls = []

    def run(self, programs, progress=None):
        self.calls.append(sum(len(program.tests) for program in programs))
        return super().run(programs, progress)


@pytest.fixture(scope="module")
def sandbox():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = Counted()
        yield made
        made.close()


ROWS = [{"input": tier, "output": "yes", "label": tier} for tier in TIERS] + [{"stdin": "x", "stdout": "yes"}]


def says(*tiers):
    return f"```python\nimport sys\nprint('yes' if sys.stdin.read() in {tiers} else 'no')\n```"


def test_training_reward(sandbox):
    part = TieredTestsReward(sandbox=sandbox)
    completions = [says(B, H), says(*TIERS), "nothing"]
    for step, values, tests in ((0, [0.15, 0.15, 0], 1), (30, [0.15, 0.30, 0], 2), (60, [0.50, 1.0, 0], 4)):
        sandbox.calls.clear()
        found = part(["p"] * 3, completions, tests=[ROWS] * 3, trainer_state=State(step))
        assert found == pytest.approx(values)
        assert sandbox.calls == [2 * tests]  # only active tests run, in one call
    rev = TieredTestsReward("var_asce_rev", normalise=True, sandbox=sandbox)
    assert rev(["p"] * 2, completions[:2], tests=[json.dumps(ROWS)] * 2, trainer_state=State(30)) == pytest.approx(
        [0.5, 1]
    )


def test_where_progress_comes_from(sandbox):
    arguments = {"prompts": ["p", "q"], "completions": [says(*TIERS)] * 2, "tests": [ROWS] * 2}
    by_column = TieredTestsReward("uni", total_steps=10, sandbox=sandbox)
    assert by_column(**arguments, step=[1, 5]) == [0.25, 0.75]
    epoch = TieredTestsReward("uni", progress="epoch", sandbox=sandbox)
    assert epoch(**arguments, trainer_state=State(0, epoch=0.25)) == [0.5, 0.5]
    assert epoch(**arguments, epoch=[0.1, 0.9]) == [0.25, 1.0]
    for part in (TieredTestsReward(sandbox=sandbox), epoch):
        with pytest.raises(MissingColumnError, match="neither trainer_state"):
            part(**arguments)
    assert TieredTestsReward("binary", sandbox=sandbox)(**arguments) == [1, 1]
    own = TieredTestsReward(schedule=[(None, ["edge"])], weights={**FOUR, E: 3}, sandbox=sandbox)
    assert own(**arguments) == [3, 3]


def test_none_and_refused_references(sandbox):
    part = TieredTestsReward("binary", sandbox=sandbox)
    assert part(["p"], ["x"], tests=[None]) == [None]
    assert part(["p"], [says(B)], tests=[ROWS[4:]]) == [0]  # no test has a tier, so none is worth anything
    with pytest.raises(InvalidInputError, match="column 'tests', row 0: there is no tier 'expert'"):
        part(["p"], ["x"], tests=[[{"stdout": "1", "tier": "expert"}]])
    with pytest.raises(UnknownNameError, match="'var_asce'"):
        TieredTestsReward("var_asce")
    for options in ({"progress": "time"}, {"total_steps": 0}, {"weights": {B: 1}}, {"schedule": []}):
        with pytest.raises(InvalidInputError):
            TieredTestsReward(**options)


def test_hard_tiers_out_of_reach_warn_after_twenty_steps(sandbox):
    part = TieredTestsReward("var_asce_rev", sandbox=sandbox)
    arguments = {"prompts": ["p"] * 2, "completions": [says(B), says(B, M)], "tests": [ROWS] * 2}
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoSignalWarning)
        for step in range(19):
            part(**arguments, trainer_state=State(step, 1000))
            part(**arguments, trainer_state=State(step, 1000))  # several batches of one step count as one
    with pytest.warns(NoSignalWarning, match=r"100% of the groups of the last 20 steps .*active: high"):
        part(**arguments, trainer_state=State(19, 1000))


def test_solved_and_mixed_groups_do_not_warn(sandbox):
    part = TieredTestsReward("binary", sandbox=sandbox)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoSignalWarning)
        for completions in ([says(*TIERS)] * 2, [says(B), says()]):
            for step in range(25):
                part(["p"] * 2, completions, tests=[ROWS] * 2, trainer_state=State(step))


def test_watch():
    watch = DeadGroupWatch(window=3, share=0.5)
    assert [watch.update(*pair, step) for step, pair in enumerate([(1, 2), (1, 2), (1, 2)])] == [False] * 3  # not above
    with pytest.warns(NoSignalWarning):
        assert watch.update(2, 2, 3)
    assert not watch.update(2, 2, 4)  # it begins anew
    assert not watch.update(0, 0)


def test_pickles(sandbox):
    part = TieredTestsReward("var", limits={"wall_seconds": 1.0}, sandbox=sandbox)
    copy = pickle.loads(pickle.dumps(part))
    assert copy == part
    assert copy.sandbox is None


DATA = Path(os.environ.get("POLYREWARD_DATA", "/nowhere")) / "code" / "tarot_sample.jsonl.gz"


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="needs POLYREWARD_DATA")
def test_released_sample():
    with gzip.open(DATA, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    cases = [
        [TestCase(c["input"], c["output"], c["label"]) for c in row["verification_info"]["test_cases"]] for row in rows
    ]
    assert (len(rows), sum(map(len, cases))) == (14, 70)
    passed = {compare: [] for compare in ("lines", "tokens")}
    for row, own in zip(rows, cases, strict=True):
        for compare, found in passed.items():
            found += list(TieredSuite(own).passed(row["gold_standard_solution"], compare=compare))
    original = np.array([case.tier == "minimal" for own in cases for case in own])
    lines, tokens = (np.array(passed[compare]) for compare in ("lines", "tokens"))
    assert lines[~original].sum() == tokens[~original].sum() == 56
    assert (lines[original].sum(), tokens[original].sum(), original.sum()) == (13, 14, 14)
