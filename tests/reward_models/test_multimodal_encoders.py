import numpy as np
import pytest
import tiny_models
import tiny_vision_models
import torch

from polyreward.errors import InvalidInputError, MissingFileError, UnknownNameError
from polyreward.preferences import PreferenceData
from polyreward.reward_models.encoders import Encoder
from polyreward.reward_models.heads import LinearHead
from polyreward.reward_models.model import PreferenceModel
from polyreward.reward_models.multimodal_encoders import FineTunedMultimodalEncoder, MultimodalEncoder
from polyreward.reward_models.multimodal_inputs import prompt_keys, read_prompts

QUESTION, IMAGE = tiny_vision_models.question, tiny_vision_models.image


@pytest.fixture(scope="module")
def encoder():
    return MultimodalEncoder(tiny_vision_models.model(), tiny_vision_models.processor(), name="tiny-vlm")


def direct(encoder, prompt, response):
    """The hidden state of the last token, from the model and its processor without any of ours."""
    processor, network = encoder.processor, encoder.model
    picture = prompt[0]["content"][0]["image"]
    text = f"\n\nuser: <image>{prompt[0]['content'][1]['text']}\n\nassistant: {response}"
    batch = processor(text=[text], images=[[picture]], return_tensors="pt")
    with torch.no_grad():
        return network(**batch).last_hidden_state[0, -1].numpy()


def test_features_are_the_hidden_states_of_the_model(encoder):
    assert isinstance(encoder, Encoder)
    prompts = [QUESTION(IMAGE(True)), QUESTION(IMAGE(False), "was the dog"), QUESTION(IMAGE(True, seed=1))]
    responses = ["good", "a poor reply", "bad"]
    found = encoder.encode(prompts, responses)
    assert found.dtype == np.float32
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        assert np.abs(found[row] - direct(encoder, prompt, response)).max() < 1e-5
    assert np.abs(found[0] - encoder.encode([QUESTION(IMAGE(False))], ["good"])[0]).max() > 1e-3


def test_images_texts_and_their_mixture_give_the_same_features_in_any_batch(encoder):
    single = MultimodalEncoder(encoder.model, encoder.processor, name="tiny-vlm", batch_tokens=1)
    two = [{"role": "user", "content": [*QUESTION(IMAGE(True))[0]["content"], *QUESTION(IMAGE(False))[0]["content"]]}]
    prompts = ["the cat is", QUESTION(IMAGE(True)), two, [{"role": "user", "content": "the dog"}], "the cat is"]
    responses = ["good", "bad", "fine", "poor", ""]
    found = encoder.encode(prompts, responses)
    assert np.abs(found - single.encode(prompts, responses)).max() < 1e-5
    order = [3, 0, 4, 2, 1]
    again = encoder.encode([prompts[i] for i in order], [responses[i] for i in order])
    assert np.abs(found[order] - again).max() < 1e-5
    assert encoder.encode([], []).shape == (0, 16)
    assert encoder.encode_prompts([]).shape == (0, 16)
    # a response without text is read at the end of its prompt
    assert np.abs(found[4] - encoder.encode_prompts(["the cat is"])[0]).max() < 1e-5


@pytest.mark.parametrize("form", ["array", "floats", "path", "part with path", "tensor"])
def test_an_image_in_any_form_is_the_same(encoder, form, tmp_path):
    picture = IMAGE(True)
    picture.save(tmp_path / "image.png")
    part = {
        "array": {"image": np.asarray(picture)},
        "floats": {"image": np.asarray(picture) / 255},
        "path": {"image": str(tmp_path / "image.png")},
        "part with path": {"path": tmp_path / "image.png"},
        "tensor": {"image": torch.from_numpy(np.asarray(picture).copy())},
    }[form]
    prompt = [{"role": "user", "content": [{"type": "image", **part}, {"type": "text", "text": "is the cat"}]}]
    assert np.array_equal(encoder.encode([prompt], ["good"]), encoder.encode([QUESTION(picture)], ["good"]))


def test_gray_images_become_colour(encoder):
    gray = np.asarray(IMAGE(True))[:, :, 0]
    both = [gray, gray[:, :, None]]
    found = encoder.encode([QUESTION(one) for one in both], ["good"] * 2)
    colour = encoder.encode([QUESTION(np.repeat(gray[..., None], 3, axis=-1))], ["good"])
    assert np.array_equal(found, np.repeat(colour, 2, axis=0))


def test_control_tokens_in_texts_are_taken_out(encoder):
    prompts = [QUESTION(IMAGE(True)), "the cat"]
    dirty = [QUESTION(IMAGE(True), "is <image>the cat"), "the <im<image>age>cat"]
    assert np.array_equal(
        encoder.encode(prompts, ["good", "bad"]), encoder.encode(dirty, ["<image>good", "bad<image>"])
    )


