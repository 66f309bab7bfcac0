import numpy as np
import pytest
import tiny_models
import torch

from polyreward.errors import InvalidInputError, MissingFileError
from polyreward.preferences import PreferenceData
from polyreward.reward_models.encoders import Encoder
from polyreward.reward_models.fine_tuning import FineTunedEncoder
from polyreward.reward_models.heads import LinearHead, TwoLayerHead
from polyreward.reward_models.likelihoods import PlackettLuce
from polyreward.reward_models.model import PreferenceModel

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def preferences(count=24):
    prompts = [f"{'the' if i % 2 else 'a'} {'cat' if i % 3 else 'dog'} " + "was " * (i % 5) for i in range(count)]
    return PreferenceData.pairs(prompts, ["a good answer"] * count, ["a poor reply"] * count)


def encoder(**options):
    return FineTunedEncoder(tiny_models.model(), tiny_models.tokenizer(), name="tiny", **options)


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_encoder_learns_with_the_head(lora):
    learns = encoder(lora=lora)
    assert isinstance(learns, Encoder)
    before = {name: value.clone() for name, value in learns.state_dict().items()}
    data = preferences()
    model = PreferenceModel(learns, LinearHead)
    model.fit(data, epochs=4, batch_size=8, encoder_learning_rate=3e-3, learning_rate=1e-2, validation=None)
    changed = {name for name, value in learns.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    if lora is not None:
        assert all("lora" in name for name in changed)
    assert model.history[-1]["loss"] < 0.5 * model.history[0]["loss"]
    good, bad = model.score(["the cat", "the cat"], ["a good answer", "a poor reply"]).tolist()
    assert good > bad


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_fine_tuned_model_survives_saving(tmp_path, lora):
    base = tmp_path / "base"
    tiny_models.model().save_pretrained(base)
    tiny_models.tokenizer().save_pretrained(base)
    model = PreferenceModel(FineTunedEncoder(str(base), lora=lora, pooling="mean", max_length=32), TwoLayerHead)
    model.fit(preferences(12), epochs=2, batch_size=4, encoder_learning_rate=1e-2)
    model.save_pretrained(tmp_path / "model")
    back = PreferenceModel.from_pretrained(tmp_path / "model")
    prompts, texts = ["the cat"] * 3, ["a good answer", "a poor reply", "fine"]
    assert torch.allclose(back.score(prompts, texts), model.score(prompts, texts), atol=1e-6)
    assert back.encoder.settings == model.encoder.settings
    assert (tmp_path / "model" / "encoder" / "adapter_config.json").exists() == (lora is not None)
    # what was read back learns on
    weights = {name: value.clone() for name, value in back.encoder.state_dict().items()}
    back.fit(preferences(12), epochs=1, batch_size=4, encoder_learning_rate=1e-2)
    assert any(not torch.equal(value, weights[name]) for name, value in back.encoder.state_dict().items())


def test_features_do_not_depend_on_the_passes():
    whole, single = encoder(), encoder(batch_tokens=1)
    data = preferences(6)
    prompts = [data.prompts[i] for i in data.owner]
    assert np.abs(whole.encode(prompts, data.responses) - single.encode(prompts, data.responses)).max() < 1e-5
    assert torch.allclose(whole(prompts, data.responses), single(prompts, data.responses), atol=1e-5)
    assert whole.encode([], []).shape == (0, 16)
    assert whole.encode_prompts(["the cat"]).shape == (1, 16)


def test_an_interrupted_fine_tuning_goes_on_to_the_same_result(tmp_path):
    options = {"epochs": 2, "batch_size": 6, "checkpoint_steps": 1, "encoder_learning_rate": 1e-3}
    straight = PreferenceModel(encoder(lora={**LORA, "lora_dropout": 0.2}), LinearHead(16)).fit(
        preferences(), **options
    )

    def stop(progress):
        if progress.step == 5:
            raise KeyboardInterrupt

    path = tmp_path / "fit.pt"
    with pytest.raises(KeyboardInterrupt):
        PreferenceModel(encoder(lora={**LORA, "lora_dropout": 0.2}), LinearHead(16)).fit(
            preferences(), checkpoint=path, progress=stop, **options
        )
    # only what learns is in the checkpoint
    assert path.stat().st_size < 60_000
    resumed = PreferenceModel(encoder(lora={**LORA, "lora_dropout": 0.2}), LinearHead(16)).fit(
        preferences(), checkpoint=path, **options
    )
    texts = ["a good answer", "a poor reply"]
    assert torch.equal(resumed.score(["a cat"] * 2, texts), straight.score(["a cat"] * 2, texts))


def test_lists_train_in_one_pass_each():
    data = PreferenceData(
        ["the cat", "the dog"], ["good", "bad", "fine", "good", "poor"], [0, 3, 5], ranks=[1, 3, 2, 1, 2]
    )
    model = PreferenceModel(encoder(), LinearHead, PlackettLuce())
    model.fit(data, epochs=30, encoder_learning_rate=3e-3, learning_rate=1e-2, validation=None)
    assert model.evaluate(data)["accuracy"] == 1.0


def test_accelerate_drives_the_same_fit():
    from accelerate import Accelerator

    options = {"epochs": 2, "batch_size": 6, "encoder_learning_rate": 1e-3, "validation": None}
    plain = PreferenceModel(encoder(), LinearHead(16)).fit(preferences(12), **options)
    driven = PreferenceModel(encoder(), LinearHead(16)).fit(
        preferences(12), accelerator=Accelerator(cpu=True), **options
    )
    texts = ["a good answer", "a poor reply"]
    assert torch.allclose(driven.score(["a cat"] * 2, texts), plain.score(["a cat"] * 2, texts), atol=1e-6)


def test_missing_parts(tmp_path):
    with pytest.raises(InvalidInputError, match="needs its tokenizer"):
        FineTunedEncoder(tiny_models.model())
    with pytest.raises(InvalidInputError, match="do not belong together"):
        FineTunedEncoder(tiny_models.model(vocabulary=8), tiny_models.tokenizer())
    with pytest.raises(MissingFileError, match="holds no model"):
        FineTunedEncoder.from_pretrained(tmp_path)


def trl_model(seed=3):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, pad_token_id=0, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, num_labels=1,
    )  # fmt: skip
    return LlamaForSequenceClassification(config)


