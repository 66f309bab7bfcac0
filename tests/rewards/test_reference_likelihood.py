from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from polyreward.errors import InvalidInputError, MissingColumnError, UnknownNameError
from polyreward.likelihood import jepo_advantages, likelihood_values
from polyreward.rewards.formats import TagFormat
from polyreward.rewards.groups import needs_batch, needs_group
from polyreward.rewards.likelihood import efficiency_reward, nover_perplexity, rank_reward
from polyreward.rewards.reference_encoding import AnswerTemplate, completion_text, encode, share_prefixes
from polyreward.rewards.reference_likelihood import ReferenceLikelihood, nover, rlpr, verifree

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)
MERGES = [("<", "/"), (">", "4"), ("4", "2"), ("th", "ink"), ("t", "h"), ("i", "n"), ("in", "k")]


def byte_pairs() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer in which ">4" is one token, so that the boundary of an answer moves when it is joined."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = ["</", ">4", "42", "th", "in", "ink", "think"]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "<end>", *alphabet, *merged])}
    merges = [("<", "/"), (">", "4"), ("4", "2"), ("t", "h"), ("i", "n"), ("in", "k"), ("th", "ink")]
    inner = Tokenizer(models.BPE(vocabulary, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="<end>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


class Slow:
    """A tokenizer without offsets."""

    is_fast = False

    def __init__(self) -> None:
        self.inner = byte_pairs()
        self.eos_token, self.eos_token_id = self.inner.eos_token, self.inner.eos_token_id

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self.inner(text, add_special_tokens=add_special_tokens)["input_ids"]}


WORDS = byte_pairs()


def scorer() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=120,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=1,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 if parameter.ndim < 2 else 4)
    return model


MODEL = scorer()


def reward(kind: str = "log-prob", **options: Any) -> ReferenceLikelihood:
    return ReferenceLikelihood(kind, model=MODEL, tokenizer=WORDS, **options)


def by_hand(text: str, answer: str, special: bool = True, extra: list[int] | None = None) -> torch.Tensor:
    """Log-probabilities of the tokens of `text` from the first that holds a character of `answer`, its last part."""
    ids = WORDS(text, add_special_tokens=special)["input_ids"]
    offsets = WORDS(text, add_special_tokens=special, return_offsets_mapping=True)["offset_mapping"]
    start = len(text) - len(answer)
    number = sum(last > start for _, last in offsets)
    ids, number = ids + (extra or []), number + len(extra or [])
    row = torch.tensor([ids])
    with torch.no_grad():
        logp = MODEL(input_ids=row).logits.log_softmax(-1)[0, :-1].gather(1, row[0, 1:, None])[:, 0]
    return logp[-number:]


PROMPTS, COMPLETIONS = ["6*7="] * 3, ["hm <answer>41</answer>", "a think <answer>42</answer>", "no end"]


def test_the_reference_stands_where_the_answer_began() -> None:
    found = reward()(PROMPTS, COMPLETIONS, answer=["42"] * 3)
    for chain, value in zip(("hm ", "a think "), found, strict=False):
        expected = by_hand(f"6*7={chain}<answer>42</answer>", "42</answer>").sum().item()
        assert value == pytest.approx(expected, abs=1e-4)


def test_the_token_that_straddles_the_boundary_belongs_to_the_answer() -> None:
    encoded = encode(WORDS, AnswerTemplate(), ["6*7="], ["hm "], ["42"], [True])
    text = [WORDS.decode([token]) for token in encoded.ids[0]]
    assert text[-encoded.lengths[0] :] == [">4", "2", "</", *"answer>"]
    assert encoded.chain_tokens == [3]
    assert text[0] == "<s>"


def test_a_chain_that_is_cut_off_earns_the_floor_at_every_token() -> None:
    length = len(by_hand("6*7=<answer>42</answer>", "42</answer>"))
    assert reward()(PROMPTS, COMPLETIONS, answer=["42"] * 3)[2] == -20 * length
    assert reward("avg-log-prob", token_floor=-7.0)(PROMPTS, COMPLETIONS, answer=["42"] * 3)[2] == -7
    assert reward("prob")(PROMPTS, COMPLETIONS, answer=["42"] * 3)[2] == 0
    assert reward("geo-prob")(PROMPTS[2:], COMPLETIONS[2:], answer=["42"]) == [0]