@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_padding_side_of_the_tokenizer_does_not_matter(encoder, padding):
    processor = tiny_vision_models.processor()
    processor.tokenizer.padding_side = padding
    other = MultimodalEncoder(encoder.model, processor, name="tiny-vlm")
    prompts, responses = [QUESTION(IMAGE(True)), "the"], ["good", "a very poor reply"]
    assert np.array_equal(other.encode(prompts, responses), encoder.encode(prompts, responses))


def test_a_chat_template_is_used_where_there_is_one(encoder):
    processor = tiny_vision_models.processor()
    template = (
        "{% for m in messages %}{{ m['role'] }} : {% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %} . {% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}"
    )
    processor.chat_template = template
    prompt = read_prompts(processor, [QUESTION(IMAGE(True))])[0]
    words = processor.tokenizer.convert_ids_to_tokens(prompt.ids)
    assert words == ["user", ":", *["<image>"] * 4, "is", "the", "cat", ".", "assistant", ":"]
    assert prompt.media["pixel_values"].shape == (1, 3, 8, 8)


def test_a_language_model_with_its_tokenizer_will_do():
    texts = MultimodalEncoder(tiny_models.model(), tiny_models.tokenizer(), name="tiny")
    assert texts.encode(["the cat"], ["good"]).shape == (1, 16)
    with pytest.raises(InvalidInputError, match=r"prompt 0 holds images, and .* reads only texts"):
        texts.encode([QUESTION(IMAGE(True))], ["good"])


@pytest.mark.parametrize(
    ("prompt", "response", "message"),
    [
        (7, "good", "prompt 0 must be a text or a list of chat messages, got int"),
        ([{"role": "user", "content": [{"type": "sound"}]}], "good", "prompt 0: a part must be"),
        (QUESTION("nowhere.png"), "good", "there is no image nowhere.png"),
        (QUESTION(np.zeros((2, 2, 2, 2))), "good", "an image must be"),
        (QUESTION(np.full((8, 8, 3), 2.0)), "good", "must be in .0, 1."),
        (QUESTION(np.full((8, 8, 3), 300)), "good", "must be in 0..255"),
        (QUESTION(object()), "good", "PIL image, array or path, got object"),
        ("the", [{"role": "assistant", "content": [{"type": "image", "image": "x"}]}], "response 0 holds an image"),
        ("the", 3, "response 0 must be a text"),
    ],
)
def test_what_cannot_be_read(encoder, prompt, response, message):
    with pytest.raises((InvalidInputError, MissingFileError), match=message):
        encoder.encode([prompt], [response])


def test_a_file_that_is_no_image(encoder, tmp_path):
    (tmp_path / "image.png").write_text("no image")
    with pytest.raises(InvalidInputError, match="is no image"):
        encoder.encode([QUESTION(str(tmp_path / "image.png"))], ["good"])


def test_parts_that_do_not_belong_together():
    with pytest.raises(InvalidInputError, match="needs its processor"):
        FineTunedMultimodalEncoder(tiny_vision_models.model())
    with pytest.raises(InvalidInputError, match="do not belong together"):
        FineTunedMultimodalEncoder(tiny_models.model(vocabulary=8), tiny_models.tokenizer())
    with pytest.raises(InvalidInputError, match="cannot load 'no/such/folder'"):
        FineTunedMultimodalEncoder("no/such/folder")
    with pytest.raises(UnknownNameError, match="unknown resp_repr 'middle'"):
        MultimodalEncoder(tiny_models.model(), tiny_models.tokenizer(), "middle")
    with pytest.raises(InvalidInputError, match="needs MultimodalEncoder"):
        _ = MultimodalEncoder(tiny_models.model(), tiny_models.tokenizer()).identity


def test_prompts_with_images_are_never_cut():
    short = MultimodalEncoder(tiny_vision_models.model(), tiny_vision_models.processor(), max_length=8, name="tiny")
    with pytest.raises(InvalidInputError, match="a prompt with images cannot be cut"):
        short.encode([QUESTION(IMAGE(True))], ["good"])


def test_equal_images_are_the_same_prompt():
    array = np.asarray(IMAGE(True))
    keys = prompt_keys([QUESTION(IMAGE(True)), QUESTION(IMAGE(True)), QUESTION(IMAGE(False)), QUESTION(array), "text"])
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4
    texts = np.array(["the cat", "the dog", "the cat"])
    # an array hands out texts that live no longer than a moment
    assert [key == prompt_keys(["the cat"])[0] for key in prompt_keys(texts)] == [True, False, True]


