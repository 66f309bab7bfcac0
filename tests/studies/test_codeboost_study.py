import numpy as np
import pytest
import torch

from polyreward.studies.base import StudyConfig, rated
from polyreward.studies.codeboost import (
    ARMS,
    RATES,
    STUDY,
    build_corpora,
    fresh_programs,
    programs_shown,
    random_programs,
)
from polyreward.studies.codeboost_policy import (
    BATCH,
    GROUP,
    HeldOut,
    Policy,
    View,
    fillings,
    language,
    masked_slots,
    reward_of,
    rewards_of,
    train,
    warmed_up,
)
from polyreward.studies.codeboost_texts import curate_functions, edited, library_functions
from polyreward.tasks.mini_python import INTEGERS, IS_OPERATOR, LOWEST, TOKENS, parse, source, tokens_of


def test_rewards_of_the_four_cases():
    clean = parse("a = 1 + 1\nb = a + 1\nprint(b + 0)\n")
    crash = parse("a = 1 // 0\nb = a + 1\nprint(b // 0)\n")
    three, one, third = 3 - LOWEST, INTEGERS, INTEGERS + 2
    assert reward_of(clean, three, False) == pytest.approx(0.775)
    assert reward_of(clean, three + 1, False) == pytest.approx(0.325)
    assert reward_of(clean, one, False) == pytest.approx(0.1)
    assert reward_of(crash, one, False) == pytest.approx(0.775)
    assert reward_of(crash, three, False) == pytest.approx(0.1)
    # The right kind at the wrong line: nothing on stdout, first and last of the four lines of stderr.
    assert reward_of(crash, third, False) == pytest.approx(0.9 * (1 + 0.5 * 2 / 6) / 2 + 0.1)
    same = parse("a = 1 * 2\nb = a + 1\nprint(b + 0)\n")
    assert reward_of(clean, same, True) == pytest.approx(0.775)
    assert reward_of(clean, parse("a = 1 + 2\nb = a + 1\nprint(b + 0)\n"), True) == pytest.approx(0.325)
    assert reward_of(clean, parse("a = 1 // 0\nb = a + 1\nprint(b + 0)\n"), True) == pytest.approx(0.1)


def test_about_a_quarter_of_the_programs_crash():
    classes = language().classes(random_programs(np.random.default_rng(0), 3000))
    assert (classes >= 0).all()
    assert 0.2 < (classes >= INTEGERS).mean() < 0.3


@pytest.mark.slow
def test_the_clique_keeps_one_of_every_group_of_near_duplicates():
    corpora = build_corpora(np.random.default_rng(0))
    assert len(corpora["all"]) == 150 + sum(60 // (1 + rank) for rank in range(150)) == 411
    assert len(corpora["clique"]) == len(corpora["random"])
    assert 130 <= len(corpora["clique"]) <= 150
    kept = tokens_of(np.sort(corpora["clique"]))
    apart = (kept[:, None] != kept[None]).sum(axis=2)
    assert apart[~np.eye(len(kept), dtype=bool)].min() >= 2
    assert len(np.unique(corpora["random"])) < len(np.unique(corpora["clique"]))


def test_fresh_programs_are_distinct_and_new():
    known = random_programs(np.random.default_rng(0), 500)
    fresh = fresh_programs(np.random.default_rng(0), 300, known)
    assert len(np.unique(fresh)) == 300
    assert not np.isin(fresh, known).any()


def test_streams_of_programs():
    corpus = random_programs(np.random.default_rng(0), 40)
    hidden = corpus[:3]
    changed = programs_shown(corpus, 400, ARMS["full"], hidden, 0)
    assert changed.shape == (400,)
    assert not np.isin(changed, hidden).any()
    share = np.isin(changed, corpus).mean()
    assert 0.4 < share < 0.9
    assert np.isin(programs_shown(corpus, 400, ARMS["no augmentation"], hidden, 0), corpus).all()
    assert (language().classes(programs_shown(corpus, 200, ARMS["errors dropped"], hidden, 0)) < INTEGERS).all()


def test_views_and_fillings():
    programs = np.array([0, 162_005, 777])
    slots = np.array([-1, 9, 1])
    view = View.of(programs, slots)
    assert view.inputs.shape == (3, 13 * 12 + 30)
    assert view.inputs[0].sum() == 7
    assert view.inputs[1].sum() == 6 + 1
    assert view.masked.tolist() == [False, True, True]
    assert view.fitting[1, :TOKENS].tolist() == [True] * 6 + [False] * 5
    assert view.fitting[2, :TOKENS].tolist() == [False] * 6 + [True] * 5
    made = fillings(programs, slots)
    assert (made[0] == -1).all()
    assert ((made[1] >= 0) == ~np.repeat([False, True], [6, 5])).all()
    own = tokens_of(programs[1:])[np.arange(2), slots[1:]]
    assert made[[1, 2], own].tolist() == programs[1:].tolist()
    policy = Policy()
    chances = policy.logp(view).exp()
    torch.testing.assert_close(chances.sum(dim=1), torch.ones(3))
    assert chances[1, 6:].sum() == 0
    answers = np.array([[0, 29], [3, 5], [6, 10]])
    rewards = rewards_of(programs, slots, made, answers)
    assert rewards[0, 0] == reward_of(0, 0, False)
    assert rewards[1, 1] == reward_of(162_005, int(made[1, 5]), True)
    assert rewards[2, 0] == reward_of(777, int(made[2, 6]), True)


def test_masked_slots_are_present_and_cover_all():
    programs = np.repeat([0, 170_000], 300)
    slots = masked_slots(programs, np.random.default_rng(0))
    assert set(slots[:300]) == set(range(7))
    assert set(slots[300:]) == set(range(7, 13))
    assert IS_OPERATOR[[1, 3, 5, 11]].all()


@pytest.mark.slow
def test_training_learns():
    rng = np.random.default_rng(0)
    programs = random_programs(rng, 250)
    start = warmed_up(programs, 0, "cpu")
    seen = HeldOut(programs, rng)
    before = seen.measure(start)
    assert before["clean"] > 0.9
    stream = programs_shown(programs[:20], 60 * BATCH, ARMS["no augmentation"], np.empty(0, dtype=int), 0)
    policy, late = train(start, ARMS["full"].forward, stream, 2e-3, 0, "cpu")
    again, _ = train(start, ARMS["full"].forward, stream, 2e-3, 0, "cpu")
    assert HeldOut(programs[:20], rng).measure(policy)["clean"] == 1
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters(), strict=True))
    assert 0.6 < late <= 0.775
    assert GROUP == 5


