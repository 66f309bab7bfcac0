import json

import numpy as np
import pytest
import torch
from planted_preferences import planted

from polyreward.errors import InvalidInputError, MissingFileError, UnknownNameError
from polyreward.preferences import Preference, PreferenceData
from polyreward.reward_models import LinearHead, PreferenceModel, RewardEnsemble
from polyreward.reward_models.parts import HEADS, compose, load_reward_model, stored_reward

GOOD, BAD = ("good", "kind", "clear"), ("bad", "rude", "vague")


def texts(count=80, rated=False, seed=0):
    """Answers of three words; each good word counts 1, each bad one -1, and the better answer is chosen."""
    rng = np.random.default_rng(seed)
    records = []
    for number in range(count):
        answers = [rng.choice(GOOD + BAD, 3).tolist() for _ in range(2)]
        worth = [sum(1 if word in GOOD else -1 for word in answer) for answer in answers]
        judged = {"ratings": [w + 3 for w in worth]} if rated else {"choice": int(worth[1] > worth[0])}
        if worth[0] != worth[1]:
            records.append(Preference(f"q{number}", [" ".join(a) for a in answers], annotator="ann", **judged))
    return PreferenceData.of(records)


def fitted(data, **names):
    return compose(data, **names).fit(data, epochs=60, batch_size=16, learning_rate=0.02, validation=None)


@pytest.mark.parametrize("head", sorted(HEADS))
def test_every_head_composes_by_its_name(head, tmp_path):
    data = texts()
    model = fitted(data, head=head, options={"encoder": {"width": 64}})
    assert model.evaluate(data)["accuracy"] > 0.85
    model.save_pretrained(tmp_path)
    again = load_reward_model(tmp_path)
    assert torch.equal(again.score(["q"], ["good"]), model.score(["q"], ["good"]))


@pytest.mark.parametrize(
    ("likelihood", "options"),
    [
        ("bradley-terry", {"smoothing": 0.05}),
        ("plackett-luce", {}),
        ("regression", {"kind": "huber"}),
        ("integer", {"family": "dalap", "components": 2}),
        ("integer", {"family": "categorical"}),
    ],
)
def test_every_likelihood_composes_by_its_name(likelihood, options):
    data = texts(rated=likelihood in ("regression", "integer"))
    model = fitted(data, likelihood=likelihood, options={"likelihood": options, "encoder": {"width": 64}})
    assert model.evaluate(data)["accuracy"] > 0.85


def test_members_make_an_ensemble_that_comes_back_with_its_aggregate(tmp_path):
    data = texts()
    model = fitted(data, members=2, options={"ensemble": {"aggregate": "min"}})
    assert isinstance(model, RewardEnsemble)
    model.save_pretrained(tmp_path)
    again = load_reward_model(tmp_path)
    assert again.aggregate == "min"
    assert torch.equal(again.score(["q"], ["good"]), model.score(["q"], ["good"]))


def test_frozen_features_are_cached(tmp_path):
    data = texts()
    fitted(data, cache=tmp_path)
    assert len(list(tmp_path.glob("*/encoder.json"))) == 1


def test_an_interrupted_ensemble_does_not_fit_its_finished_members_again(tmp_path):
    data, encoder, _ = planted()
    options = {"epochs": 4, "batch_size": 64, "validation": None}
    model = PreferenceModel(encoder, LinearHead)
    whole = RewardEnsemble.of(model, 3).fit(data, **options)

    class Stop(Exception):
        pass

    steps = []

    def progress(report, until):
        steps.append(report.step)
        if len(steps) == until:
            raise Stop

    each = 4 * -(-len(data) // 64)
    with pytest.raises(Stop):
        RewardEnsemble.of(model, 3).fit(
            data, checkpoint=tmp_path / "fit", progress=lambda report: progress(report, 2 * each - 3), **options
        )
    steps.clear()
    again = RewardEnsemble.of(model, 3).fit(
        data, checkpoint=tmp_path / "fit", progress=lambda report: progress(report, -1), **options
    )
    assert len(steps) < 2 * each  # the first member and half of the second were done
    rows = np.arange(20)
    assert torch.equal(again.member_scores(rows, rows), whole.member_scores(rows, rows))
    assert not list(tmp_path.iterdir())


class Length:
    """A reward model of one's own."""

    def __init__(self, scale=1.0):
        self.scale = scale

    def score(self, prompts, completions, **columns):
        return self.scale * torch.tensor([float(len(c)) for c in completions])


def test_a_model_of_ones_own_loads_by_its_import_path():
    model = load_reward_model("test_named_models:Length", scale=2.0)
    assert model.score(["", ""], ["a", "abc"]).tolist() == [2.0, 6.0]
    reward = stored_reward("test_named_models:Length", name="length")
    assert reward(["", ""], ["a", "abc"]) == [1.0, 3.0]
    assert reward.__name__ == "length"


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ({"head": "liner"}, UnknownNameError, "unknown head 'liner'.*linear"),
        ({"likelihood": "bradly-terry"}, UnknownNameError, "bradley-terry"),
        ({"encoder": "hashed"}, UnknownNameError, "unknown encoder 'hashed'"),
        ({"options": {"encoder": {"widht": 3}}}, UnknownNameError, "encoder has no option 'widht'.*width"),
        ({"options": {"head": {"bais": True}}}, UnknownNameError, "head has no option 'bais'"),
        ({"options": {"likelihood": {"smoothing": 0.7}}}, InvalidInputError, "likelihood: smoothing must be in"),
        ({"likelihood": "integer"}, InvalidInputError, "likelihood: .*family"),
    ],
)
def test_a_wrong_name_or_option_is_named(names, error, message):
    with pytest.raises(error, match=message):
        compose(texts(), **names)


def test_what_is_no_reward_model_is_refused(tmp_path):
    with pytest.raises(MissingFileError, match="does not exist; expected the folder"):
        load_reward_model(tmp_path / "nothing")
    with pytest.raises(MissingFileError, match=r"no config\.json"):
        load_reward_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidInputError, match="not valid JSON"):
        load_reward_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(InvalidInputError, match="format"):
        load_reward_model(tmp_path)
    with pytest.raises(InvalidInputError, match="cannot be imported"):
        load_reward_model("no_such_module:model")
    with pytest.raises(InvalidInputError, match="without score"):
        load_reward_model("collections:OrderedDict")
