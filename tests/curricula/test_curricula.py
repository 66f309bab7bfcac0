"""What every curriculum does: one row a curriculum."""

import json

import numpy as np
import pytest
import torch

from polyreward.curricula import (
    CURRICULA,
    CurriculumSampler,
    EasyToHard,
    FixedWeights,
    Uniform,
    make_curriculum,
)
from polyreward.errors import InvalidInputError, UnknownNameError

NAMES = ["easy", "middle", "hard"]
OPTIONS = {"dump": {}, "uniform": {}, "fixed-weights": {"weights": [1, 2, 5]}, "easy-to-hard": {"steps": 6}}


@pytest.fixture(params=sorted(CURRICULA))
def make(request):
    return lambda: make_curriculum({"name": request.param, **OPTIONS[request.param]}, NAMES)


class TestEveryCurriculum:
    def test_probabilities_are_a_distribution(self, make):
        curriculum = make()
        for step in range(8):
            p = curriculum.probabilities()
            assert p.dtype == np.float64
            assert p.shape == (3,)
            assert (p >= 0).all()
            assert p.sum() == pytest.approx(1, abs=1e-12)
            curriculum.update(np.array([0, 1, 2, 0]), [step, 0.5, -1, 0])

    def test_names_positions_and_tensors_mean_the_same(self, make):
        three = [make() for _ in range(3)]
        three[0].update(["hard", "easy", "hard"], [1.0, -2.0, 0.5])
        three[1].update(np.array([2, 0, 2]), np.array([1.0, -2.0, 0.5], dtype=np.float32))
        three[2].update(torch.tensor([2, 0, 2]), torch.tensor([1.0, -2.0, 0.5], dtype=torch.bfloat16))
        for other in three[1:]:
            np.testing.assert_allclose(other.probabilities(), three[0].probabilities(), rtol=1e-6)

    def test_an_empty_update_is_fine(self, make):
        curriculum = make()
        curriculum.update([], [])
        assert np.isfinite(curriculum.probabilities()).all()

    def test_sampling_is_deterministic_and_follows_the_probabilities(self, make):
        curriculum = make()
        curriculum.update([0, 1, 2] * 200, [0.1, 0.2, 0.15] * 200)
        first, second = (curriculum.sample(np.random.default_rng(3), 4000) for _ in range(2))
        assert first == second
        shares = [first.count(name) / 4000 for name in NAMES]
        np.testing.assert_allclose(shares, curriculum.probabilities(), atol=0.03)
        assert curriculum.sample(np.random.default_rng(0), 0) == []

    def test_state_survives_json(self, make):
        curriculum, resumed = make(), make()
        for step in range(4):
            curriculum.update([0, 2], [step, 1.0])
        resumed.load_state_dict(json.loads(json.dumps(curriculum.state_dict())))
        np.testing.assert_array_equal(resumed.probabilities(), curriculum.probabilities())
        assert resumed.state_dict() == curriculum.state_dict()

    def test_state_of_other_sources_is_refused(self, make):
        with pytest.raises(InvalidInputError, match="sources"):
            make().load_state_dict({"names": ["x"]})
        with pytest.raises(InvalidInputError, match="the state has no"):
            make().load_state_dict({"names": NAMES})

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_advantages_must_be_finite(self, make, bad):
        with pytest.raises(InvalidInputError, match="row 1"):
            make().update(["easy", "hard"], [0.0, bad])

    def test_lengths_must_agree(self, make):
        with pytest.raises(InvalidInputError, match="2 sources"):
            make().update(["easy", "hard"], [1.0])

    def test_unknown_source(self, make):
        with pytest.raises(UnknownNameError, match="did you mean 'hard'"):
            make().update(["harder"], [1.0])

    def test_documented(self, make):
        assert "Parameters" in (type(make()).__doc__ or "") or isinstance(make(), Uniform)


def test_fixed_weights():
    np.testing.assert_allclose(FixedWeights(NAMES, [1, 2, 5]).probabilities(), [0.125, 0.25, 0.625])
    np.testing.assert_allclose(
        FixedWeights(NAMES, {"hard": 3, "easy": 1, "middle": 0}).probabilities(), [0.25, 0, 0.75]
    )
    for weights in ([0, 0, 0], [1, -1, 1], [1, 2], [1, 2, float("nan")], {"easy": 1}):
        with pytest.raises(InvalidInputError):
            FixedWeights(NAMES, weights)
    with pytest.raises(UnknownNameError, match="did you mean 'easy'"):
        FixedWeights(NAMES, {"eazy": 1})


