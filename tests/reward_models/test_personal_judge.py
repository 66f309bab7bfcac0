import json

import numpy as np
import pytest
import torch

from endpoint_server import ChatServer, completion
from polyreward.endpoints import ChatClient
from polyreward.errors import InvalidInputError, MissingFileError
from polyreward.preferences import PreferenceData
from polyreward.reward_models.contract import RewardModel
from polyreward.reward_models.evaluation_chains import ChatJudge, EvaluationChain, FormatError
from polyreward.reward_models.model import UnknownAnnotatorWarning
from polyreward.reward_models.personal_judge import PersonalJudge
from polyreward.reward_models.user_prototypes import UserPrototypes
from polyreward.reward_models.user_scaling import UserScaler


def embed(texts):
    """How often a text names the tastes."""
    return np.array([[text.count("long") + 0.01, text.count("short") + 0.01, 0.1] for text in texts], np.float32)


class TasteJudge:
    """Reads from the history whether a user likes long or short responses, and scores by that."""

    def __init__(self, broken=()):
        self.asked, self.broken = [], broken

    def sample(self, query, history, candidates, n, criteria=None):
        self.asked.append((query, tuple(history), tuple(candidates), n, criteria))
        if query in self.broken:
            return [FormatError("broken")] * n
        longer = sum(len(yes) > len(no) for _, yes, no in history)
        taste = "long" if longer * 2 > len(history) else "short" if history else "nothing known"
        sign = {"long": 1, "short": -1}.get(taste, 0)
        scores = [5 + sign * min(len(text), 4) for text in candidates]
        return [EvaluationChain(f"likes {taste}", stated=scores)] * n


def data(per_user=5, users=6):
    prompts, responses, choice, annotators = [], [], [], []
    for user in range(users):
        for number in range(per_user):
            prompts.append(f"q{user}-{number}")
            responses += ["a" * 4, "b"]
            choice.append(user % 2)  # even users like the long one
            annotators.append(f"u{user}")
    return PreferenceData(prompts, responses, choice=choice, annotators=annotators, source="choices")


def made(judge=None, scaler=None, **options):
    scaler = UserScaler(2, 3) if scaler is None else scaler
    prototypes = UserPrototypes(2, refine=False) if scaler.n else None
    return PersonalJudge(judge or TasteJudge(), embed, prototypes, scaler, **options).fit(data())


def test_scores_follow_the_users_taste():
    model = made()
    assert isinstance(model, RewardModel)
    scores = model.score(["q"] * 4, ["cccc", "d", "cccc", "d"], annotator=["u0", "u0", "u1", "u1"])
    # own and neighbours' means add up
    assert scores.tolist() == [18, 12, 2, 8]
    assert model.as_reward()(["q"] * 2, ["cccc", "d"], annotator=["u0", "u0"]) == [18, 12]
    assert model.knows(["u0", "x"]).tolist() == [True, False]
    half = made(scaler=UserScaler(2, 3, (0.5, 0.5)))
    assert half.score(["q"] * 2, ["cccc", "d"], annotator="u0").tolist() == [9, 6]
    alone = made(scaler=UserScaler(4, 0))
    assert alone.score(["q"] * 2, ["cccc", "d"], annotator="u0").tolist() == [9, 6]
    others = made(scaler=UserScaler(0, 3))
    assert others.score(["q"] * 2, ["cccc", "d"], annotator="u0").tolist() == [9, 6]
    assert model.score([], []).shape == (0,)


def test_neighbours_are_like_minded_others_with_their_own_histories():
    judge = TasteJudge()
    model = made(judge)
    assert model.prototypes.users == [f"u{i // 5}" for i in range(30)]
    judge.asked.clear()
    verdict = model.compare("q", ["cccc", "d"], "u0")
    assert [model.prototypes.users[m] for m in verdict.members] == ["u2", "u2", "u2"]
    assert verdict.persona == "likes long"
    assert verdict.own.tolist() == [[9, 6]] * 2
    assert verdict.neighbours.tolist() == [[9, 6]] * 3
    own, *near = judge.asked
    assert own[3] == 2
    assert {query.split("-")[0] for query, _, _ in own[1]} == {"q0"}
    for query, history, candidates, n, _ in near:
        assert (query, n) == ("q", 1)
        assert {q.split("-")[0] for q, _, _ in history} == {"q2"}
        assert candidates == own[2]  # one order for all chains of an item


def test_the_current_choice_is_left_out_by_its_place():
    judge = TasteJudge()
    twice = PreferenceData(
        ["same"] * 4, ["aaaa", "b"] * 4, choice=[0] * 4, annotators=["u"] * 4, rows=np.array([10, 11, 12, 13])
    )
    model = PersonalJudge(judge, scaler=UserScaler(1, 0), history=9).fit(twice)
    for row, shown in ((None, 4), (2, 3), (99, 4)):
        judge.asked.clear()
        model.score(["same"] * 2, ["aaaa", "b"], annotator="u", row=None if row is None else [row] * 2)
        assert len(judge.asked[0][1]) == shown
    # while the prototypes are found every chain sees the others of its user only
    judge.asked.clear()
    PersonalJudge(judge, embed, UserPrototypes(1, refine=False), UserScaler(1, 1), history=9).fit(twice)
    assert [len(history) for _, history, _, _, _ in judge.asked] == [3] * 4