def preferences(count=24):
    prompts = [QUESTION(IMAGE(i % 2 == 0, seed=i)) for i in range(count)]
    responses = [text for i in range(count) for text in (("good", "bad") if i % 2 == 0 else ("bad", "good"))]
    return PreferenceData(prompts, responses, choice=np.zeros(count, int))


@pytest.mark.parametrize("lora", [None, {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}])
def test_a_model_of_images_learns_and_survives_saving(tmp_path, lora):
    base = tmp_path / "base"
    tiny_vision_models.model().save_pretrained(base)
    tiny_vision_models.processor().save_pretrained(base)
    learns = FineTunedMultimodalEncoder(str(base), lora=lora, max_length=64)
    model = PreferenceModel(learns, LinearHead)
    rate = 1e-3 if lora is None else 1e-2
    model.fit(preferences(), epochs=16, batch_size=8, encoder_learning_rate=rate, learning_rate=1e-2, validation=None)
    assert model.history[-1]["loss"] < 0.5 * model.history[0]["loss"]
    held = [QUESTION(IMAGE(i % 2 == 0, seed=100 + i)) for i in range(4)]
    good, bad = model.score(held, ["good"] * 4), model.score(held, ["bad"] * 4)
    assert (good > bad).tolist() == [True, False, True, False]
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "encoder" / "adapter_config.json").exists() == (lora is not None)
    back = PreferenceModel.from_pretrained(tmp_path / "model")
    assert torch.allclose(back.score(held, ["good"] * 4), good, atol=1e-5)
    assert back.encoder.settings == learns.settings
    with pytest.raises(MissingFileError, match=r"there is no reading.json"):
        FineTunedMultimodalEncoder.from_pretrained(base)


def test_images_as_patches_with_numbers_for_each_token():
    processor = tiny_vision_models.QwenProcessor()
    network = tiny_vision_models.qwen(processor)
    encoder = MultimodalEncoder(network, processor, name="tiny-qwen")
    prompts = [QUESTION(IMAGE(True)), QUESTION(IMAGE(False)), "the cat"]
    responses = ["good", "a poor reply", "bad"]
    found = encoder.encode(prompts, responses)
    single = MultimodalEncoder(network, processor, name="tiny-qwen", batch_tokens=1)
    assert np.abs(found - single.encode(prompts, responses)).max() < 1e-5
    text = "\n\nuser: <|image_pad|>is the cat\n\nassistant: good"
    with torch.no_grad():
        states = network(**processor([text], [[IMAGE(True)]], "pt")).last_hidden_state
    assert np.abs(found[0] - states[0, -1].numpy()).max() < 1e-5
    # read together, the first response is read as alone
    together = FineTunedMultimodalEncoder(network, processor, together=True, order="given", name="tiny-qwen").eval()
    rows = together.read([prompts[0]] * 2, ["good", "bad"], [[0, 1]])
    assert np.abs(rows[0].detach().numpy() - found[0]).max() < 1e-5


def test_the_plain_modules_take_images_too():
    from polyreward.reward_models.base_reward import ScalarRewardModel
    from polyreward.reward_models.multi_response import MultiResponseRewardModel
    from polyreward.reward_models.multi_response_batch import MultiResponseCollator
    from polyreward.reward_models.reward_head import RewardHead

    processor, network = tiny_vision_models.processor(), tiny_vision_models.model()
    seen = processor(text=["<image>the cat"], images=[[IMAGE(True)]], return_tensors="pt")
    batch = MultiResponseCollator(60, shuffle=False)([(seen["input_ids"][0].tolist(), [[5], [6, 7]], [1, 2])])
    head = RewardHead(16)
    together = MultiResponseRewardModel(network, head, scale_dot=False, sep_token_id=60)
    scores = together(**batch, pixel_values=seen["pixel_values"])
    assert scores.shape == (1, 2)
    ids = torch.tensor([[*seen["input_ids"][0].tolist(), 5]])
    alone = ScalarRewardModel(network, head)(ids, pixel_values=seen["pixel_values"])
    assert torch.allclose(alone, scores[:, 0], atol=1e-5)
    other = processor(text=["<image>the cat"], images=[[IMAGE(False)]], return_tensors="pt")
    assert not torch.allclose(together(**batch, pixel_values=other["pixel_values"]), scores, atol=1e-3)
    group = together.score_group(seen["input_ids"][0], [[5], [6, 7]], pixel_values=seen["pixel_values"])
    assert torch.allclose(group, (scores[0] - scores[0].mean()).detach(), atol=1e-5)
