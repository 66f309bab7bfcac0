import copy
from dataclasses import replace

import numpy as np
import pytest
import tiny_thinkers
import torch

from polyreward.errors import InvalidInputError, MissingColumnError, MissingFileError, UnknownNameError
from polyreward.preferences import PreferenceData
from polyreward.reward_models.contract import RewardModel
from polyreward.reward_models.dual_training import DualOptions, train_dual
from polyreward.reward_models.query_token import QueryTokenRewardModel, padded
from polyreward.reward_models.rationale_dropout import RationaleDropout
from polyreward.reward_models.think_then_score import ThinkThenScore
from polyreward.reward_models.thoughts import TextCodec, Thought, ThoughtEncoder, with_thoughts

SHORT = "{prompt} : {response} ."


def thinker(seed=0, **options):
    tokens, query = tiny_thinkers.tokenizer_with_query()
    network = QueryTokenRewardModel(tiny_thinkers.llama(seed=seed), query, tokens.eos_token_id, max_cot_tokens=4)
    return ThinkThenScore(network, TextCodec(tokens, SHORT), **options)


def comparisons(count=16, seed=0):
    rng = np.random.default_rng(seed)
    prompts = [f"the {rng.choice(['cat', 'dog'])} {rng.choice(['sat', 'ran'])}" for _ in range(count)]
    worth = np.stack([rng.permutation(2) for _ in range(count)])
    words = {0: "bad reply", 1: "good answer"}
    return PreferenceData(
        prompts,
        [words[value] for row in worth.tolist() for value in row],
        choice=worth.argmax(axis=1),
        columns={
            "thoughts": [["very good" if v else "very bad" for v in row] for row in worth.tolist()],
            "quality": [["good" if v else "bad" for v in row] for row in worth.tolist()],
        },
        source="made",
    )


def says(prompts, completions, quality, **columns):
    return [float(q in text.split()) for q, text in zip(quality, completions, strict=True)]


@pytest.mark.slow
def test_fits_to_pairs_and_scores_after_its_own_thoughts():
    model, data = thinker(), comparisons(24)
    head = model.network.head.weight.detach().clone()
    model.fit(with_thoughts(data), epochs=20, learning_rate=3e-2, encoder_learning_rate=3e-3)
    assert isinstance(model, RewardModel)
    assert model.history[-1]["accuracy"] == 1
    assert not torch.equal(model.network.head.weight, head)
    scores, thoughts = model.explain(["the cat sat"] * 2, ["good answer", "bad reply"])
    assert scores[0] > scores[1]
    assert all(isinstance(thought, str) for thought in thoughts)
    assert model.as_reward()(["the cat sat"] * 2, ["good answer", "bad reply"]) == pytest.approx(scores.tolist())
    assert model.evaluate(data)["accuracy"] == 1
    assert model.evaluate(with_thoughts(data), own_thoughts=False)["accuracy"] == 1
    assert model.score([], []).shape == (0,)


def test_a_given_thought_is_used_and_none_is_left_out():
    model = thinker(batch_size=2)
    prompts = ["the cat"] * 4
    given = [Thought("good answer", "very good"), "good answer", Thought("good answer"), Thought("good answer", "bad")]
    scores, thoughts = model.explain(prompts, given)
    assert thoughts[0] == "very good"
    assert thoughts[2] is None
    contexts = model.codec.contexts(prompts[:1], ["good answer"])
    assert float(scores[2]) == pytest.approx(float(model.network.score(contexts).detach()), abs=1e-6)
    own = model.network.generate_cot(contexts, 0.0)
    assert float(scores[1]) == pytest.approx(float(model.network.score(contexts, own).detach()), abs=1e-6)
    assert thoughts[1] == model.codec.read(own)[0]
    assert len(set(scores.tolist())) == 4


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_both_members_of_a_pair_have_the_same_layout(p):
    model, data = thinker(), with_thoughts(comparisons(20))
    encoder = ThoughtEncoder(model.network, model.codec, RationaleDropout(p))
    prompts = [data.prompts[i] for i in data.owner.tolist()]
    comparison = torch.from_numpy(data.owner)
    given = torch.from_numpy(encoder.encode(prompts, data.responses))
    bare = torch.from_numpy(encoder.encode(prompts, [Thought(r.response) for r in data.responses]))
    torch.manual_seed(1)
    found = encoder.train()(prompts, data.responses, comparison).detach()
    kept = torch.isclose(found, given, atol=1e-5).all(dim=1)
    dropped = torch.isclose(found, bare, atol=1e-5).all(dim=1)
    assert bool((kept ^ dropped).all())
    assert torch.equal(kept[::2], kept[1::2])
    share = float(kept.float().mean())
    assert share == {0.0: 1.0, 1.0: 0.0}.get(p, share)
    assert p != 0.5 or 0 < share < 1
    apart = ThoughtEncoder(model.network, model.codec, RationaleDropout(0.5, paired=False)).train()
    kept = torch.isclose(apart(prompts, data.responses, comparison).detach(), given, atol=1e-5).all(dim=1)
    assert not torch.equal(kept[::2], kept[1::2])