def test_candidates_are_shuffled_once_and_come_back_in_order():
    judge = TasteJudge()
    model = made(judge, scaler=UserScaler(1, 0))
    orders = set()
    for number in range(12):
        judge.asked.clear()
        found = model.compare(f"p{number}", ["c", "cc", "ccc"], "u0").scores
        assert found.tolist() == [6, 7, 8]
        orders.add(judge.asked[0][2])
    assert len(orders) > 3
    # the same item is asked in the same order whatever stands beside it
    scores = model.score(["p1", "x", "p1", "p1"], ["c", "y", "cc", "ccc"], annotator="u0")
    assert scores.tolist()[::2] == [6, 7]
    assert judge.asked[-2][2] in orders


def test_someone_unknown_is_judged_without_history():
    judge = TasteJudge()
    model = made(judge)
    judge.asked.clear()
    with pytest.warns(UnknownAnnotatorWarning, match=r"1 unknown annotators \(x\)"):
        assert model.score(["q"] * 2, ["cccc", "d"], annotator="x").tolist() == [5, 5]
    assert [asked[1] for asked in judge.asked] == [()]
    assert model.score(["q"] * 2, ["cccc", "d"]).tolist() == [5, 5]


def test_what_cannot_be_read_is_missing_and_not_zero():
    model = made(TasteJudge(broken={"bad", "q0-1"}))
    assert model.dropped == [1]
    assert len(model.member_choices) == len(model.prototypes.embeddings) == 29
    scores = model.score(["bad", "bad", "q"], ["cccc", "d", "cccc"], annotator="u0")
    assert torch.isnan(scores[:2]).all()
    assert scores[2] == 18
    assert model.as_reward()(["bad"], ["d"], annotator=["u0"]) == [None]


def test_refined_prototypes_take_the_texts_of_the_choices():
    model = PersonalJudge(TasteJudge(), embed, UserPrototypes(2), UserScaler(1, 2), history=2).fit(data())
    assert model.prototypes.refiner is not None
    assert len(model.prototypes.history) == 1
    assert model.score(["q"] * 2, ["cccc", "d"], annotator="u1").tolist() == [2, 8]


def test_saved_and_read_back(tmp_path):
    model = made()
    model.save_pretrained(tmp_path)
    back = PersonalJudge.from_pretrained(tmp_path, TasteJudge(), embed)
    arguments = (["q"] * 4, ["cccc", "d", "ccc", "dd"], ["u0", "u0", "u1", "u1"])
    assert torch.equal(back.score(*arguments), model.score(*arguments))
    assert back.choices == model.choices
    from polyreward.reward_models.parts import load_reward_model

    again = load_reward_model(tmp_path, judge=TasteJudge(), embed=embed)
    assert torch.equal(again.score(*arguments), model.score(*arguments))
    with pytest.raises(InvalidInputError, match="pass judge="):
        PersonalJudge.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(MissingFileError):
        PersonalJudge.from_pretrained(tmp_path, TasteJudge(), embed)
    made(scaler=UserScaler(1, 0)).save_pretrained(tmp_path / "alone")
    alone = PersonalJudge.from_pretrained(tmp_path / "alone", TasteJudge())
    assert alone.score(["q"] * 2, ["cccc", "d"], annotator="u0").tolist() == [9, 6]


def test_with_a_served_judge():
    def answer(request):
        system, user = (message["content"] for message in request["messages"])
        taste = "long" if "Chosen: aaaa" in system else "short"
        parts = user.split("[Response ")[1:]
        marks = {
            f"response_{i + 1}": 5 + (1 if taste == "long" else -1) * min(len(p[2:].strip()), 4)
            for i, p in enumerate(parts)
        }
        return completion(
            f"Part 1: likes {taste}\nPart 2:\n<JSON_START>{json.dumps({'better_response': marks})}<JSON_END>"
        )

    with ChatServer(answer=answer) as server:
        judge = ChatJudge(ChatClient(server.url, "m", backoff=0.001))
        model = PersonalJudge(judge, embed, UserPrototypes(2, refine=False), UserScaler(2, 1)).fit(data(3, 4))
        assert len(server.requests) == 12
        scores = model.score(["q"] * 4, ["cccc", "d", "cccc", "d"], annotator=["u0", "u0", "u1", "u1"])
        assert scores.tolist() == [18, 12, 2, 8]
        assert len(server.requests) == 12 + 2 * (2 + 1)


