import pytest
import tiny_models
import torch

from polyreward.errors import InvalidInputError
from polyreward.reward_models.classifier import SequenceClassifier
from polyreward.reward_models.parts import load_reward_model

pytest.importorskip("transformers")
PROMPTS = ["is the cat good ?", "the dog", "a", ""]
ANSWERS = ["the cat is very good .", "not", "a a a a a a a a a a", "fine answer"]


def classifier(labels=1, kind="llama"):
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=labels, **sizes)).eval()
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=64, num_labels=labels, **sizes)).eval()


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("labels", [1, 3])
def test_scores_equal_those_of_one_text_at_a_time(kind, labels):
    tokenizer, network = tiny_models.tokenizer(), classifier(labels, kind)
    model = SequenceClassifier(network, tokenizer, batch_tokens=24)
    found = model.score(PROMPTS, ANSWERS)
    assert found.dtype == torch.float32
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        text = prompt + ("\n" if prompt else "") + answer
        with torch.no_grad():
            logits = network(torch.tensor([tokenizer(text)["input_ids"]])).logits[0]
        expected = logits[0] if labels == 1 else logits.softmax(-1)[-1]
        assert float(found[row]) == pytest.approx(float(expected), abs=1e-6)


def test_a_chat_template_sees_prompt_and_answer_as_turns():
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} . {% endfor %}"
    network = classifier()
    found = SequenceClassifier(network, tokenizer).score(["the cat"], ["good"])
    ids = tokenizer("user : the cat . assistant : good .")["input_ids"]
    assert float(found) == pytest.approx(float(network(torch.tensor([ids])).logits.detach()), abs=1e-6)


def test_a_folder_of_transformers_is_a_reward_model(tmp_path):
    model = SequenceClassifier(classifier(), tiny_models.tokenizer())
    model.save_pretrained(tmp_path)
    again = load_reward_model(tmp_path)
    assert torch.equal(again.score(PROMPTS, ANSWERS), model.score(PROMPTS, ANSWERS))


def test_bad_input_is_named(tmp_path):
    with pytest.raises(InvalidInputError, match="cannot load"):
        SequenceClassifier(str(tmp_path)).score(["a"], ["b"])
    with pytest.raises(InvalidInputError, match="needs its tokenizer"):
        SequenceClassifier(classifier()).score(["a"], ["b"])
    with pytest.raises(InvalidInputError, match="2 prompts and 1 completions"):
        SequenceClassifier(classifier(), tiny_models.tokenizer()).score(["a", "b"], ["b"])
    with pytest.raises(InvalidInputError, match="scores only"):
        SequenceClassifier(classifier(), tiny_models.tokenizer()).fit(None)
