import numpy as np
import pytest
import torch

from polyreward.errors import InvalidInputError, MissingFileError
from polyreward.preferences import PreferenceData
from polyreward.reward_models.digit_ratings import DIGITS, DigitLogits, RatingLogits, answer_tokens
from polyreward.reward_models.model import PreferenceModel
from polyreward.reward_models.ordinal_likelihood import OrdinalHead, OrdinalLikelihood, ordinal_distribution

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "good",
    "poor",
    "fine",
    "answer",
    "reply",
    "Score",
    "Prompt",
    "Response",
    ":",
    ".",
    *DIGITS,
]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def word_tokenizer(words=WORDS):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *words])}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def language_model(kind="llama", seed=0):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=128)).eval()
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, pad_token_id=0, **sizes)).eval()


def encoder(kind="llama", **options):
    return DigitLogits(language_model(kind), word_tokenizer(), name="tiny", **options)


PROMPTS = ["the cat", "a", "the dog the cat a dog"]
TEXTS = ["good", "poor reply . poor", "fine answer"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_the_features_are_the_digits_logits_after_the_template(kind, batch_tokens):
    made = encoder(kind, batch_tokens=batch_tokens)
    network, tokenizer = language_model(kind), word_tokenizer()
    found = made(PROMPTS, TEXTS)
    assert found.shape == (3, 9)
    for row, (prompt, text) in enumerate(zip(PROMPTS, TEXTS, strict=True)):
        whole = made.template.format(prompt=prompt, response=text)
        assert whole.endswith("Score:")
        ids = torch.tensor([tokenizer(whole)["input_ids"]])
        logits = network(ids).logits[0, -1, [tokenizer.convert_tokens_to_ids(d) for d in DIGITS]]
        assert torch.allclose(found[row], logits, atol=1e-5)
    assert np.allclose(made.encode(PROMPTS, TEXTS), found.detach().numpy(), atol=1e-6)
    assert made.encode([], []).shape == (0, 9)


def preferences(count=24):
    prompts = [f"{'the' if i % 2 else 'a'} {'cat' if i % 3 else 'dog'} " + ". " * (i % 5) for i in range(count)]
    return PreferenceData.pairs(prompts, ["good answer"] * count, ["poor reply"] * count)


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_language_model_learns_to_rate(tmp_path, lora):
    base = tmp_path / "base"
    language_model().save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    learns = DigitLogits(str(base), lora=lora)
    before = {name: value.clone() for name, value in learns.state_dict().items()}
    model = PreferenceModel(learns, RatingLogits, OrdinalLikelihood())
    model.fit(
        preferences(), epochs=6, batch_size=8, encoder_learning_rate=1e-2 if lora is None else 5e-2, validation=None
    )
    changed = [name for name, value in learns.state_dict().items() if not torch.equal(value, before[name])]
    assert changed
    if lora is not None:
        assert all("lora" in name for name in changed)
    assert model.history[-1]["loss"] < 0.9 * model.history[0]["loss"]
    prompts, texts = ["the cat"] * 2, ["good answer", "poor reply"]
    good, poor = model.score(prompts, texts).tolist()
    assert 1 <= poor < good <= 9
    assert ordinal_distribution(model, prompts, texts).variance.shape == (2,)
    learns.save_pretrained(tmp_path / "weights")
    model.save_pretrained(tmp_path / "model")
    again = DigitLogits.from_pretrained(tmp_path / "weights")
    again.name = learns.name
    back = PreferenceModel.from_pretrained(tmp_path / "model", encoder=again)
    assert torch.allclose(back.score(prompts, texts), model.score(prompts, texts), atol=1e-5)


def test_a_frozen_model_under_a_head_of_its_own():
    frozen = encoder().requires_grad_(False)
    before = frozen.encode(PROMPTS, TEXTS)
    model = PreferenceModel(frozen, OrdinalHead, OrdinalLikelihood())
    model.fit(preferences(), epochs=10, batch_size=8, learning_rate=0.1, validation=None)
    assert model.evaluate(preferences())["accuracy"] == 1.0
    assert np.array_equal(frozen.encode(PROMPTS, TEXTS), before)


def test_the_end_of_the_template_survives_the_cut():
    short = encoder(max_length=3)
    found = short(["the cat"] * 2, ["good " * 50 + "fine", "poor " * 30 + "fine"])
    assert torch.allclose(found[0], found[1])  # "fine Score :"
    assert not torch.allclose(found[0], short(["the cat"], ["poor"])[0])


def test_texts_with_braces_and_messages_are_read():
    braces = encoder()(["{prompt} {response} {x}"], ["}{ good {}"])
    assert torch.isfinite(braces).all()
    messages = [[{"role": "user", "content": "the cat"}]]
    assert encoder()(messages, [[{"role": "assistant", "content": "good"}]]).shape == (1, 9)


class Doubles:
    """A tokenizer of characters in which 5 is two tokens."""

    unk_token_id = None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [x for c in text for x in ([5, 6] if c == "5" else [ord(c)])]}


def test_ratings_that_are_no_single_tokens_are_refused():
    tokenizer = word_tokenizer()
    assert answer_tokens(tokenizer) == [tokenizer.convert_tokens_to_ids(d) for d in DIGITS]
    assert answer_tokens(tokenizer, ("poor", "fine", "good"), "answer:") == tokenizer.convert_tokens_to_ids(
        ["poor", "fine", "good"]
    )
    with pytest.raises(InvalidInputError, match="the rating '5' is 2 tokens after 'Score:', expected one"):
        answer_tokens(Doubles())
    with pytest.raises(InvalidInputError, match="the rating '10' is 2 tokens"):
        answer_tokens(Doubles(), ("9", "10"))
    with pytest.raises(InvalidInputError, match="the rating '3' is unknown to the tokenizer"):
        answer_tokens(word_tokenizer([w for w in WORDS if w != "3"]))
    with pytest.raises(InvalidInputError, match="the rating 'good' has the same token as 'good'"):
        answer_tokens(tokenizer, ("good", "good"))
    with pytest.raises(InvalidInputError, match="at least two texts"):
        answer_tokens(tokenizer, ("1",))


def test_answers_that_join_the_word_before_are_refused():
    # without a colon, "Score1" is one word of its own
    with pytest.raises(InvalidInputError, match="expected one"):
        answer_tokens(word_tokenizer(), DIGITS, "Score")


def test_wrong_models_and_templates(tmp_path):
    from transformers import LlamaModel

    with pytest.raises(InvalidInputError, match="needs its tokenizer"):
        DigitLogits(language_model())
    with pytest.raises(InvalidInputError, match="no vocabulary head"):
        DigitLogits(LlamaModel(language_model().config), word_tokenizer())
    with pytest.raises(InvalidInputError, match="do not belong together"):
        DigitLogits(language_model(), word_tokenizer([*map(str, range(100, 130)), *WORDS]))
    with pytest.raises(InvalidInputError, match=r"must hold \{response\}"):
        encoder(template="{prompt} Score:")
    with pytest.raises(InvalidInputError, match="double them"):
        encoder(template="{response} {grade} Score:")
    with pytest.raises(MissingFileError, match="holds no model"):
        DigitLogits.from_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match="response 0 must be a text"):
        encoder()(["the"], [3])