def test_easy_to_hard_walks_then_is_uniform():
    curriculum = EasyToHard(NAMES, steps=6, review=0.3)
    seen = []
    for _ in range(8):
        seen.append(curriculum.probabilities())
        curriculum.update(["easy"], [0.0])
    np.testing.assert_allclose(seen[0], [1, 0, 0])
    np.testing.assert_allclose(seen[1], [1, 0, 0])
    np.testing.assert_allclose(seen[2], [0.15, 0.85, 0])
    np.testing.assert_allclose(seen[5], [0.1, 0.1, 0.8])
    np.testing.assert_allclose(seen[6], np.full(3, 1 / 3))
    for options in ({"steps": 0}, {"steps": 2.5}, {"steps": 3, "review": 1.2}):
        with pytest.raises(InvalidInputError):
            EasyToHard(NAMES, **options)


class TestConstruction:
    def test_by_name_alone(self):
        assert isinstance(make_curriculum("uniform", NAMES), Uniform)

    def test_unknown_name_and_option_offer_the_nearest(self):
        with pytest.raises(UnknownNameError, match="did you mean 'easy-to-hard'"):
            make_curriculum("easy_to_hard", NAMES)
        with pytest.raises(UnknownNameError, match="did you mean 'temperature'"):
            make_curriculum({"name": "dump", "temprature": 1}, NAMES)

    def test_missing_name_and_option(self):
        with pytest.raises(InvalidInputError, match="'name'"):
            make_curriculum({"window": 3}, NAMES)
        with pytest.raises(InvalidInputError, match="'steps'"):
            make_curriculum("easy-to-hard", NAMES)

    def test_value_of_the_wrong_type(self):
        with pytest.raises(InvalidInputError, match="window must be an integer"):
            make_curriculum({"name": "dump", "window": "many"}, NAMES)
        with pytest.raises(InvalidInputError, match="temperature must be a number, got 'hot'"):
            make_curriculum({"name": "dump", "temperature": "hot"}, NAMES)

    @pytest.mark.parametrize("names", [[], ["a", "a"], "abc", [1, 2]])
    def test_names(self, names):
        with pytest.raises(InvalidInputError):
            make_curriculum("dump", names)


class TestCurriculumSampler:
    def test_draws_rows_of_the_drawn_source(self):
        sources = np.array(["hard", "easy", "middle", "easy", "hard", "hard"])
        sampler = CurriculumSampler(sources, FixedWeights(NAMES, [1, 0, 3]), np.random.default_rng(0))
        rows, codes = sampler.draw(4000)
        assert [NAMES[c] for c in codes] == sources[rows].tolist()
        np.testing.assert_allclose(np.bincount(codes, minlength=3) / 4000, [0.25, 0, 0.75], atol=0.03)
        inside = np.bincount(rows, minlength=6) / 4000
        np.testing.assert_allclose(inside, [0.25, 0.125, 0, 0.125, 0.25, 0.25], atol=0.03)
        assert sampler.epochs() == {
            "easy": (codes == 0).sum() / 2,
            "middle": 0.0,
            "hard": (codes == 2).sum() / 3,
        }

    def test_probabilities_are_read_at_every_draw(self):
        curriculum = EasyToHard(NAMES, steps=3, review=0.0)
        sampler = CurriculumSampler([0, 1, 2], curriculum, np.random.default_rng(0))
        for source in range(3):
            assert sampler.draw(5)[1].tolist() == [source] * 5
            curriculum.update([source], [1.0])

    def test_resumed_sampler_draws_the_same(self):
        def build():
            return CurriculumSampler([0, 1, 2, 0, 1], make_curriculum("dump", NAMES), np.random.default_rng(5))

        first, resumed = build(), build()
        for _ in range(3):
            _, codes = first.draw(8)
            first.curriculum.update(codes, codes - 1.0)
        resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for expected, found in zip(first.draw(20), resumed.draw(20), strict=True):
            np.testing.assert_array_equal(expected, found)
        assert first.epochs() == resumed.epochs()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda state: state.pop("rng"), "lacks .'rng'"),
            (lambda state: state.update(drawn=[1]), "draws for 3 sources"),
            (lambda state: state["rng"].update(bit_generator="MT19937"), "does not fit this sampler"),
            (lambda state: state["curriculum"].pop("counts"), "does not fit this sampler"),
        ],
    )
    def test_a_damaged_state_is_refused_and_nothing_taken_over(self, change, message):
        def build():
            return CurriculumSampler([0, 1, 2, 0, 1], make_curriculum("dump", NAMES), np.random.default_rng(5))

        state, sampler = build().state_dict(), build()
        sampler.draw(9)
        before = sampler.state_dict()
        change(state)
        with pytest.raises(InvalidInputError, match=message):
            sampler.load_state_dict(state)
        assert sampler.state_dict() == before

    def test_a_source_without_rows_is_refused(self):
        with pytest.raises(InvalidInputError, match="'middle'"):
            CurriculumSampler(["easy", "hard"], Uniform(NAMES), np.random.default_rng(0))
        with pytest.raises(UnknownNameError, match="did you mean 'easy'"):
            CurriculumSampler(["eassy"], Uniform(NAMES), np.random.default_rng(0))
