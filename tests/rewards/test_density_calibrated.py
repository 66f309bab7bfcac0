import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyreward.advantages.presets import reinforce
from polyreward.advantages.transform import compute_advantages
from polyreward.advantages.turns import FusedAdvantage
from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError
from polyreward.rewards.density_calibrated import DensityCalibratedReward, TestSuiteOutcome, VeRPOReward
from polyreward.rewards.execution import Sandbox
from polyreward.rewards.unit_tests import UnitTestReward


def rows(*texts):
    return np.array([[letter == "1" for letter in text] for text in texts])


ROLLOUTS = rows("111110", "111110", "110001", "111110")
TURNS = rows("100", "111", "110", "100", "100")


def test_worked_example():
    part = DensityCalibratedReward()
    weights, rewards = part.fit(ROLLOUTS), part.score(ROLLOUTS)
    assert weights == pytest.approx([0.06348, 0.06348, 0.07226, 0.07226, 0.07226, 0.60652], abs=1e-5)
    density = np.exp(-2 * ROLLOUTS.mean(0)) / weights
    assert density == pytest.approx([2.13181, 2.13181, 3.08788, 3.08788, 3.08788, 1.00001], abs=1e-5)
    assert rewards == pytest.approx([0.34375, 0.34375, 0.73349, 0.34375], abs=1e-5)
    assert rewards - rewards.mean() == pytest.approx([-0.09744, -0.09744, 0.29231, -0.09744], abs=1e-5)
    assert weights.dtype == rewards.dtype == np.float64


def test_only_the_density_turns_the_sign():
    share = ROLLOUTS.mean(1)
    assert share - share.mean() == pytest.approx([0.0833, 0.0833, -0.25, 0.0833], abs=1e-4)
    rewards = DensityCalibratedReward(density=False).score(ROLLOUTS)
    assert rewards == pytest.approx([0.94006, 0.94006, 0.87720, 0.94006], abs=1e-5)
    assert rewards - rewards.mean() == pytest.approx([0.01571, 0.01571, -0.04714, 0.01571], abs=1e-5)


def test_worked_example_of_several_turns():
    outcome = TestSuiteOutcome(TURNS, np.array([0, 0, 1, 2, 2]), np.array([0, 1, 0, 0, 1]))
    part = DensityCalibratedReward()
    assert part.fit(TURNS) == pytest.approx([0.13534, 0.39577, 0.59042], abs=1e-5)
    rewards = part.score(outcome.passed)
    assert rewards == pytest.approx([0.13534, 1.12152, 0.53110, 0.13534, 0.13534], abs=1e-5)
    assert outcome.lengths.tolist() == [2, 1, 2]
    assert outcome.solved.tolist() == [True, False, False]
    advantages = FusedAdvantage()(rewards, outcome.solved, outcome.lengths, outcome.traj_index)
    assert advantages == pytest.approx([0.26361, 1.24979, -0.15062, -0.54639, -0.54639], abs=1e-5)


def by_hand(passed, alpha, bandwidth, delta, density=True, difficulty=True):
    turns, tests = len(passed), len(passed[0])
    rho = [sum(row[j] for row in passed) / turns for j in range(tests)]
    weights = []
    for j in range(tests):
        crowd = sum(math.exp(-((rho[j] - other) ** 2) / (2 * bandwidth**2)) for other in rho)
        weights.append((math.exp(-alpha * rho[j]) if difficulty else 1) / ((crowd + delta) if density else 1))
    return weights, [sum(w for w, p in zip(weights, row, strict=True) if p) for row in passed]


tables = st.integers(1, 9).flatmap(
    lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=6)
)


@given(tables, st.floats(0, 5), st.floats(0.05, 3), st.booleans(), st.booleans())
def test_equals_plain_python(passed, alpha, bandwidth, density, difficulty):
    part = DensityCalibratedReward(alpha, bandwidth, 1e-6, density, difficulty)
    weights, rewards = by_hand(passed, alpha, bandwidth, 1e-6, density, difficulty)
    assert part.fit(np.array(passed)) == pytest.approx(weights)
    assert part.score(np.array(passed)) == pytest.approx(rewards)
    tensor = part.score(torch.tensor(passed))
    assert isinstance(tensor, torch.Tensor)
    assert tensor.dtype == torch.float64
    assert tensor.numpy() == pytest.approx(rewards)


