"""What every preset has in common, and the recipe round trip."""

import json

import pytest
import torch

from polyreward import RewardBatch
from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.objectives import (
    OBJECTIVES,
    ElasticTrustRegion,
    EntropyHinge,
    FixedClip,
    KLPenalty,
    PolicyObjective,
    dr_grpo_objective,
    etr_objective,
    gspo_objective,
    make_objective,
    objective_config,
)

CONFIGS = [
    *({"preset": name, **({"max_length": 9} if name == "dr-grpo" else {})} for name in OBJECTIVES),
    {"preset": "grpo", "kl": 0.04},
    {"preset": "etr", "form": "additive", "kl": 0.01},
    {"preset": "etr", "form": "proportional", "reward_range": None, "weights": {"reward": 2.0}},
    {"entropy": {"kind": "bonus", "weight": 0.01}, "ratio": "sequence", "aggregation": "token-mean"},
]
every = pytest.mark.parametrize("config", CONFIGS, ids=str)
INFINITY, NAN = float("inf"), float("nan")


def inputs(objective, rows=8, tokens=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = -normal(rows, tokens).abs()
    batch = RewardBatch(torch.rand(rows, generator=generator), groups=torch.arange(rows) // 2)
    advantages = normal(rows).to(dtype)
    low, high = objective.bounds(advantages, batch)
    given = {
        "logp": old + 0.3 * normal(rows, tokens),
        "old_logp": old,
        "mask": torch.rand(rows, tokens, generator=generator) < 0.7,
        "reference_logp": old + 0.2 * normal(rows, tokens),
        "entropy": normal(rows, tokens).abs(),
    }
    given = {k: v if v.dtype == torch.bool else v.to(dtype) for k, v in given.items()}
    tasks = torch.arange(rows) % 3
    return {**given, "advantages": advantages, "low": low, "high": high, "tasks": tasks}


def loss_and_gradient(objective, given):
    logp = given["logp"].clone().requires_grad_()
    loss = objective(**{**given, "logp": logp}).loss
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (5, "an objective is a name or a table, got 5"),
        ({"kl": 0.1}, r"kl: expected a table such as \{kind = 'penalty'\}, got 0.1"),
        ({"entropy": "hinge"}, r"entropy: expected a table such as \{kind = 'bonus'\}, got 'hinge'"),
        ({"trust_region": "elastic"}, r"trust_region: expected a table such as \{kind = 'fixed'\}"),
        ({"preset": "etr", "reward_range": [1, 2, 3]}, r"reward_range must be \(smallest, largest\), got \[1, 2, 3\]"),
        ({"preset": "etr", "low": "a"}, "low must be a number, got 'a'"),
        ({"preset": "etr", "low": 0.995, "maximum": 1.5}, "low=0.995 must be at most 0.99"),
        ({"entropy": {"kind": "hinge", "by_task": {"a": [1]}}}, "the entropy band of a needs"),
    ],
)
def test_what_is_no_objective_is_refused(config, message):
    with pytest.raises(InvalidInputError, match=message):
        make_objective(config)


def test_half_precision_does_not_round_the_radius():
    batch = RewardBatch([1.0, 0.0], groups=[0, 0])
    region = etr_objective(micro=0, macro=0).trust_region
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        low, high = region.bounds(torch.tensor([1.0, -1.0], dtype=dtype), batch)
        assert low.tolist() == high.tolist() == torch.tensor([0.2, 0.2]).tolist()


@every
def test_round_trip_through_json(config):
    objective = make_objective(config)
    assert make_objective(json.loads(json.dumps(objective_config(objective)))) == objective
    assert make_objective(objective) is objective


@every
def test_masked_positions_do_not_leak(config):
    objective = make_objective(config)
    given = inputs(objective)
    expected = loss_and_gradient(objective, given)
    for poison in (NAN, INFINITY, -INFINITY, 1e30):
        spoilt = {
            k: torch.where(given["mask"], v, poison)
            for k, v in given.items()
            if k in ("logp", "old_logp", "reference_logp", "entropy")
        }
        found = loss_and_gradient(objective, {**given, **spoilt})
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        metrics = objective(**{**given, **spoilt}).metrics
        assert all(bool(torch.isfinite(value)) for value in metrics.values()), metrics


@every
def test_permuting_samples_permutes_the_gradient(config):
    objective = make_objective(config)
    given = inputs(objective)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    shuffled = {k: v[order] if isinstance(v, torch.Tensor) and v.ndim else v for k, v in given.items()}
    loss, gradient = loss_and_gradient(objective, given)
    other, moved = loss_and_gradient(objective, shuffled)
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(gradient[order], moved)


@every
def test_gradcheck(config):
    objective = make_objective(config)
    given = inputs(objective, rows=4, tokens=3)
    # KL and hinge are checked without the exact entropy where the objective allows it: -logp then carries gradient.
    if isinstance(objective.entropy, EntropyHinge):
        given["entropy"] = None
    logp = given.pop("logp").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: objective(x, **given).loss, (logp,))


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(config, dtype):
    objective = make_objective(config)
    result = objective(**inputs(objective, dtype=dtype))
    assert result.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = objective(**inputs(objective)).loss
    assert float(result.loss) == pytest.approx(float(exact), abs=0.05)
    assert all(not value.requires_grad and value.ndim == 0 for value in result.metrics.values())


@every
@pytest.mark.parametrize(("rows", "tokens"), [(0, 4), (3, 0), (1, 1)])
def test_empty_and_single(config, rows, tokens):
    objective = make_objective(config)
    given = inputs(objective, rows=rows, tokens=tokens)
    result = objective(**given)
    assert torch.isfinite(result.loss)
    assert all(bool(torch.isfinite(value)) for value in result.metrics.values())
    given["mask"] = torch.zeros(rows, tokens, dtype=torch.bool)
    assert float(objective(**given).loss) == 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_docstring_names_its_paper(name):
    assert "arXiv" in (OBJECTIVES[name].__doc__ or "")


def test_presets_are_what_the_papers_say():
    assert make_objective("grpo") == PolicyObjective(FixedClip(0.2, 0.2))
    assert make_objective("dapo") == PolicyObjective(FixedClip(0.2, 0.28), aggregation="token-mean")
    assert dr_grpo_objective(512).length == 512
    assert gspo_objective() == PolicyObjective(FixedClip(3e-4, 4e-4), ratio="sequence")
    assert etr_objective().trust_region == ElasticTrustRegion(micro=0.8, macro=0.4, minimum=0.02, maximum=0.8)
    assert make_objective("ema-grpo").kl == KLPenalty(0.01)
    assert make_objective("ema-grpo").dual_clip == make_objective("gaussian-grpo").dual_clip == 3.0
    assert make_objective({"preset": "etr", "micro": 0.5}).trust_region.micro == 0.5


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ("dapoo", "did you mean 'dapo'"),
        ({"preset": "etr", "micr": 1}, "did you mean 'micro'"),
        ({"trust_regio": {}}, "did you mean 'trust_region'"),
        ({"trust_region": {"kind": "elastc"}}, "did you mean 'elastic'"),
        ({"trust_region": {"kind": "fixed", "hihg": 1}}, "did you mean 'high'"),
    ],
)
def test_unknown_names(config, match):
    with pytest.raises(UnknownNameError, match=match):
        make_objective(config)


@pytest.mark.parametrize(
    "config", [{"preset": "dr-grpo"}, {"preset": "grpo", "low": "wide"}, {"preset": "etr", "reward_range": 3}]
)
def test_refused_options(config):
    with pytest.raises(InvalidInputError):
        make_objective(config)