def test_the_second_stage_raises_the_reward_of_the_thoughts():
    model, data = thinker(), comparisons(16)
    options = {"steps": 30, "pairs": 8, "rollouts": 8, "learning_rate": 1e-2, "bt_weight": 0.5, "max_tokens": 3}
    model.refine(data, says, per_response=["quality"], **options)
    early, late = (np.mean([r["reward"] for r in part]) for part in (model.dual_history[:5], model.dual_history[-5:]))
    assert late > early + 0.3
    assert np.mean([r["accuracy"] for r in model.dual_history[-5:]]) > 0.8
    assert all(np.isfinite(value) for record in model.dual_history for value in record.values())


def test_without_bt_weight_the_head_stays_and_the_states_under_it_move():
    model, data = thinker(), comparisons(8)
    before = copy.deepcopy(model)
    model.refine(
        data, says, ["quality"], steps=5, pairs=4, rollouts=4, learning_rate=1e-2, bt_weight=0.0, weight_decay=0.0
    )
    assert torch.equal(model.network.head.weight, before.network.head.weight)
    given = [Thought(r, "good") for r in data.responses[:4]]
    prompts = data.prompts[:4]
    assert not torch.allclose(model.score(prompts, given), before.score(prompts, given), atol=1e-3)


def test_columns_reach_the_reward_by_response():
    model, data = thinker(), comparisons(6)
    data = replace(data, columns={**data.columns, "level": np.arange(6)})
    seen = []

    def reward(prompts, completions, quality, level, response, **columns):
        seen.append((prompts, quality, level, response))
        return [None] * len(completions)

    model.refine(data, reward, ["quality"], steps=2, pairs=4, rollouts=2)
    for prompts, quality, level, response in seen:
        assert len(prompts) == 4 * 2 * 2
        for prompt, q, index, text in zip(prompts, quality, level, response, strict=True):
            assert prompt == data.prompts[index]
            assert text == {"good": "good answer", "bad": "bad reply"}[q]
    # each pair once before any comes again
    first = seen[0][2][::4] + seen[1][2][::4]
    assert sorted(first[:6]) == list(range(6))
    # a reward that applies nowhere teaches no thought
    assert [record["policy"] for record in model.dual_history] == [0, 0]
    assert [record["undecided"] for record in model.dual_history] == [1, 1]


def test_minibatches_cover_the_batch_once():
    made = []
    for minibatch in (None, 1):
        model = thinker()
        model.refine(
            comparisons(4), says, ["quality"], steps=1, pairs=4, rollouts=4, minibatch=minibatch, learning_rate=0.0,
            bt_weight=1.0, max_tokens=1,
        )  # fmt: skip
        made.append(model.dual_history[0])
    # one token a thought, so that token means add up; nothing moves at rate 0
    assert made[0] == pytest.approx(made[1], abs=1e-6)


class Stop(Exception):
    pass