@given(st.lists(st.tuples(st.integers(0, 3), tables), min_size=1, max_size=4))
def test_many_problems_at_once_equal_one_by_one(problems):
    problems = list(dict(problems).items())
    widest = max(len(table[0]) for _, table in problems)
    lines = [(label, row) for label, table in problems for row in table]
    order = np.random.default_rng(len(lines)).permutation(len(lines))
    lines = [lines[i] for i in order]
    passed = np.array([[float(p) for p in row] + [np.nan] * (widest - len(row)) for _, row in lines])
    present = np.array([[True] * len(row) + [False] * (widest - len(row)) for _, row in lines])
    part = DensityCalibratedReward()
    found = part.score(passed, np.array([label for label, _ in lines]), present)
    for label, _ in problems:
        own = [i for i, (other, _) in enumerate(lines) if other == label]
        assert found[own] == pytest.approx(part.score(np.array([lines[i][1] for i in own])))


@given(tables)
def test_the_mean_reward_is_the_weighted_pass_rate(passed):
    table, part = np.array(passed), DensityCalibratedReward()
    weights = part.fit(table)
    assert part.score(table).mean() == pytest.approx((weights * table.mean(0)).sum())
    assert ((weights > 0) & (weights <= np.exp(-2 * table.mean(0)) / (1 + 1e-6) * (1 + 1e-12))).all()


@given(tables, st.randoms())
def test_permutations(passed, random):
    table, part = np.array(passed), DensityCalibratedReward()
    columns, lines = list(range(table.shape[1])), list(range(table.shape[0]))
    random.shuffle(columns), random.shuffle(lines)
    assert part.fit(table[:, columns]) == pytest.approx(part.fit(table)[columns])
    assert part.score(table[lines]) == pytest.approx(part.score(table)[lines])


@given(tables, st.integers(2, 40))
def test_copies_of_every_test_change_nothing(passed, copies):
    table, part = np.array(passed), DensityCalibratedReward()
    assert part.score(np.tile(table, (1, copies))) == pytest.approx(part.score(table), rel=1e-5, abs=1e-5)


@given(tables)
def test_limits_of_the_bandwidth(passed):
    table = np.array(passed)
    rho, tests = table.mean(0), table.shape[1]
    wide = DensityCalibratedReward(bandwidth=math.inf, delta=0.0)
    assert wide.fit(table) == pytest.approx(np.exp(-2 * rho) / tests)
    flat = DensityCalibratedReward(alpha=0.0, bandwidth=math.inf, delta=0.0)
    assert flat.score(table) == pytest.approx(table.mean(1))
    for narrow in (1e-9, 1e-300, 0.0):
        same = (rho[:, None] == rho).sum(1)
        assert DensityCalibratedReward(bandwidth=narrow, delta=0.0).fit(table) == pytest.approx(np.exp(-2 * rho) / same)
    unit = DensityCalibratedReward(alpha=0.0, bandwidth=0.0, delta=0.0, normalise=True)
    assert unit.fit(table).sum() == pytest.approx(1)


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("tests", [1, 7, 33, 200])
def test_all_pass_or_all_fail_gives_exactly_zero(value, tests):
    table = np.full((9, tests), value)
    rewards = DensityCalibratedReward().score(table)
    assert FusedAdvantage()(rewards, table.all(1), np.ones(9, int), np.arange(9)).tolist() == [0] * 9


def test_a_single_rollout_has_a_reward():
    assert DensityCalibratedReward().score(rows("10")) == pytest.approx([math.exp(-2) / (1 + 1e-6)])


@pytest.mark.parametrize(
    ("passed", "words"),
    [
        (np.zeros((3, 0), bool), "no test"),
        (np.zeros((0, 3), bool), "no turn"),
        (np.zeros(3, bool), "shape"),
        (np.array([[0.0, np.nan]]), "nan at turn 0, test 1"),
        (np.array([[0, 2]]), "2 at turn 0, test 1"),
        ("passed", "table"),
    ],
)
def test_bad_tables(passed, words):
    for call in (DensityCalibratedReward().fit, DensityCalibratedReward().score):
        with pytest.raises(InvalidInputError, match=words):
            call(passed)
    with pytest.raises(ValueError):
        DensityCalibratedReward().fit(passed)


