"""EMA-GRPO: the card's oracles, the update against m1 and m2, the guard, memory, errors that leave it untouched."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.advantages import MovingScale, TaskMoments, compute_advantages, ema_grpo, ema_grpo_released, grpo
from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError, MissingColumnError

NAN = float("nan")


def batch_of(rewards: Any, groups: Any, tasks: Any = None) -> RewardBatch:
    rewards = torch.tensor(rewards, dtype=torch.float64)
    return RewardBatch(rewards, groups=groups, columns={"task": tasks or ["t"] * len(rewards)})


def moments(transform: Any) -> TaskMoments:
    found = transform.parts[-1].moments
    assert isinstance(found, TaskMoments)
    return found


@pytest.mark.parametrize("preset", [ema_grpo, ema_grpo_released])
def test_the_worked_example(preset: Any) -> None:
    transform, groups = preset(), [0, 0, 0, 0, 1, 1, 1, 1]
    first = compute_advantages(transform, batch_of([1.0, 0, 0, 0, 1, 1, 0, 1], groups))
    torch.testing.assert_close(
        first, torch.tensor([1.5, -0.5, -0.5, -0.5, 0.5, 0.5, -1.5, 0.5], dtype=torch.float64), rtol=0, atol=1e-5
    )
    assert moments(transform).mean("t") == 0.5
    assert moments(transform).deviation("t") == 0.5
    second = compute_advantages(transform, batch_of([1.0, 1, 1, 0, 1, 1, 1, 1], groups))
    torch.testing.assert_close(
        second, torch.tensor([0.5, 0.5, 0.5, -1.5, 0, 0, 0, 0], dtype=torch.float64), rtol=0, atol=1e-4
    )
    assert second[4:].tolist() == [0.0] * 4
    assert moments(transform).mean("t") == pytest.approx(0.50375, abs=1e-12)
    assert moments(transform).deviation("t") == pytest.approx(0.499986, abs=5e-7)


def test_the_guard() -> None:
    rewards, groups = [0.0] * 7 + [1.0], [0] * 8
    state = {"tasks": ["t"], "mean": [[0.125]], "variance": [[0.01]], "updates": [[5]]}
    for guard, expected in ((5.0, [-0.378] * 7 + [2.6458]), (None, [-1.25] * 7 + [8.75]), (8.75, [-1.25] * 7 + [8.75])):
        part = MovingScale(decay=1.0, guard=guard)
        part.moments.load_state_dict(state)
        got = part(torch.tensor(rewards, dtype=torch.float64), batch_of(rewards, groups))
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-5)


def test_the_guard_acts_on_whole_groups_only() -> None:
    rewards = [0.0] * 7 + [1.0] + [0.0, 0.1]
    groups = [0] * 8 + [1] * 2
    part = MovingScale(decay=1.0, guard=5.0)
    part.moments.load_state_dict({"tasks": ["t"], "mean": [[0.1]], "variance": [[0.01]], "updates": [[1]]})
    got = part(torch.tensor(rewards, dtype=torch.float64), batch_of(rewards, groups))
    torch.testing.assert_close(got[8:], torch.tensor([-0.5, 0.5], dtype=torch.float64))


Batches = st.lists(
    st.lists(st.tuples(st.integers(0, 3), st.one_of(st.just(NAN), st.floats(-3, 3))), min_size=2, max_size=12),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(Batches, st.sampled_from([0.0, 0.5, 0.99, 1.0]), st.sampled_from([0.0, 1e-3]))
def test_against_the_released_update(batches: Any, decay: float, minimum: float) -> None:
    """m1 and m2 as the released code keeps them, in plain Python; two groups a task."""
    transform = ema_grpo(decay=decay, minimum=minimum, epsilon=1e-6, singleton="zero")
    known: dict[int, tuple[float, float]] = {}
    for data in batches:
        groups = [group for group, _ in data]
        tasks = [group // 2 for group in groups]
        got = compute_advantages(transform, batch_of([r for _, r in data], groups, tasks))
        for task in set(tasks):
            scores = [r for (_, r), t in zip(data, tasks, strict=True) if t == task and not math.isnan(r)]
            if scores:
                mu, nu = math.fsum(scores) / len(scores), math.fsum(r * r for r in scores) / len(scores)
                m1, m2 = known.get(task, (mu, nu))
                keep = decay if task in known else 0.0
                known[task] = (keep * m1 + (1 - keep) * mu, keep * m2 + (1 - keep) * nu)
        for i, (group, r) in enumerate(data):
            peers = [v for g, v in data if g == group and not math.isnan(v)]
            if math.isnan(r) or len(set(peers)) == 1:
                assert got[i] == 0.0
                continue
            m1, m2 = known[group // 2]
            sigma = max(math.sqrt(max(m2 - m1 * m1, 0.0)), minimum)
            if sigma > 1e-5:  # below, m2 - m1^2 has cancelled in the reference
                expected = (r - math.fsum(peers) / len(peers)) / (sigma + 1e-6)
                assert got[i].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_without_decay_and_with_one_group_it_is_grpo() -> None:
    batch = batch_of([0.3, 0.9, 0.4, 0.1], [0] * 4)
    torch.testing.assert_close(
        compute_advantages(ema_grpo(decay=0.0, epsilon=1e-6), batch), compute_advantages(grpo(ddof=0), batch)
    )


def test_decay_of_one_keeps_the_first_scale() -> None:
    transform = ema_grpo(decay=1.0)
    compute_advantages(transform, batch_of([0.0, 1.0], [0, 0]))
    got = compute_advantages(transform, batch_of([0.0, 100.0], [0, 0]))
    assert got.tolist() == [-100.0, 100.0]


@pytest.mark.parametrize(("factor", "shift"), [(10.0, 0.0), (1.0, 7.0), (0.25, -3.0)])
def test_scale_and_shift_of_a_task_change_nothing(factor: float, shift: float) -> None:
    generator = torch.Generator().manual_seed(0)
    plain, moved = ema_grpo(), ema_grpo()
    groups, tasks = [0, 0, 0, 1, 1, 1, 2, 2, 2], ["a"] * 6 + ["b"] * 3
    for _ in range(5):
        rewards = torch.rand(9, generator=generator, dtype=torch.float64)
        other = rewards.clone()
        other[:6] = other[:6] * factor + shift
        first = compute_advantages(plain, batch_of(rewards.tolist(), groups, tasks))
        second = compute_advantages(moved, batch_of(other.tolist(), groups, tasks))
        torch.testing.assert_close(first, second)
        assert first[6:].equal(second[6:])  # tasks do not interact


def test_a_stationary_task_converges_to_its_total_deviation() -> None:
    rng = np.random.default_rng(0)
    transform = ema_grpo(decay=0.99)
    pool = []
    for _ in range(600):
        offset = np.repeat(rng.normal(0, 2, 4), 4)  # between prompts
        scores = offset + rng.normal(0, 1, 16)  # and within
        pool.append(scores)
        compute_advantages(transform, batch_of(scores.tolist(), np.repeat(np.arange(4), 4)))
    assert moments(transform).deviation("t") == pytest.approx(np.std(pool), rel=0.1)
    assert moments(transform).deviation("t") == pytest.approx(5**0.5, rel=0.15)


def test_narrow_rewards_around_a_large_mean_do_not_cancel() -> None:
    transform = ema_grpo(decay=0.9)
    for _ in range(30):
        got = compute_advantages(transform, batch_of([1e6 - 1e-4, 1e6 + 1e-4], [0, 0]))
    assert moments(transform).deviation("t") == pytest.approx(1e-4, rel=1e-4)
    torch.testing.assert_close(got, torch.tensor([-1.0, 1.0], dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_a_constant_task_gets_zero_and_a_floor_caps_a_narrow_one() -> None:
    for preset in (ema_grpo, ema_grpo_released):
        assert compute_advantages(preset(), batch_of([0.1] * 3, [0] * 3)).tolist() == [0.0] * 3
    got = compute_advantages(ema_grpo(minimum=1e-3), batch_of([0.0, 2e-6], [0, 0]))
    torch.testing.assert_close(got, torch.tensor([-1e-3, 1e-3], dtype=torch.float64))


def test_moment_of_groups_averages_their_deviations_in_full_precision() -> None:
    transform = ema_grpo(moment="group", decay=0.9)
    rewards, groups = [0.0, 0.2, 1.0, 2.0, 5.0], [0, 0, 1, 1, 2]
    with pytest.raises(InvalidInputError, match="group 2 has one row"):
        compute_advantages(transform, batch_of(rewards, groups))
    got = compute_advantages(transform, batch_of(rewards[:4], groups[:4]))
    assert moments(transform).mean("t") == pytest.approx((0.1 + 0.5) / 2, abs=1e-15)
    torch.testing.assert_close(got, torch.tensor([-0.1, 0.1, -0.5, 0.5], dtype=torch.float64) / 0.3, rtol=1e-14, atol=0)
    compute_advantages(transform, batch_of([0.0, 2.0], [0, 0]))
    assert moments(transform).mean("t") == pytest.approx(0.9 * 0.3 + 0.1 * 1.0, abs=1e-15)


@pytest.mark.parametrize("moment", ["task", "group"])
def test_rewards_that_apply_to_some_tasks_only(moment: Any) -> None:
    """A task without a reward still has the scale of its other one, and the state of the missing one stays."""
    part = MovingScale(moment=moment, decay=0.5)
    rewards = torch.tensor([[0.0, NAN], [4.0, NAN], [0.0, 0.0], [2.0, 6.0]], dtype=torch.float64)
    batch = RewardBatch(rewards, groups=[0, 0, 1, 1], columns={"task": list("xxyy")})
    expected = torch.tensor([[-1.0, 0], [1.0, 0], [-1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(part(batch.rewards, batch), expected)
    later = RewardBatch(torch.tensor([[0.0, 2.0], [4.0, 4.0]]).double(), groups=[0, 0], columns={"task": list("xx")})
    torch.testing.assert_close(part(later.rewards, later)[:, 1], torch.tensor([-1.0, 1.0], dtype=torch.float64))
    assert part.state_dict()["updates"] == [[2, 1], [1, 1]]


@pytest.mark.parametrize("moment", ["task", "group"])
def test_a_batch_without_any_reward(moment: Any) -> None:
    transform = ema_grpo(moment=moment)
    assert compute_advantages(transform, batch_of([NAN, NAN], [0, 0])).tolist() == [0.0, 0.0]
    assert transform.state_dict() == {}
    assert compute_advantages(transform, batch_of([], [])).tolist() == []
    assert transform.state_dict() == {}


@pytest.mark.parametrize("tasks", [["x", "x", "y", "y"], [3, 3, -1, -1], [("x", 1), ("x", 1), ("y", 2), ("y", 2)]])
def test_memory_survives_json(tasks: list[Any]) -> None:
    groups = [0, 0, 1, 1]
    first, second = ema_grpo_released(), ema_grpo_released()
    first_batch = batch_of([0.1, 0.7, 0.2, 1 / 3], groups, tasks)
    compute_advantages(first, first_batch)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    next_batch = batch_of([0.4, 0.5, 0.9, 0.2], groups, tasks)
    assert compute_advantages(first, next_batch).equal(compute_advantages(second, next_batch))
    assert first.state_dict() == second.state_dict()
    assert set(moments(second).tasks) == {tasks[0], tasks[2]}


def refused(data: RewardBatch, message: str, error: type[Exception] = InvalidInputError) -> None:
    transform = ema_grpo()
    compute_advantages(transform, batch_of([0.0, 1.0], [0, 0]))
    before = transform.state_dict()
    with pytest.raises(error, match=message):
        compute_advantages(transform, data)
    assert transform.state_dict() == before


def test_bad_batches_leave_the_memory_untouched() -> None:
    refused(batch_of([0.0, 1.0, 2.0], [0, 0, 1]), r"group 1 has one row; a moving scale needs at least 2")
    refused(
        batch_of([0.0, 1.0], ["p", "p"], ["x", "y"]),
        r"group 'p' \(row \d\) spans two values of 'task': '[xy]' and '[xy]'",
    )
    refused(RewardBatch([0.0, 1.0]), "the batch has no column 'task'", MissingColumnError)
    part = MovingScale()
    part(torch.ones(2), batch_of([0.0, 1.0], [0, 0]))
    before = part.state_dict()
    with pytest.raises(InvalidInputError, match="the signal is inf in row 1"):
        part(torch.tensor([0.0, float("inf")]), batch_of([0.0, 1.0], [0, 0]))
    with pytest.raises(InvalidInputError, match="moving scale of 1 rewards was given 2"):
        part(torch.ones(2, 2), RewardBatch(torch.ones(2, 2), columns={"task": ["new", "new"]}))
    assert part.state_dict() == before


def test_groups_of_one_may_pass() -> None:
    transform = ema_grpo(singleton="zero")
    got = compute_advantages(transform, batch_of([0.0, 1.0, 5.0], [0, 0, 1]))
    assert got[2] == 0.0
    assert moments(transform).mean("t") == 2.0  # its reward counts for the task


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.5}, r"decay must be in \[0, 1\], got 1\.5"),
        ({"decay": NAN}, r"decay must be in \[0, 1\], got nan"),
        ({"minimum": -1.0}, "need minimum >= 0 and epsilon >= 0, got -1.0 and 0.0"),
        ({"epsilon": float("inf")}, "need minimum >= 0 and epsilon >= 0, got 0.0 and inf"),
        ({"guard": 0.0}, "guard must be positive or None, got 0.0"),
        ({"moment": "batch"}, "moment must be 'task' or 'group', got 'batch'"),
        ({"singleton": "raw"}, "singleton must be 'error' or 'zero', got 'raw'"),
        ({"by": 1}, "by must be the name of a column or several names, got 1"),
    ],
)
def test_arguments_out_of_range(arguments: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        MovingScale(**arguments)


# the moments by themselves


def test_task_moments() -> None:
    tracker = TaskMoments(decay=0.5)
    mean, variance = tracker.update(["a", ("b", 1)], torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0], [0.0]]))
    assert (mean.tolist(), variance.tolist()) == ([[1.0], [2.0]], [[4.0], [0.0]])
    tracker.update(["a"], torch.tensor([[3.0]]), torch.tensor([[0.0]]))
    assert tracker.mean("a") == 2.0
    assert tracker.deviation("a") == pytest.approx(math.sqrt(0.5 * 4.0 + 0.25 * 4.0))
    assert tracker.tasks == ["a", ("b", 1)]
    wide = TaskMoments()
    wide.update(["a"], torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 9.0]]))
    assert wide.deviation("a") == [2.0, 3.0]
    with pytest.raises(InvalidInputError, match=r"task 'c' has not been seen; seen: \['a'\]"):
        wide.mean("c")
    with pytest.raises(InvalidInputError, match="moments that are not finite"):
        wide.update(["z"], torch.tensor([[NAN, 0.0]]), torch.zeros(1, 2))
    assert wide.tasks == ["a"]
    with pytest.raises(InvalidInputError, match=r"decay must be in \[0, 1\], got 2"):
        TaskMoments(2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": None}, "the state of a moving scale is not a table of numbers"),
        ({"mean": [[1.0], [2.0]]}, "the state of a moving scale has lists of different lengths"),
        ({"tasks": []}, "the state of a moving scale has lists of different lengths"),
        ({"updates": [1]}, "the state of a moving scale has lists of different lengths"),
    ],
)
def test_memory_that_is_refused(change: dict[str, Any], message: str) -> None:
    state: dict[str, Any] = {"tasks": ["a"], "mean": [[1.0]], "variance": [[1.0]], "updates": [[1]]}
    with pytest.raises(InvalidInputError, match=message):
        TaskMoments().load_state_dict({**state, **change})
    for name in state:
        with pytest.raises(InvalidInputError, match=rf"the state of a moving scale lacks \['{name}'\]"):
            TaskMoments().load_state_dict({key: value for key, value in state.items() if key != name})
    empty = TaskMoments()
    empty.load_state_dict(empty.state_dict())
    assert empty.tasks == []
