import numpy as np
import pytest
import torch

from polyreward.studies.base import StudyConfig, rated
from polyreward.studies.latent_user_dialogues import dialogue_figures
from polyreward.studies.latent_users import (
    COLUMNS,
    CORNERS,
    RATES,
    ROWS,
    STUDY,
    arrivals,
    cells,
    digit_features,
    disputed,
    distances,
    draw_sets,
    moves,
    run_seed,
    success,
    uniform,
)


def test_labels_follow_the_goal_and_disputed_pairs_are_those_that_kinds_order_differently():
    goals = torch.tensor(CORNERS[:2])
    first, second = torch.tensor([[0.1, 0.1], [0.0, 0.9]]), torch.tensor([[0.8, 0.8], [0.1, 0.2]])
    assert distances(first, goals)[0].tolist() == pytest.approx([-(0.02**0.5), -(1.62**0.5)])
    # the second pair: distances 0.9 and 1.005 of the first item, 0.224 and 1.204 of the second
    assert disputed(first, second, goals).tolist() == [True, True]
    assert not disputed(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0]), goals)  # both prefer the middle
    a, b, labels, kinds = draw_sets(uniform, goals, 200, 8, torch.Generator().manual_seed(0))
    near = (a - goals[kinds].unsqueeze(1)).norm(dim=-1) < (b - goals[kinds].unsqueeze(1)).norm(dim=-1)
    assert torch.equal(labels, near.float())
    assert set(kinds.tolist()) == {0, 1}


def test_the_grid_and_its_greedy_walk():
    assert cells()[0].tolist() == pytest.approx([0.5 / 9, 0.5 / 12])
    assert moves()[0].tolist() == [0, COLUMNS, 0, 1, 0]
    true = distances(cells(), torch.tensor(CORNERS[:2])).numpy().T
    ends = arrivals(true)
    assert (ends[0] == 0).all()
    assert (ends[1] == ROWS * COLUMNS - 1).all()
    assert success(true[:1], 0) == 1
    assert success(true[:1], ROWS * COLUMNS - 1) == 0
    # the mean of both rewards leads to neither corner
    mean = true.mean(axis=0, keepdims=True)
    assert success(mean, 0) < 0.5 or success(mean, ROWS * COLUMNS - 1) < 0.5


def test_means_of_digits():
    features, means = digit_features()
    assert features.shape == (1797, 8)
    assert means.shape == (4, 8)
    assert float(features.std(unbiased=False)) == pytest.approx(1, abs=0.01)


@pytest.mark.slow
def test_a_quick_run_is_finite():
    figures = run_seed(0, StudyConfig(quick=True))
    assert all(np.isfinite(value) for part in figures.values() for value in part.values())
    assert run_seed(0, StudyConfig(quick=True)) == figures
    assert "kl" in figures["SPO, 2 corners"]
    assert np.isfinite(STUDY.judge([figures]).effect)
    assert not any("dialogues" in name for name in figures)


@pytest.mark.slow
def test_dialogues_from_a_file(tmp_path):
    import gzip
    import json

    path = tmp_path / "dialogues.jsonl.gz"
    rows = [
        {"objective": ("helpful", "harmless")[i % 2], "responses": [f"good {i}", f"bad {i}"], "label": i % 2}
        for i in range(300)
    ]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(row) for row in rows))
    figures = dialogue_figures(path, 0, quick=True)
    assert figures["dialogues"]["unseen comparisons"] == 3 * 13  # a quarter of 12 annotators, 25 less 12 each
    assert 0 <= figures["VPL, dialogues"]["accuracy"] <= 1


def figures_of(
    vpl=0.98, btl=0.5, four=0.9, spo=0.97, spread=(0.3, 0.05), grid=(0.95, 0.9), alone=(0.0, 0.1), units=1.0
):
    made = {}
    for part, value in (("2 corners", vpl), ("4 corners", four), ("digits", 0.8)):
        for name in ("VPL", "VPL, attention"):
            made[f"{name}, {part}"] = {"accuracy": value, "disputed": value, "kl": 2.0, "active units": units}
        for rate in RATES:
            made[rated(f"BTL, {part}", rate)] = {"accuracy": 0.58 - rate, "disputed": btl}
    made["SPO, 2 corners"] = {"accuracy": spo, "disputed": spo, "kl": 2.0, "active units": 1.0}
    made["head, 2 corners"] = {"accuracy": 0.95, "disputed": 0.95, "kl": 2.0, "active units": 3.0}
    for name in ("mean-variance", "categorical"):
        made[f"{name}, 2 corners"] = {"accuracy": 0.58, "disputed": 0.5}
    for name, value in zip(("VPL", "SPO"), spread, strict=True):
        made[f"{name}, 2 corners"] |= {"range": 1.0, "variation of the range": value}
    made["VPL, grid"] = {"kind 0": grid[0], "kind 1": grid[1]}
    for rate in RATES:
        made[rated("BTL, grid", rate)] = {"kind 0": alone[0], "kind 1": alone[1]}
    return made


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "supported"),
        ({"vpl": 0.7}, "inconclusive"),
        ({"vpl": 0.6}, "not supported"),
        ({"btl": 0.6}, "inconclusive"),
        ({"four": 0.7}, "inconclusive"),
        ({"spo": 0.5}, "inconclusive"),
        ({"spread": (0.3, 0.2)}, "inconclusive"),
        ({"spread": (0.3, 0.3)}, "not supported"),
        ({"grid": (0.95, 0.7)}, "inconclusive"),
        ({"alone": (0.9, 0.9)}, "inconclusive"),
        ({"units": 0.0}, "not supported"),
    ],
)
def test_the_rule_can_fail(changed, verdict):
    runs = [figures_of(**changed) for _ in range(STUDY.seeds)]
    judged = STUDY.judge(runs)
    assert judged.verdict == verdict
    assert all(judged.checks.values()) == (verdict == "supported")


def test_dialogues_are_reported_where_every_seed_has_them():
    run = figures_of() | {
        "VPL, dialogues": {"accuracy": 0.6, "kl": 1.0, "active units": 1.0},
        "BTL, dialogues": {"accuracy": 0.55},
        "dialogues": {"sentence encoder": 1.0, "unseen comparisons": 500.0},
    }
    assert "sentence encoder" in STUDY.judge([run, run]).summary
    assert "Dialogues" not in STUDY.judge([run, figures_of()]).summary