@pytest.mark.parametrize("stage", ["cold start", "second"])
def test_an_interrupted_fit_goes_on_to_the_same_result(tmp_path, stage):
    data = with_thoughts(comparisons(12))
    cold = {"epochs": 3, "learning_rate": 1e-2, "encoder_learning_rate": 1e-3, "batch_size": 4}
    dual = {"steps": 6, "pairs": 4, "rollouts": 3, "learning_rate": 1e-3, "bt_weight": 0.5, "checkpoint_steps": 2}
    whole = thinker().fit(data, says, dual, ["quality"], **cold)

    def stop(at):
        def report(progress):
            if progress.step == at:
                raise Stop

        return report

    path = tmp_path / "fit.pt"
    broken = {"cold start": ({"progress": stop(5)}, {}), "second": ({}, {"progress": stop(5)})}[stage]
    with pytest.raises(Stop):
        thinker().fit(data, says, {**dual, **broken[1]}, ["quality"], checkpoint=path, **cold, **broken[0])
    model = thinker().fit(data, says, dual, ["quality"], checkpoint=path, **cold)
    assert model.dual_history == whole.dual_history
    for ours, theirs in zip(model.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path, data = tmp_path / "dual.pt", comparisons(4)

    def stop(progress):
        if progress.step == 2:
            raise Stop

    options = {"steps": 4, "pairs": 2, "rollouts": 2, "checkpoint": path, "checkpoint_steps": 1}
    with pytest.raises(Stop):
        thinker().refine(data, says, ["quality"], progress=stop, **options)
    with pytest.raises(InvalidInputError, match="other data, options"):
        thinker().refine(data, says, ["quality"], **{**options, "bt_weight": 0.7})
    with pytest.raises(InvalidInputError, match="other data, options or weights"):
        thinker(seed=1).refine(data, says, ["quality"], **options)
    path.write_bytes(b"no")
    with pytest.raises(InvalidInputError, match="not a readable checkpoint"):
        thinker().refine(data, says, ["quality"], **options)


def test_saved_and_read_back(tmp_path):
    model, data = thinker(temperature=0.0, batch_size=5), with_thoughts(comparisons(8))
    model.fit(data, epochs=2, learning_rate=1e-2, encoder_learning_rate=1e-3)
    model.save_pretrained(tmp_path)
    prompts, answers = ["the cat sat"] * 3, ["good answer", "bad reply", Thought("good answer", "fine")]
    back = ThinkThenScore.from_pretrained(tmp_path)
    assert torch.equal(back.score(prompts, answers), model.score(prompts, answers))
    assert back.history == model.history
    assert (back.batch_size, back.codec.template) == (5, SHORT)
    from polyreward.reward_models.parts import load_reward_model

    assert torch.equal(load_reward_model(tmp_path).score(prompts, answers), model.score(prompts, answers))


def test_a_backbone_of_ones_own_is_passed_back(tmp_path):
    class Letters:
        def contexts(self, prompts, responses):
            return padded([[2 + len(p) % 3, 5 + len(r) % 3] for p, r in zip(prompts, responses, strict=True)])

        def thoughts(self, thoughts):
            return padded([[] if t is None else [3] for t in thoughts])

        def read(self, ids):
            return ids.tolist()

    network = QueryTokenRewardModel(tiny_thinkers.TinyCausal(), 11, max_cot_tokens=2)
    model = ThinkThenScore(network, Letters())
    model.save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match="pass backbone="):
        ThinkThenScore.from_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match="pass codec="):
        ThinkThenScore.from_pretrained(tmp_path, backbone=tiny_thinkers.TinyCausal(seed=3))
    back = ThinkThenScore.from_pretrained(tmp_path, backbone=tiny_thinkers.TinyCausal(seed=3), codec=Letters())
    assert torch.equal(back.score(["p", "pp"], ["a", "bb"]), model.score(["p", "pp"], ["a", "bb"]))
    with pytest.raises(InvalidInputError, match="another architecture"):
        ThinkThenScore.from_pretrained(tmp_path, backbone=tiny_thinkers.TinyCausal(width=4), codec=Letters())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(MissingFileError, match=r"model.safetensors does not exist"):
        ThinkThenScore.from_pretrained(tmp_path, backbone=tiny_thinkers.TinyCausal(), codec=Letters())