def test_wrong_calls():
    with pytest.raises(InvalidInputError, match="pass embed"):
        PersonalJudge(TasteJudge())
    with pytest.raises(InvalidInputError, match="history must be"):
        PersonalJudge(TasteJudge(), scaler=UserScaler(1, 0), history=-1)
    plain = PersonalJudge(TasteJudge(), scaler=UserScaler(1, 0))
    with pytest.raises(InvalidInputError, match="not been fitted"):
        plain.score(["q"], ["a"])
    with pytest.raises(InvalidInputError, match="no annotators"):
        plain.fit(PreferenceData(["q"], ["a", "b"], choice=[0]))
    with pytest.raises(InvalidInputError, match="no known annotator prefers"):
        plain.fit(PreferenceData(["q"], ["a", "b"], choice=[-1], annotators=["u"]))
    with pytest.raises(InvalidInputError, match="takes no options, got epochs"):
        plain.fit(data(), epochs=3)
    plain.fit(data())
    with pytest.raises(InvalidInputError, match="2 prompts and 1 completions"):
        plain.score(["q", "r"], ["a"])
    with pytest.raises(InvalidInputError, match="annotator has 1 entries for 2"):
        plain.score(["q", "r"], ["a", "b"], annotator=["u0"])
    broken = TasteJudge(broken={f"q{u}-{n}" for u in range(6) for n in range(5)})
    with pytest.raises(InvalidInputError, match="none of 30 chains"):
        PersonalJudge(broken, embed, scaler=UserScaler(1, 1)).fit(data())
    with pytest.raises(InvalidInputError, match=r"embed gave shape \(30,\)"):
        PersonalJudge(TasteJudge(), lambda texts: np.zeros(len(texts)), scaler=UserScaler(1, 1)).fit(data())

    class Lazy(TasteJudge):
        def sample(self, *arguments):
            return []

    with pytest.raises(InvalidInputError, match="gave 0 chains, asked for 1"):
        PersonalJudge(Lazy(), scaler=UserScaler(1, 0)).fit(data()).score(["q"], ["a"], annotator="u0")


def test_someone_new_is_remembered_and_in_no_prototype(tmp_path):
    judge = TasteJudge()
    model = made(judge)
    members = list(model.prototypes.users)
    few = PreferenceData(["n-0", "n-1"], ["aaaa", "b"] * 2, choice=[1, 1], annotators=["new"] * 2, source="few")
    assert model.remember(few) is model
    assert model.prototypes.users == members
    verdict = model.compare("q", ["cccc", "d"], "new")
    assert {model.prototypes.users[m] for m in verdict.members} <= {"u1", "u3", "u5"}
    assert len(verdict.members) == 3
    assert verdict.scores.tolist() == [2, 8]
    judge.asked.clear()
    model.score(["n-0"] * 2, ["aaaa", "b"], annotator="new", row=[0, 0])
    assert [query for query, _, _ in judge.asked[0][1]] == ["n-1"]
    model.save_pretrained(tmp_path)
    back = PersonalJudge.from_pretrained(tmp_path, TasteJudge(), embed)
    assert back.compare("q", ["cccc", "d"], "new").scores.tolist() == [2, 8]
    with pytest.raises(InvalidInputError, match="few: the judge has choices of 'new' already"):
        model.remember(few)
    with pytest.raises(InvalidInputError, match="not been fitted"):
        PersonalJudge(TasteJudge(), embed).remember(few)


def test_users_that_are_numbers(tmp_path):
    old = data()
    users = [np.int64(name[1:]) for name in old.annotators]
    numbered = PreferenceData(old.prompts, old.responses, choice=old.choice, annotators=users, source="numbered")
    model = PersonalJudge(TasteJudge(), embed, UserPrototypes(2, refine=False), UserScaler(2, 3)).fit(numbered)
    model.save_pretrained(tmp_path)
    back = PersonalJudge.from_pretrained(tmp_path, TasteJudge(), embed)
    assert back.score(["q"] * 2, ["cccc", "d"], annotator=[0, 0]).tolist() == [18, 12]
    assert back.prototypes.users == [i // 5 for i in range(30)]


def test_what_cannot_be_stored_or_looked_up(tmp_path):
    with pytest.raises(InvalidInputError, match="not been fitted"):
        PersonalJudge(TasteJudge(), embed).save_pretrained(tmp_path / "unfitted")
    assert not (tmp_path / "unfitted").exists()
    pairs = PreferenceData(["q"], ["aaaa", "b"], choice=[0], annotators=[("a", 1)])
    model = PersonalJudge(TasteJudge(), scaler=UserScaler(1, 0)).fit(pairs)
    with pytest.raises(InvalidInputError, match=r"the user \('a', 1\) cannot be stored"):
        model.save_pretrained(tmp_path / "tuple")
    with pytest.raises(InvalidInputError, match="annotator of row 1 is a list"):
        model.score(["q"] * 2, ["cccc", "d"], annotator=["a", ["b"]])