def test_bad_groups_and_masks():
    part, table = DensityCalibratedReward(), rows("10", "01")
    with pytest.raises(InvalidInputError, match="groups has 1"):
        part.fit(table, [0])
    with pytest.raises(InvalidInputError, match="group 'b' has no test"):
        part.fit(table, ["a", "b"], rows("11", "00"))
    with pytest.raises(InvalidInputError, match="present differs"):
        part.fit(table, ["a", "a"], rows("11", "10"))
    with pytest.raises(InvalidInputError, match="present has shape"):
        part.fit(table, ["a", "a"], rows("1", "1"))


@pytest.mark.parametrize(
    "options", [{"alpha": -1}, {"alpha": math.nan}, {"bandwidth": -1}, {"bandwidth": math.nan}, {"delta": -1e-9}]
)
def test_bad_parameters(options):
    with pytest.raises(InvalidInputError):
        DensityCalibratedReward(**options)
    with pytest.raises(InvalidInputError):
        VeRPOReward(**options)


def test_outcome_reads_turns_in_any_order():
    order = [4, 1, 3, 0, 2]
    index, turn = np.array([0, 0, 1, 2, 2]), np.array([5, 9, 0, 0, 1])
    outcome = TestSuiteOutcome(torch.tensor(TURNS[order]), index[order], torch.tensor(turn[order]))
    assert isinstance(outcome.solved, torch.Tensor)
    assert outcome.solved.tolist() == [True, False, False]
    assert outcome.lengths.tolist() == [2, 1, 2]
    early = TestSuiteOutcome(TURNS[[1, 0]], np.array([0, 0]), np.array([0, 1]))
    assert early.solved.tolist() == [False]


@pytest.mark.parametrize(
    ("index", "turn", "words"),
    [
        ([0, 0, 2, 2, 2], [0, 1, 0, 1, 2], "every number from 0"),
        ([0, 0, 1, 2, -1], [0, 1, 0, 0, 1], "every number from 0"),
        ([0, 0, 1, 2, 2], [0, 0, 0, 0, 1], "twice"),
        ([0, 0, 1, 2], [0, 1, 0, 0], "5 integers"),
        ([0.0] * 5, [0, 1, 2, 3, 4], "5 integers"),
    ],
)
def test_bad_outcomes(index, turn, words):
    with pytest.raises(InvalidInputError, match=words):
        TestSuiteOutcome(TURNS, np.array(index), np.array(turn))


# The reward --------------------------------------------------------------------------------------------------------

SUITE = [f"assert f({n}) == {n + 1}" for n in range(5)] + ["assert f('a') == 'aa'"]


def written(body):
    return f"Sure:\n```python\ndef f(x):\n    return {body}\n```"