@pytest.mark.parametrize("kind", ["prob", "avg-prob", "avg-log-prob", "geo-prob"])
def test_kinds(kind: str) -> None:
    tokens = by_hand("6*7=hm <answer>42</answer>", "42</answer>").view(1, 1, -1)
    expected = likelihood_values(tokens, kind=kind).item()
    assert reward(kind)(PROMPTS[:1], COMPLETIONS[:1], answer=["42"])[0] == pytest.approx(expected, rel=1e-4)


def test_the_reference_counts_and_not_what_was_answered() -> None:
    values = reward()(["6*7="] * 2, ["hm <answer>41</answer>", "hm <answer>nothing"], answer=["42"] * 2)
    assert values[0] == pytest.approx(values[1], abs=1e-5)


def test_other_templates() -> None:
    closed = reward(answer_prefix=" = ", answer_suffix="", reasoning_end="</t>")
    found = closed(["p"] * 2, ["so</t> = 1", "so = 1"], answer=["42"] * 2)
    assert found[0] == pytest.approx(by_hand("pso</t> = 42", "42", extra=[2]).sum().item(), abs=1e-4)
    assert found[1] == -20 * 2  # "42" and the end token
    lines = reward(answer_prefix="\nA: ", answer_suffix="", end_token=False)
    assert lines(["p"], ["so\nA: 1"], answer=[42])[0] == pytest.approx(
        by_hand("pso\nA: 42", "42").sum().item(), abs=1e-4
    )


def test_chat_prompts_use_the_template() -> None:
    messages = [{"role": "user", "content": "6*7"}]
    completion = [{"role": "assistant", "content": "hm <answer>1</answer>"}]
    found = reward()([messages], [completion], answer=["42"])
    text = "<user>6*7<bot>hm <answer>42</answer>"
    assert found[0] == pytest.approx(by_hand(text, "42</answer>", special=False).sum().item(), abs=1e-4)
    opened = [*messages, {"role": "assistant", "content": "<think>"}]
    found = reward()([opened], [completion], answer=["42"])
    text = "<user>6*7<assistant><think>hm <answer>42</answer>"
    assert found[0] == pytest.approx(by_hand(text, "42</answer>", special=False).sum().item(), abs=1e-4)


def test_token_ids_of_the_trainer_keep_the_space_and_special_tokens() -> None:
    ids = WORDS(" hm <answer>1<end>", add_special_tokens=False)["input_ids"]
    assert completion_text(WORDS, "6*7=", True, ids) == " hm <answer>1<end>"
    stripped = reward()(["6*7="], ["hm <answer>1"], answer=["42"], completion_ids=[ids])
    assert stripped[0] == pytest.approx(by_hand("6*7= hm <answer>42</answer>", "42</answer>").sum().item(), abs=1e-4)


def test_the_reference_without_a_chain_is_subtracted() -> None:
    debiased = reward("avg-prob", baseline_no_cot=True)
    values = debiased(["p", "p", "q"], ["x<answer>", "<answer>", "yz<answer>"], answer=["1", "1", "2"])
    alone = [by_hand(f"{p}<answer>{a}</answer>", f"{a}</answer>").exp().mean() for p, a in (("p", 1), ("q", 2))]
    with_chain = by_hand("px<answer>1</answer>", "1</answer>").exp().mean()
    assert values[0] == pytest.approx((with_chain - alone[0]).item(), abs=1e-5)
    assert values[1] == pytest.approx(0, abs=1e-6)
    clipped = reward("avg-prob", baseline_no_cot=True, clip_min=0.0)
    batch = clipped.explain(["p", "p", "q"], ["x<answer>", "cut", "yz<answer>"], answer=["1", "1", "2"])
    assert (batch.values >= 0).all()
    assert batch.values[1] == 0
    assert batch.weights.tolist() == (batch.values > 0).tolist()


def test_the_bound_of_a_group() -> None:
    prompts = ["p", "q", "p", "q", "q"]
    completions = ["a<answer>", "b<answer>", "cut", "c<answer>", "dd<answer>"]
    batch = reward("jepo").explain(prompts, completions, answer=["1", "2", "1", "2", "2"])
    singles = np.array(reward("log-prob")(prompts, completions, answer=["1", "2", "1", "2", "2"]))
    for rows in ([0, 2], [1, 3, 4]):
        gain = len(rows) * jepo_advantages(singles[rows])
        assert batch.values[rows] == pytest.approx(gain, rel=1e-5)
        share = np.exp(singles[rows] - singles[rows].max())
        share = len(rows) * share / share.sum()
        assert batch.weights[rows] == pytest.approx(np.where(np.isin(rows, [2]), 0, share), rel=1e-4, abs=1e-9)
    named = reward("jepo")(["p"] * 4, ["a<answer>", "b<answer>"] * 2, answer=["1"] * 4, group=[0, 0, 1, 1])
    assert named[:2] == pytest.approx(named[2:])
    with pytest.raises(InvalidInputError, match="completion 1 is alone"):
        reward("jepo")(["p", "q", "p"], completions[:3], answer=["1"] * 3)


