import numpy as np
import pytest
import torch

from polyreward.studies.base import StudyConfig
from polyreward.studies.reward_ensembles import DEAD, STUDY, digits, fit_members, gold_reward, pretrain, run_seed


def test_dead_columns_are_dead_and_gold_does_not_read_them():
    train, held = digits(np.random.default_rng(0))
    assert train.shape == (1000, 8, 8)
    assert len(held) == 797
    assert not train[:, :, list(DEAD)].any()
    filled = held.copy()
    filled[:, :, list(DEAD)] = 3.0
    assert np.array_equal(gold_reward(filled, 15.0), gold_reward(held, 15.0))


def test_gold_of_one_image():
    image = np.zeros((1, 8, 8), np.float32)
    image[0, 0, 2], image[0, 7, 6] = 1.0, 0.5
    # 1 above, 0.5 below; 1 on the left, 0.5 on the right; ink 1.5
    assert gold_reward(image, 2.5)[0] == pytest.approx(0.5 / 4 + 0.6 * np.tanh(0.25) - 0.002)


def test_training_never_touches_the_weights_of_dead_pixels():
    from polyreward.preferences import PreferenceData

    train, _ = digits(np.random.default_rng(0))
    images = torch.from_numpy(train.reshape(-1, 64))
    encoders = [pretrain(images, seed, 20) for seed in (0, 1)]
    data = PreferenceData(np.arange(40), np.arange(80), choice=np.arange(40) % 2)
    ensemble = fit_members(images, data, encoders, 2, 2, seed=0)
    weights = [member.encoder.network[0].weight.detach().view(64, 8, 8) for member in ensemble.members]
    dead, live = [w[:, :, list(DEAD)] for w in weights], [np.delete(w.numpy(), DEAD, axis=2) for w in weights]
    assert torch.equal(dead[0], dead[1])
    assert torch.equal(dead[2], dead[3])
    assert not torch.allclose(dead[0], dead[2])
    assert not np.allclose(live[0], live[1])
    # the pretrained encoders themselves stay as they were
    assert torch.equal(encoders[0][0].weight.view(64, 8, 8)[:, :, list(DEAD)], dead[0])


@pytest.mark.slow
def test_a_quick_run_is_finite():
    figures = run_seed(0, StudyConfig(quick=True))
    assert all(np.isfinite(value) for part in figures.values() for value in part.values())
    again = run_seed(0, StudyConfig(quick=True))
    assert again == figures
    # no scheme is above the oracle, and without shift the schemes are close
    for name in ("single", "fine-tune", "pretrain"):
        assert figures[name]["gold at 64"] <= figures["oracle"]["gold at 64"]
    assert figures["oracle"]["gold at 256"] >= figures["oracle"]["gold at 64"]
    assert abs(STUDY.judge([figures, again]).effect) < 1


def figures_of(single=1.7, fine=1.8, pre=1.95, ood=0.7, ink=0.5):
    ways = ("median", "min", "mean minus std")
    numbers = [f"gold at {n}" for n in (1, 64, 256)] + [
        f"gold at temperature {t:g}" for t in (2.0, 1.0, 0.5, 0.25, 0.1)
    ]
    made = {}
    for end in ("", ", far", ", no shift"):
        for name, value in (("single", single), ("fine-tune", fine), ("pretrain", pre), ("oracle", 2.2)):
            made[f"{name}{end}"] = dict.fromkeys(numbers, value)
            made |= {f"{name} ({way}){end}": dict.fromkeys(numbers, value) for way in ways}
        made[f"rank correlation{end}"] = {
            "in distribution, different_pretrain": 0.99,
            "candidates, different_pretrain": ood,
            "candidates, same_pretrain": 0.9,
        }
    made["single"] |= {"own reward": 2.0, "other reward": 1.5}
    made["members"] = {"accuracy": 0.9, "largest distance": 0.01}
    made["single, labels that like ink"] = {"ink": 0.5}
    made["pretrain, labels that like ink"] = {"ink": ink}
    made["oracle, labels that like ink"] = {"ink": -0.1}
    return made


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "supported"),
        ({"pre": 1.85}, "inconclusive"),
        ({"pre": 1.75}, "not supported"),
        ({"fine": 1.6, "pre": 1.8}, "not supported"),
        ({"ood": 0.9}, "inconclusive"),
        ({"ink": 0.3}, "inconclusive"),
        ({"ink": 0.1}, "not supported"),
    ],
)
def test_the_rule_can_fail(changed, verdict):
    runs = [figures_of(**changed) for _ in range(STUDY.seeds)]
    judged = STUDY.judge(runs)
    assert judged.verdict == verdict
    assert all(judged.checks.values()) == (verdict == "supported")