def test_an_adapter_learns_beside_the_query_and_nothing_else(tmp_path):
    peft = pytest.importorskip("peft")
    tokens, query = tiny_thinkers.tokenizer_with_query()
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    network = QueryTokenRewardModel(peft.get_peft_model(tiny_thinkers.llama(), lora), query, tokens.eos_token_id, 4)
    frozen = {name: p.clone() for name, p in network.named_parameters() if not p.requires_grad}
    model = ThinkThenScore(network, TextCodec(tokens, SHORT))
    cold = {"epochs": 2, "learning_rate": 1e-2, "encoder_learning_rate": 1e-2}
    model.fit(with_thoughts(comparisons(8)), says, {"steps": 2, "pairs": 4, "rollouts": 2}, ["quality"], **cold)
    for name, parameter in network.named_parameters():
        if name in frozen:
            changed = (parameter != frozen[name]).reshape(len(parameter), -1).any(dim=1).nonzero().flatten().tolist()
            assert changed == ([query] if "embed_tokens" in name else [])
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_thinkers.llama(), str(tmp_path / "backbone"))
    back = ThinkThenScore.from_pretrained(tmp_path, backbone=again)
    assert torch.equal(back.score(["the cat"], ["good answer"]), model.score(["the cat"], ["good answer"]))


def test_texts_are_filled_in_as_they_are():
    tokens, _ = tiny_thinkers.tokenizer_with_query()
    codec = TextCodec(tokens, "{response} is {prompt} .")
    assert codec._filled("the {response}", "{prompt}", 0) == "{prompt} is the {response} ."
    ids = codec.contexts(["the cat"], ["good"])
    assert codec.read(ids) == ["good is the cat ."]
    assert codec.thoughts(["good", None]).tolist() == [[tokens.convert_tokens_to_ids("good"), 1], [-1, -1]]
    with pytest.raises(InvalidInputError, match="once each"):
        TextCodec(tokens, "{prompt}")
    with pytest.raises(InvalidInputError, match="response 1 must be a text"):
        codec.contexts(["a", "b"], ["c", 3])
    # a text that spells the query token out cannot be scored
    with pytest.raises(InvalidInputError, match="holds the query token"):
        thinker().score(["the cat"], ["<reward>"])


def test_wrong_calls():
    model, data = thinker(), comparisons(4)
    with pytest.raises(MissingColumnError, match="no column 'thought'; did you mean 'thoughts'"):
        with_thoughts(data, "thought")
    with pytest.raises(InvalidInputError, match="made, row 1: thoughts must list 2 thoughts, got 'good'"):
        with_thoughts(replace(data, columns={"thoughts": ["good"] * 4}))
    with pytest.raises(UnknownNameError, match="did you mean 'bt_weight'"):
        model.refine(data, says, bt_weights=1.0)
    with pytest.raises(MissingColumnError, match="no column 'qualities'"):
        model.refine(data, says, ["qualities"])
    with pytest.raises(InvalidInputError, match="rollouts must be at least 2"):
        DualOptions(rollouts=1)
    with pytest.raises(InvalidInputError, match="temperature"):
        DualOptions(temperature=0.0)
    with pytest.raises(InvalidInputError, match="steps"):
        DualOptions(steps=0)
    with pytest.raises(InvalidInputError, match="1 values for 8 thoughts"):
        model.refine(data, lambda **_: [1.0], steps=1, pairs=2, rollouts=2)
    with pytest.raises(InvalidInputError, match="infinite"):
        model.refine(data, lambda completions, **_: [float("inf")] * len(completions), steps=1, pairs=2, rollouts=2)
    three = PreferenceData(["p"], ["a", "b", "c"], offsets=[0, 3], choice=[0])
    with pytest.raises(InvalidInputError, match="comparisons of two"):
        model.refine(three, says)
    with pytest.raises(InvalidInputError, match="1 prompts and 2 completions"):
        model.score(["p"], ["a", "b"])
    with pytest.raises(InvalidInputError, match="batch_size"):
        thinker(batch_size=0)
    labels = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(InvalidInputError, match=r"contexts \(2 P, L\)"):
        train_dual(model.network, torch.ones(3, 1, dtype=torch.int64), labels, lambda r, c: [], DualOptions())
