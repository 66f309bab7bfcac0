import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyreward.curricula.tier_portfolio import CapabilityProfile, CurriculumPortfolio, probe_capability, select
from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.rewards.tiered_tests import PORTFOLIO, TIERS, TestCase, TieredReward, TieredSuite

CURRICULA = CurriculumPortfolio(PORTFOLIO)


def profile(*rates):
    return CapabilityProfile(dict(zip(TIERS, rates, strict=True)))


def test_the_portfolio_of_the_paper():
    worth = {name: tuple(CURRICULA[name][1][tier] for tier in TIERS) for name in CURRICULA}
    assert worth == {
        "uni": (0.25, 0.25, 0.25, 0.25),
        "var": (0.35, 0.35, 0.15, 0.15),
        "var_asce_normal": (0.15, 0.15, 0.35, 0.35),
        "var_asce_rev": (0.15, 0.15, 0.35, 0.35),
        "basic_only": (1, 0, 0, 0),
        "complex_only": (0, 0, 1, 0),
        "edge_only": (0, 0, 0, 1),
        "binary": (0.25, 0.25, 0.25, 0.25),
    }
    active = {name: [sorted(CURRICULA[name][0](f)) for f in (0.1, 0.3, 0.5, 0.9)] for name in CURRICULA}
    easy = [["basic"], ["basic", "medium"], ["basic", "high", "medium"], ["basic", "edge", "high", "medium"]]
    assert active["uni"] == active["var"] == active["var_asce_normal"] == easy
    assert active["var_asce_rev"] == [["high"], ["edge", "high"], ["edge", "high", "medium"], easy[3]]
    assert active["binary"] == [easy[3]] * 4
    assert active["complex_only"] == [["high"]] * 4
    assert len(CURRICULA) == 8


@pytest.mark.parametrize(
    ("rates", "name"),
    [
        ((0.2, 0.03, 0.004, 0.02), "var_asce_normal"),
        ((0.97, 0.9, 0.36, 0.34), "var_asce_rev"),
        ((0.4, 0.4, 0.4, 0.4), "var_asce_rev"),  # exactly theta
        ((0.4, 0.4, 0.4, 0.39), "var_asce_normal"),
    ],
)
def test_rule(rates, name):
    assert CURRICULA.select(profile(*rates)) == select(profile(*rates)) == name


def test_profile():
    made = profile(0.9, 0.5, 0.2, 0.0)
    assert made.score == pytest.approx(0.4)
    assert made.basic == 0.9
    assert made.ordered
    assert not profile(0.1, 0.5, 0.2, 0.0).ordered
    part = CapabilityProfile({"edge": 0.5, "high": 0.1})
    assert part.score == pytest.approx(0.3)
    assert part.basic is None
    assert list(part.pass_rates) == ["high", "edge"]


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.floats(0, 1))
def test_theta_is_the_border(rates, theta):
    own = CurriculumPortfolio(PORTFOLIO, theta, "var", "edge_only")
    assert own.select(profile(*rates)) == ("var" if np.mean(rates) < theta else "edge_only")


def test_measured_gain_goes_before_the_rule():
    weak = profile(0, 0, 0, 0)
    assert CURRICULA.select(weak, {"uni": 0.01, "var_asce_rev": 0.2, "binary": 0.2}) == "var_asce_rev"
    assert CURRICULA.select(weak, {"binary": -0.2}) == "binary"
    with pytest.raises(UnknownNameError, match="'unii'; did you mean 'uni'"):
        CURRICULA.select(weak, {"unii": 1.0})
    for gains in ({}, {"uni": float("nan")}, {"uni": None}):
        with pytest.raises(InvalidInputError):
            CURRICULA.select(weak, gains)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CapabilityProfile({}),
        lambda: CapabilityProfile({"basic": 1.1}),
        lambda: CapabilityProfile({"basic": float("nan")}),
        lambda: CapabilityProfile({"expert": 0.5}),
        lambda: CapabilityProfile(0.5),
        lambda: CurriculumPortfolio({}),
        lambda: CurriculumPortfolio({"a": 3}),
        lambda: CurriculumPortfolio(PORTFOLIO, theta=1.5),
        lambda: select(profile(0, 0, 0, 0), theta=float("nan")),
    ],
)
def test_bad_input(make):
    with pytest.raises(InvalidInputError):
        make()


def test_unknown_names():
    with pytest.raises(UnknownNameError, match="did you mean 'uni'"):
        CURRICULA["unis"]
    small = CurriculumPortfolio({"uni": PORTFOLIO["uni"]})
    with pytest.raises(UnknownNameError, match="var_asce_normal"):
        small.select(profile(0, 0, 0, 0))


def suite(*tiers):
    return TieredSuite([TestCase(tier, "yes", tier) for tier in tiers])


def runner(code, stdin, timeout):
    """The code lists the tiers that it passes."""
    return 0, "yes" if stdin in code.split() else "no"


def test_probe():
    suites = {"a": suite(*TIERS), "b": suite("basic", "basic", "high", "minimal")}
    answers = {"a": ["```python\nbasic high\n```", "```python\nbasic medium edge\n```"], "b": "```python\nhigh\n```"}
    made = probe_capability(lambda problem: answers[problem], suites, runner)
    assert made.pass_rates == pytest.approx({"basic": 0.5, "medium": 0.5, "high": 0.75, "edge": 0.5})
    listed = probe_capability(
        lambda own: answers["a" if len(own.tiers) == 4 and "edge" in own.tiers else "b"], list(suites.values()), runner
    )
    assert listed == made


def test_probe_passes_options_on_and_refuses_nothing():
    made = probe_capability(lambda own: "basic medium", [suite("basic", "high")], runner, extract="text")
    assert made.pass_rates == {"basic": 1.0, "high": 0.0}
    with pytest.raises(InvalidInputError, match="at least one suite"):
        probe_capability(lambda own: "", [])
    with pytest.raises(InvalidInputError, match="no completion for problem 0"):
        probe_capability(lambda own: [], [suite("basic")], runner)
    with pytest.raises(InvalidInputError, match="pass rate of a tier"):
        probe_capability(lambda own: "", [suite("minimal")], runner)


def test_a_chosen_curriculum_makes_a_reward():
    schedule, weights = CURRICULA[CURRICULA.select(profile(1, 1, 1, 1))]
    part = TieredReward(suite(*TIERS), schedule, weights, runner, extract="text")
    assert part("high", 0.0).reward == 0.35
