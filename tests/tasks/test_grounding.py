import numpy as np
import pytest

from polyreward.errors import InvalidInputError
from polyreward.tasks.grounding import SCREEN, boxes_of, hit_rate, near_miss


def test_elements_lie_on_the_screen_and_policies_start_beside_them():
    task = near_miss(np.random.default_rng(0), 2000, 2.0)
    size = task.targets[:, 2:] - task.targets[:, :2]
    assert (task.targets >= 0).all()
    assert (task.targets <= SCREEN).all()
    assert 0.02 * SCREEN <= size.min() < 0.021 * SCREEN
    assert 0.24 * SCREEN < size.max() <= 0.25 * SCREEN
    center = (task.targets[:, :2] + task.targets[:, 2:]) / 2
    away = np.linalg.norm((task.start[:, :2] - center) / size, axis=1)
    assert 0.4 <= away.min() < 0.45
    assert 3.5 < away.max() <= 3.6
    assert (task.start[:, 2:] - np.log(size)).std() == pytest.approx(0.3, abs=0.01)
    np.testing.assert_allclose(task.std[:, :2], size / 4)
    assert (task.std[:, 2:] == 0.2).all()


@pytest.mark.parametrize(("offset", "rate"), [(2.0, 0.05), (1.0, 0.23), (0.0, 1.0)])
def test_hit_rate_at_the_start(offset, rate):
    task = near_miss(np.random.default_rng(1), 4000, offset)
    assert hit_rate(task.start, task.targets) == pytest.approx(rate, abs=0.015)


def test_boxes_and_hits_by_hand():
    parameters = np.array([[100.0, 50.0, np.log(40), np.log(20)], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(boxes_of(parameters), [[80, 40, 120, 60], [-0.5, -0.5, 0.5, 0.5]])
    targets = np.array([[90.0, 50, 100, 60], [1, 1, 2, 2]])
    assert hit_rate(parameters, targets) == 0.5
    assert hit_rate(np.stack([parameters, parameters + 1.0]), targets).tolist() == [0.5, 0.5]
    assert hit_rate(np.stack([parameters, parameters + 10.0]), targets).tolist() == [0.5, 0.0]


def test_sizes_that_make_no_sense():
    for arguments in ((0, 1.0), (4, -1.0), (4, float("nan"))):
        with pytest.raises(InvalidInputError, match="near_miss needs"):
            near_miss(np.random.default_rng(0), *arguments)