@pytest.mark.slow
def test_library_functions_have_the_right_size():
    functions = library_functions()
    assert len(functions) > 200
    assert all(10 <= text.count("\n") + 1 <= 30 for text in functions)
    copy = edited(functions[0], np.random.default_rng(0))
    assert copy != functions[0]
    assert copy.count("\n") == functions[0].count("\n") + 1


@pytest.mark.slow
def test_curation_of_the_library_is_pairwise_dissimilar():
    figures = curate_functions(0, quick=True)
    assert figures["library, clique"]["largest similarity"] < 0.5
    assert figures["library, clique"]["originals"] > figures["library, random"]["originals"]
    assert figures["library, clique"]["exact"] == 1


@pytest.mark.slow
def test_quick_run_is_finite_and_judged():
    figures = STUDY.run_seed(0, StudyConfig(quick=True))
    assert all(np.isfinite(value) for arm in figures.values() for value in arm.values())
    judged = STUDY.judge([figures])
    assert judged.verdict in ("supported", "not supported", "inconclusive")
    assert "CRUXEval" not in judged.summary
    assert "print" in source(0)


def _figures(full=1.75, unchanged=1.6, error=0.1, infill=0.55, shift=0.0):
    """Figures of one seed."""
    totals = dict.fromkeys(ARMS, 1.7) | {"full": full, "no augmentation": unchanged}
    run = {"base": {"clean": 0.3, "error": 0.7, "infill": 0.56, "sum": 1.56}}
    for name, total in totals.items():
        for rate in RATES:
            run[rated(name, rate)] = {
                "clean": 0.4,
                "error": error if name == "errors dropped" else 0.77,
                "infill": infill if name == "forward only" else 0.58,
                "sum": total + shift,
                "validation": total,
                "reward at the end": 0.6,
            }
    run["corpus"] = {"all": 411, "clique": 145, "random": 145}
    run["saying nothing"] = {"reward": 0.38, "clean programs": 0.74}
    run["library, all texts"] = {"texts": 260, "originals": 60}
    for name in ("library, clique", "library, clique over lines", "library, random"):
        run[name] = {"kept": 60, "originals": 50, "largest similarity": 0.4}
    return run


@pytest.mark.parametrize(
    ("runs", "verdict"),
    [
        ([_figures(), _figures(shift=0.01)], "supported"),
        ([_figures(full=1.65, unchanged=1.58)], "inconclusive"),
        ([_figures(error=0.4)], "inconclusive"),
        ([_figures(unchanged=1.72)], "inconclusive"),
        ([_figures(infill=0.58)], "inconclusive"),
        ([_figures(infill=0.5), _figures(infill=0.6)], "inconclusive"),
        ([_figures(unchanged=1.75)], "not supported"),
        ([_figures(full=1.55, unchanged=1.5)], "not supported"),
    ],
)
def test_rule(runs, verdict):
    assert STUDY.judge(runs).verdict == verdict


def test_rates_are_chosen_on_validation_programs():
    run = _figures()
    run[rated("full", RATES[0])] |= {"validation": 9.0, "sum": 1.0}
    judged = STUDY.judge([run])
    assert judged.effect == pytest.approx(1.0 - 1.56)
    assert f"full (rate {RATES[0]:g})" in judged.summary