class Counted(Sandbox):
    """The sandbox, with the sizes of the calls that it got."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def run(self, programs, progress=None):
        self.calls.append(len(programs))
        return super().run(programs, progress)


@pytest.fixture(scope="module")
def sandbox():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without bubblewrap it says what is weaker
        with_calls = Counted()
        yield with_calls
        with_calls.close()


BATCH = [written("x + 1"), written("x + 1"), written("x * 2 if x in ('a', 1) else None"), "no program"]


def test_rewards_of_a_batch(sandbox):
    reward = VeRPOReward(sandbox=sandbox, outcome_weight=0.0)
    sandbox.calls.clear()
    prompts = ["p"] * 4 + ["q"] * 2
    completions = [*BATCH, written("x + 1 if x != 'a' else 'aa'"), written("0")]
    values = reward(prompts, completions, tests=[SUITE] * 6)
    assert sandbox.calls == [4]  # one call for all groups; equal programs run once, what is no program never
    table = rows("111110", "111110", "010001", "000000")
    assert values[:4] == pytest.approx(DensityCalibratedReward().score(table))
    assert values[2] > values[0] > values[3] == 0
    assert values[4:] == pytest.approx(DensityCalibratedReward().score(rows("111111", "000000")))
    both = VeRPOReward(sandbox=sandbox, local_weight=0.5, outcome_weight=2.0)
    assert both(prompts, completions, tests=[SUITE] * 6)[4] == pytest.approx(0.5 * values[4] + 2)
    outcome = UnitTestReward(sandbox=sandbox)(prompts, completions, tests=[SUITE] * 6)
    assert outcome == [0, 0, 0, 0, 1, 0]
    assert sandbox.calls == [4]  # the same programs in the same batch run once for both rewards


def test_one_reward_centred_is_outcome_and_local_advantage(sandbox):
    completions = [*BATCH, written("x + 1 if x != 'a' else 'aa'"), written("x + 1")]
    arguments = {"prompts": ["p"] * 6, "completions": completions, "tests": [SUITE] * 6}
    one = VeRPOReward(sandbox=sandbox, local_weight=0.7)(**arguments)
    outcome = UnitTestReward(sandbox=sandbox)(**arguments)
    local = VeRPOReward(sandbox=sandbox, outcome_weight=0.0)(**arguments)
    fused = FusedAdvantage(beta=0.7, gamma=1.0)(np.array(local), np.array(outcome), np.ones(6, int), np.arange(6))
    batch = RewardBatch(np.array(one)[:, None], ("verpo",), ["p"] * 6)
    assert compute_advantages(reinforce(), batch).numpy() == pytest.approx(fused)


def test_groups_of_one_warn(sandbox):
    with pytest.warns(UserWarning, match="nothing to compare"):
        VeRPOReward(sandbox=sandbox)(["p"], [written("0")], tests=[SUITE])


def test_what_does_not_apply_and_what_is_refused(sandbox):
    reward = VeRPOReward(sandbox=sandbox)
    assert reward(["p", "p"], ["a", "b"], tests=[None, None]) == [None, None]
    with pytest.raises(InvalidInputError, match="row 1: the tests differ from those of row 0"):
        reward(["p", "p"], ["a", "b"], tests=[SUITE, SUITE[:2]])
    with pytest.raises(InvalidInputError, match="'verpo': column 'tests', row 0: there is no test"):
        reward(["p", "p"], ["a", "b"], tests=[[], []])
    for options in (
        {"stopped": "all"},
        {"local_weight": -1},
        {"outcome_weight": math.nan},
        {"repeats": 0},
        {"extract": "x"},
    ):
        with pytest.raises(InvalidInputError):
            VeRPOReward(**options)


def test_a_stopped_program_fails_the_tests_that_are_left(sandbox):
    slow = "```python\ndef f(x):\n    while x == 1:\n        pass\n    return x + 1\n```"
    options = {"sandbox": sandbox, "outcome_weight": 0.0, "density": False, "difficulty": False}
    arguments = {"prompts": ["p"] * 2, "completions": [slow, written("x + 1")], "tests": [SUITE[:4]] * 2}
    assert VeRPOReward(**options, limits={"wall_seconds": 0.5})(**arguments) == [1, 4]
    assert VeRPOReward(**options, limits={"wall_seconds": 0.5}, stopped="test")(**arguments) == [3, 4]


def test_tests_that_disagree_with_themselves_are_left_out():
    class Coin(Sandbox):
        """The second test of every program passes in every other run."""

        def __init__(self):
            self.runs = 0

        def run(self, programs, progress=None):
            from polyreward.rewards.execution import ProgramResult, TestResult

            found = []
            for number, program in enumerate(programs):
                second = number >= len(programs) // 2
                passes = [True, second, "x + 1" in program.code]
                tests = tuple(TestResult("passed" if p else "failed", 0.0, "", None) for p in passes)
                found.append(ProgramResult(tests, 0.0))
            return found

    arguments = {"prompts": ["p"] * 2, "completions": [written("x + 1"), written("x")], "tests": [SUITE[:3]] * 2}
    found = VeRPOReward(sandbox=Coin(), repeats=2)(**arguments)
    expected = DensityCalibratedReward().score(rows("11", "10")) + np.array([1, 0])
    assert found == pytest.approx(expected)
    arguments["tests"] = [SUITE[1:2]] * 2
    single = VeRPOReward(sandbox=Coin(), repeats=2)

    class Only(Coin):
        def run(self, programs, progress=None):
            from polyreward.rewards.execution import ProgramResult

            return [ProgramResult(result.tests[1:2], 0.0) for result in super().run(programs)]

    object.__setattr__(single, "sandbox", Only())
    assert single(**arguments) == [None, None]


def test_pickles_without_its_sandbox(sandbox):
    reward = VeRPOReward(sandbox=sandbox, limits={"wall_seconds": 1.0})
    copy = pickle.loads(pickle.dumps(reward))
    assert copy == reward
    assert copy.sandbox is None
    assert copy.__name__ == "verpo"