def test_ranks_of_a_group() -> None:
    prompts, completions = ["p"] * 4, ["aaaa<answer>", "b<answer>", "cut", "think<answer>"]
    batch = reward("nover").explain(prompts, completions, answer=["1"] * 4)
    tokens = [by_hand(f"p{c}1</answer>", "1</answer>") for c in completions if c != "cut"]
    logp, lengths = torch.stack(tokens).unsqueeze(0), torch.tensor([[4, 1, 1]])
    ppl = nover_perplexity(logp.double(), reasoning_tokens=lengths)
    expected = rank_reward(ppl) + efficiency_reward(ppl, lengths)
    assert batch.values[[0, 1, 3]] == pytest.approx(expected[0].numpy())
    assert batch.values[2] == 0
    assert not reward("nover").differentiable


def test_presets() -> None:
    assert verifree().kind == "prob"
    assert verifree().differentiable
    options = {"model": MODEL, "tokenizer": WORDS}
    good = "<think>a</think><answer>1</answer>"
    values = rlpr(**options)(["p", "p"], [good, "<answer>1</answer>"], answer=["1", "1"])
    score = reward("avg-prob", baseline_no_cot=True, clip_min=0.0)(["p"], [good], answer=["1"])
    assert values[0] == pytest.approx(0.9 * score[0] + 0.1)
    assert rlpr().__name__ == "rlpr"
    total = nover(**options)(["p"] * 3, [good, "<answer>1</answer>", good], answer=["1"] * 3)
    assert total == pytest.approx([2, 0, 2])  # equal ranks, no one beaten; the malformed one is not ranked
    assert needs_group(nover())
    assert not needs_group(rlpr())
    with pytest.raises(InvalidInputError, match="format_weight"):
        rlpr(format_weight=2)


def test_a_required_format_cuts_off() -> None:
    strict = reward("prob", require=TagFormat())
    values = strict(["p"] * 2, ["<think>a</think><answer>1</answer>", "a<answer>1</answer>"], answer=["1"] * 2)
    assert values[0] > 0
    assert values[1] == 0


def test_one_pass_for_all_prompts_with_shared_beginnings() -> None:
    seen: list[tuple[int, ...]] = []
    handle = MODEL.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        reward()(["p" * 30] * 8, [f"{i}<answer>" for i in range(8)], answer=["1"] * 8)
    finally:
        handle.remove()
    assert len(seen) == 2
    assert seen[0][0] == 1
    assert seen[1][0] == 8
    assert sum(rows * width for rows, width in seen) < 8 * 30


def test_prefixes() -> None:
    ids = [[1, 2, 3, 4, 9], [1, 2, 3, 5, 9], [1, 2, 9, 9], [7, 9]]
    prefixes, owners, suffixes = share_prefixes(ids, [1, 1, 1, 1], ["a", "a", "b", "c"])
    assert prefixes == [[1, 2, 3], [1, 2, 9], [7]]
    assert owners == [0, 0, 1, 2]
    assert suffixes == [[4, 9], [5, 9], [9], [9]]
    same, _, rest = share_prefixes([[1, 2, 3], [1, 2, 3]], [2, 1], ["a", "a"])
    assert (same, rest) == ([[1]], [[2, 3], [2, 3]])


def test_missing_references_do_not_apply() -> None:
    values = reward()(["p"] * 3, ["a<answer>"] * 3, answer=[None, "1", math.nan])
    assert values[0] is None
    assert values[2] is None
    assert values[1] < 0
    assert reward()([], [], answer=[]) == []
    assert reward()(["p"], ["a<answer>"], answer=[None]) == [None]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [("", "is empty"), ("  ", "is empty"), (["4", "2"], "got list"), (True, "got bool"), ({"a": 1}, "got dict")],
)
def test_references_that_cannot_be_used(answer: Any, problem: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"'reference_log_prob': column 'answer', row 1: .*{problem}"):
        reward()(["p"] * 2, ["a<answer>"] * 2, answer=["1", answer])


