import gzip
import itertools
import json

import numpy as np
import pytest

from polyreward.rewards.tool_calls import parse_tool_calls, toolrl
from polyreward.rewards.tool_matching import ToolCall
from polyreward.studies.base import StudyConfig
from polyreward.studies.tool_rewards import (
    CENTRED,
    CORRUPTIONS,
    PROMPTS,
    RATES,
    SCALES,
    STUDY,
    Arm,
    CallPolicy,
    corrupted,
    corruptions,
    identity,
    run_seed,
    sigmoid,
    train,
)

CALLS = [ToolCall("f", {"a": 1, "b": "x"}), ToolCall("g", {"c": [1]})]


def text_of(calls):
    lines = "\n".join(json.dumps({"name": c.name, "parameters": dict(c.parameters)}) for c in calls)
    return f"<think>why</think>\n<tool_call>\n{lines}\n</tool_call>"


def test_start_is_weakly_right():
    starts = [CallPolicy(np.random.default_rng(seed)).exact_match() for seed in range(20)]
    assert np.mean(starts) == pytest.approx(0.0014, abs=0.0005)


def test_exact_match_equals_enumeration_of_one_call():
    policy = CallPolicy(np.random.default_rng(5))
    policy.tool = np.random.default_rng(6).normal(size=policy.tool.shape)
    policy.format[:] = 0.3
    total = 0.0
    for p in range(PROMPTS):
        chance = sigmoid(np.float64(0.3))
        for c, s in itertools.product(range(3), range(4)):
            if policy.used[p, c]:
                weights = np.exp(policy.value[p, c, s])
                value = weights[policy.values[p, c, s]] / weights.sum()
                there = sigmoid(policy.presence[p, c, s])
                chance *= there * value if policy.present[p, c, s] else 1 - there
        for c in range(3):
            if policy.used[p, c]:
                weights = np.exp(policy.tool[p, c])
                chance *= weights[policy.tools[p, c]] / weights.sum()
        total += chance
    assert policy.exact_match() == pytest.approx(total / PROMPTS)


def test_prompts_have_the_stated_shape():
    policy = CallPolicy(np.random.default_rng(0))
    assert set(policy.used.sum(axis=1)) == {1, 2, 3}
    assert set(policy.present.sum(axis=2).ravel()) == {1, 2, 3, 4}
    for answer, used in zip(policy.answers, policy.used, strict=True):
        assert len(parse_tool_calls(answer)) == used.sum()
    broken = policy.text(False, policy.tools[0], policy.present[0], policy.values[0], policy.used[0])
    assert toolrl()(None, [broken], answer=[policy.answers[0]]) == [-3]


def test_an_update_moves_towards_better_samples():
    rng = np.random.default_rng(0)
    policy = CallPolicy(rng)
    before = policy.exact_match()
    dead = [policy.update(Arm(), toolrl(), rng, 0.8, step) for step in range(25)]
    assert policy.exact_match() > 3 * before
    assert (policy.format > 0).mean() > 0.8
    assert np.mean(dead) < 0.1


def test_centred_advantages_and_schedules_train_too():
    figures = train(Arm(scale="two_stage", transform=CENTRED), 0, 5)
    assert np.isfinite(list(figures.values())).all()
    assert train(Arm("coarse"), 0, 15)["dead groups"] > 0.2 > 0.1 > train(Arm(), 0, 15)["dead groups"]


def test_identity():
    assert identity(0).keys() == {
        f"{granularity}, {matching}"
        for granularity in ("fine", "refined", "intermediate", "coarse")
        for matching in ("greedy", "optimal")
    }
    assert set(identity(0).values()) == {0.0}


def test_corruptions_change_what_they_say():
    gold = text_of(CALLS)
    versions = corruptions(gold, CALLS, np.random.default_rng(0))
    assert set(versions) == set(CORRUPTIONS)
    calls = {name: parse_tool_calls(text) for name, text in versions.items()}
    assert calls["gold"] == calls["no thinking"] == CALLS
    assert calls["reordered calls"] == CALLS[::-1]
    assert len(calls["duplicate call"]) == 3
    assert not isinstance(calls["broken JSON"], list)
    assert [c.name for c in calls["wrong value"]] == ["f", "g"] != [c.name for c in calls["wrong tool"]]
    assert sum(len(c.parameters) for c in calls["missing parameter"]) == 2
    assert "<think>" not in versions["no thinking"]
    assert "reordered calls" not in corruptions(text_of(CALLS[:1]), CALLS[:1], np.random.default_rng(0))


def test_corrupted_answers_of_a_file_fall_in_order(tmp_path):
    path = tmp_path / "answers.json.gz"
    outputs = [{"output": text_of(CALLS)}] * 3 + [{"output": "<think>x</think>\n<response>y</response>"}]
    with gzip.open(path, "wt") as file:
        json.dump(outputs, file)
    fine, coarse = corrupted(path, 0, "fine"), corrupted(path, 0, "coarse")
    assert (fine["answers"], fine["gold"], fine["no thinking"], fine["reordered calls"]) == (3, 4, 3, 4)
    assert 4 > fine["wrong value"] > fine["missing parameter"] > fine["wrong tool"] > fine["broken JSON"] == -2
    assert {coarse[name] for name in CORRUPTIONS if name not in ("gold", "no thinking")} == {-2}


@pytest.mark.slow
def test_quick_run_without_data_is_finite_and_says_so():
    figures = run_seed(0, StudyConfig(quick=True))
    assert all(np.isfinite(value) for arm in figures.values() for value in arm.values())
    judged = STUDY.judge([figures])
    assert "Real answers: not run, no data folder with tools/rlla_sft.json.gz was given" in judged.summary
    assert judged.verdict in ("supported", "not supported", "inconclusive")


def _run(fine=0.6, intermediate=0.3, coarse=0.1, dead=0.02, broken=-2.0, real=True, shortfall=0.0):
    run = {}
    for name, exact in (("fine", fine), ("refined", fine), ("intermediate", intermediate), ("coarse", coarse)):
        for rate in RATES:
            run[f"{name}, rate {rate:g}"] = {"exact match": exact, "dead groups": dead}
    run["fine, optimal matching"] = {"exact match": fine}
    for scale in SCALES:
        run[f"fine, {scale}"] = run[f"fine, {scale}, centred only"] = {"exact match": fine}
    run["identity"] = {"fine, greedy": shortfall}
    if real:
        values = {"gold": 4.0, "wrong value": 3.0, "missing parameter": 2.0, "wrong tool": -1.0, "broken JSON": broken}
        rest = {"duplicate call": 3.0, "reordered calls": 4.0, "no thinking": 3.0}
        run["real answers, fine"] = values | rest | {"answers": 200.0, "answers that parse": 329.0}
        run["real answers, coarse"] = dict.fromkeys(CORRUPTIONS, -2.0) | {"gold": 4.0, "no thinking": 3.0}
    return run


@pytest.mark.parametrize(
    ("runs", "verdict"),
    [
        ([_run()] * 2, "supported"),
        ([_run(real=False)] * 2, "supported"),
        ([_run(), _run(intermediate=0.7)], "inconclusive"),
        ([_run(coarse=0.25)], "inconclusive"),
        ([_run(coarse=0.3)], "not supported"),
        ([_run(dead=0.3)], "not supported"),
        ([_run(broken=-0.5)], "inconclusive"),
        ([_run(shortfall=0.1)], "inconclusive"),
    ],
)
def test_rule(runs, verdict):
    assert STUDY.judge(runs).verdict == verdict
