import numpy as np
import pytest

from polyreward.errors import InvalidInputError
from polyreward.studies.stratified_grpo import softmax
from polyreward.tasks.cue_finding import cue_finding, pass_at, role_accuracy


def test_the_start_is_homogeneous_and_poor():
    task = cue_finding(np.random.default_rng(0), 2000)
    chances = softmax(task.start)
    assert task.start.shape == (2000, 3, 30)
    assert (chances == chances[0, 0]).all()
    np.testing.assert_allclose(chances[0, 0] / chances[0, 0, 0], np.arange(1, 31.0) ** -2)
    assert 3 <= task.cues.min() < task.cues.max() == 29
    assert role_accuracy(chances, task.cues).mean() == pytest.approx(0.028, abs=0.002)
    assert pass_at(role_accuracy(chances, task.cues)).mean() < 0.001


def test_planted_cues_are_the_likeliest_word():
    task = cue_finding(np.random.default_rng(0), planted=True)
    assert (task.cues == 0).all()
    assert role_accuracy(softmax(task.start), task.cues).min() > 0.99


def test_the_same_seed_gives_the_same_questions():
    one, other = (cue_finding(np.random.default_rng(3)) for _ in range(2))
    assert (one.cues == other.cues).all()
    one.start[:] = 0  # a copy: the policy may be changed in place
    assert one.start.min() < -1


def test_closed_forms_equal_sampling():
    rng = np.random.default_rng(1)
    chances, cues = softmax(rng.normal(size=(2, 4))), np.array([1, 3])
    words = np.stack([rng.choice(4, (40_000, 5), p=p) for p in chances], 1)
    found = (words == cues[:, None]).any(-1)
    right = role_accuracy(chances, cues)
    assert found.mean(0) == pytest.approx(right, abs=0.01)
    passed = found.all(-1).reshape(-1, 5).any(-1)
    assert passed.mean() == pytest.approx(float(pass_at(right)), abs=0.02)


def test_sizes_that_make_no_sense():
    for options in ({"questions": 0}, {"roles": 0}, {"words": 3}):
        with pytest.raises(InvalidInputError, match="cue_finding needs"):
            cue_finding(np.random.default_rng(0), **options)