def test_a_reference_without_a_token() -> None:
    bare = byte_pairs()
    inner = bare.backend_tokenizer
    from tokenizers import normalizers

    inner.normalizer = normalizers.Replace("\u00a4", "")
    silent = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<pad>")
    odd = ReferenceLikelihood(model=MODEL, tokenizer=silent, answer_suffix="")
    with pytest.raises(InvalidInputError, match="row 1: the reference '\u00a4' has no token"):
        odd(["p"] * 2, ["a<answer>"] * 2, answer=["1", "\u00a4"])


def test_slow_tokenizers_find_the_same_answer() -> None:
    args = (AnswerTemplate(), ["6*7=", "p"], ["hm ", ""], ["42", "abc"], [True, False])
    fast, slow = encode(WORDS, *args), encode(Slow(), *args)
    assert fast == slow
    assert encode(Slow(), AnswerTemplate(suffix=""), ["p"], ["a"], [""], [True]).lengths == [0]


def test_text_of_a_model_never_raises() -> None:
    odd = ["", None, 5, [{"role": "tool"}], "<answer>", "\ud83d\ude00<answer>" * 3, "x" * 500 + "<answer>"]
    values = reward()(["p"] * len(odd), odd, answer=["1"] * len(odd))
    assert all(value is not None and math.isfinite(value) for value in values)
    assert values[6] == values[0]  # longer than the model's context counts as cut off
    assert values[4] > values[0]


def test_metrics() -> None:
    logged: dict[str, float] = {}
    reward("prob")(PROMPTS, COMPLETIONS, answer=["42"] * 3, log_metric=logged.__setitem__)
    assert logged["reference_prob/failed"] == pytest.approx(1 / 3)
    assert logged["reference_prob/underflow"] == 0
    means = [by_hand(f"6*7={chain}<answer>42</answer>", "42</answer>").mean().item() for chain in ("hm ", "a think ")]
    assert logged["reference_prob/perplexity"] == pytest.approx(math.exp(-sum(means) / 2), rel=1e-4)
    reward("prob")(["p"], ["a<answer>"], answer=["unlikely " * 9], log_metric=logged.__setitem__)
    assert logged["reference_prob/underflow"] == 1


def test_errors() -> None:
    with pytest.raises(InvalidInputError, match="has no model"):
        ReferenceLikelihood()(["p"], ["a<answer>"], answer=["1"])
    with pytest.raises(MissingColumnError, match="'answer'; did you mean 'answers'"):
        reward()(["p"], ["a"], answers=["1"])
    with pytest.raises(InvalidInputError, match="needs the prompts"):
        reward()(None, ["a<answer>"], answer=["1"])
    with pytest.raises(InvalidInputError, match="both or neither"):
        ReferenceLikelihood(model=MODEL)
    with pytest.raises(UnknownNameError, match="did you mean 'jepo'"):
        ReferenceLikelihood("jeppo")
    with pytest.raises(InvalidInputError, match="no baseline_no_cot"):
        ReferenceLikelihood("nover", baseline_no_cot=True)
    with pytest.raises(InvalidInputError, match="needs an end"):
        ReferenceLikelihood(answer_prefix=" ")
    with pytest.raises(InvalidInputError, match="direct_weight"):
        ReferenceLikelihood(direct_weight=math.inf)
    with pytest.raises(InvalidInputError, match="token_floor"):
        ReferenceLikelihood(token_floor=1.0)
    broken = scorer()
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    with pytest.raises(InvalidInputError, match="NaN for completion 0"):
        ReferenceLikelihood(model=broken, tokenizer=WORDS)(["p"], ["a<answer>"], answer=["1"])


def test_binding_and_pickling() -> None:
    plain = ReferenceLikelihood("prob")
    bound = plain.bind(MODEL, WORDS, {"flag": True})
    assert plain.model is None
    assert bound.model is MODEL
    assert bound.template_options == {"flag": True}
    assert bound.bind(None, None) is bound
    assert pickle.loads(pickle.dumps(plain)) == plain
    assert needs_batch(plain)
    assert not needs_group(plain)
    assert needs_group(ReferenceLikelihood("jepo"))
    assert plain.__name__ == "reference_prob"