@pytest.mark.slow
@pytest.mark.parametrize("centering", [None, 0.05])
@pytest.mark.parametrize("with_margin", [False, True])
def test_the_loss_and_its_gradient_are_those_of_trl(tmp_path, centering, with_margin):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    from polyreward.data.preferences import read_preferences
    from polyreward.reward_models.comparisons import ComparisonTable
    from polyreward.reward_models.fitting import Network, Source
    from polyreward.reward_models.likelihoods import BradleyTerry

    rows = [
        {"prompt": "the cat ", "chosen": "sat .", "rejected": "ran very"},
        {"prompt": "a dog was ", "chosen": "good", "rejected": "not a good answer ."},
        {"prompt": "the ", "chosen": "reply is fine", "rejected": "bad"},
    ]
    if with_margin:
        rows = [row | {"margin": margin} for row, margin in zip(rows, (0.5, 2.0, 0.0), strict=True)]
    peer, tokenizer = trl_model(), tiny_models.tokenizer()
    config = RewardConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, center_rewards_coefficient=centering,
        per_device_train_batch_size=3, disable_dropout=True, max_length=None, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = RewardTrainer(peer, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    batch = dict(trainer.data_collator([trainer.train_dataset[i] for i in range(3)]))
    peer.zero_grad()
    theirs = trainer.compute_loss(peer, batch)
    theirs.backward()

    ours = trl_model()
    # TRL ends every example with the end of text
    ended = [row | {side: f"{row[side]}<eos>" for side in ("chosen", "rejected")} for row in rows]
    data = read_preferences(ended)
    table = ComparisonTable(data)
    head = LinearHead(16)
    head.linear.weight = ours.score.weight
    learns = FineTunedEncoder(ours.model, tokenizer, name="tiny")
    network = Network(head, BradleyTerry(centering=centering or 0.0), (), learns).train()
    loss, metrics = network(Source(table, texts=(data.prompts, data.responses)), np.arange(3), "cpu")
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(theirs.detach()), abs=1e-6)
    assert torch.allclose(head.linear.weight.grad, peer.score.weight.grad, atol=1e-6)
    gradients = dict(ours.model.named_parameters())
    for name, parameter in peer.model.named_parameters():
        assert torch.allclose(gradients[name].grad, parameter.grad, atol=1e-6), name
    assert metrics["accuracy"] == trainer._metrics["train"]["accuracy"][-1]
