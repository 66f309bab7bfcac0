from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)

from polyreward.errors import InvalidInputError
from polyreward.rewards import reference_logprobs as module
from polyreward.rewards.reference_logprobs import answer_logprobs, padded, reference_logprobs, score_candidates

VOCABULARY = 64
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEOX = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "shared_expert_intermediate_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MODELS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**COMMON),
    "qwen2": Qwen2Config(**COMMON),
    "qwen3": Qwen3Config(**COMMON, head_dim=8),
    "mistral, window 8": MistralConfig(**COMMON, sliding_window=8),
    "mistral, window 100": MistralConfig(**COMMON, sliding_window=100),
    "gemma2": Gemma2Config(**COMMON, head_dim=8, sliding_window=100),
    "gemma3, window 12": Gemma3TextConfig(**COMMON, head_dim=8, sliding_window=12),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
    "neox": GPTNeoXConfig(**NEOX),
    "opt": OPTConfig(**NEOX, ffn_dim=48, word_embed_proj_dim=32),
    "bloom": BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "mpt": MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4),
    "qwen3-next": Qwen3NextConfig(**(COMMON | {"num_hidden_layers": 4}), head_dim=8, **EXPERTS, **LINEAR),
}


def model_of(name: str = "llama") -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name]).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # opinions, so that a wrong position or mask shows
            parameter.mul_(1 if parameter.ndim < 2 else 4)
    return model


def drawn(seed: int = 0) -> tuple[list[list[int]], list[list[list[int]]], list[list[int]]]:
    generator = torch.Generator().manual_seed(seed)

    def ids(number: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (number,), generator=generator).tolist()

    chains = [[ids(int(n)) for n in torch.randint(0, 9, (4,), generator=generator)] for _ in range(3)]
    chains[0][1] = []
    return [ids(9), ids(4), ids(1)], chains, [ids(3), ids(1), ids(5)]


def naive(model: Any, prompts: Any, chains: Any, answers: Any) -> torch.Tensor:
    """Every chain by itself, without padding."""
    found = torch.zeros(len(prompts), len(chains[0]), max(map(len, answers)))
    for p, (prompt, row, answer) in enumerate(zip(prompts, chains, answers, strict=True)):
        for g, chain in enumerate(row):
            ids = torch.tensor([prompt + chain + answer])
            logp = model(input_ids=ids).logits.float().log_softmax(-1)[0, :-1]
            found[p, g, : len(answer)] = logp.gather(1, ids[0, 1:, None])[-len(answer) :, 0]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_shared_alone_and_in_pieces_are_the_same(name: str) -> None:
    model, (prompts, chains, answers) = model_of(name), drawn()
    with torch.no_grad():
        expected = naive(model, prompts, chains, answers)
    assert expected[expected < 0].std() > 0.3
    for options in ({}, {"share_prefix": False}, {"max_tokens": 25}, {"max_tokens": 1}):
        logp, mask = reference_logprobs(model, prompts, chains, answers, **options)
        assert logp.dtype == torch.float32
        assert (logp - expected).abs().max() < 1e-5, options
        assert mask.sum(dim=-1).tolist() == [[3] * 4, [1] * 4, [5] * 4]
        assert (logp[~mask] == 0).all()
        assert not logp.requires_grad


@pytest.mark.parametrize(("name", "runs"), [("llama", True), ("mistral, window 8", False), ("mpt", False)])
def test_a_shared_prompt_runs_once(name: str, runs: bool) -> None:
    model = model_of(name)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True)
    prompt, chains, answer = [5] * 40, [[[7, i] for i in range(3, 13)]], [[8, 9]]
    reference_logprobs(model, [prompt], chains, answer)
    if runs:
        assert seen == [39, 10 * 5]
    else:
        assert seen[-1] == 10 * 44


def test_gradients_are_the_same_shared_or_alone() -> None:
    model, (prompts, chains, answers) = model_of(), drawn()
    found = []
    for share in (True, False):
        model.zero_grad()
        logp, _ = reference_logprobs(model, prompts, chains, answers, gradient=True, share_prefix=share)
        (logp.exp() * torch.arange(5)).sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    naive_loss = (naive(model, prompts, chains, answers).exp() * torch.arange(5) * _counted(answers)).sum()
    found.append(list(torch.autograd.grad(naive_loss, list(model.parameters()))))
    for shared, alone, plain in zip(*found, strict=True):
        assert torch.allclose(shared, plain, atol=1e-5, rtol=1e-3)
        assert torch.allclose(alone, plain, atol=1e-5, rtol=1e-3)


def _counted(answers: list[list[int]]) -> torch.Tensor:
    return (torch.arange(5) < torch.tensor([len(answer) for answer in answers]).view(-1, 1)).unsqueeze(1)


def test_bfloat16_models_have_a_float32_softmax() -> None:
    model, (prompts, chains, answers) = model_of().bfloat16(), drawn()
    logp, mask = reference_logprobs(model, prompts, chains, answers)
    expected = naive(model, prompts, chains, answers)
    assert logp.dtype == torch.float32
    assert (logp - expected)[mask].abs().max() < 0.1
    assert (logp != logp.bfloat16().float()).any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_tensors(side: str) -> None:
    model, (prompts, chains, answers) = model_of(), drawn()
    expected, _ = reference_logprobs(model, prompts, chains, answers)

    def table(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, rows)) + 2
        ids, mask = torch.full((len(rows), width), 63), torch.zeros(len(rows), width, dtype=torch.int64)
        for row, own in enumerate(rows):
            place = slice(width - len(own), width) if side == "left" else slice(0, len(own))
            ids[row, place], mask[row, place] = torch.tensor(own, dtype=torch.int64), 1
        return ids, mask

    prompt, prompt_mask = table(prompts)
    chain, chain_mask = (part.view(3, 4, -1) for part in table([own for row in chains for own in row]))
    answer, answer_mask = table(answers)
    found, _ = reference_logprobs(
        model, prompt, chain, answer, prompt_mask=prompt_mask, cot_mask=chain_mask, answer_mask=answer_mask
    )
    assert torch.allclose(found, expected, atol=1e-6)
    each = [[own] * 4 for own in answers]
    assert torch.allclose(reference_logprobs(model, prompts, chains, each)[0], expected, atol=1e-6)


def test_modes_of_every_module_come_back() -> None:
    model, (prompts, chains, answers) = model_of(), drawn()
    model.train()
    model.model.layers[0].eval()
    before = [module_.training for module_ in model.modules()]
    reference_logprobs(model, prompts, chains, answers)
    assert [module_.training for module_ in model.modules()] == before


def test_checkpointed_models_are_scored_alone() -> None:
    model, (prompts, chains, answers) = model_of(), drawn()
    expected, _ = reference_logprobs(model, prompts, chains, answers)
    model.gradient_checkpointing_enable()
    model.train()
    assert not module._caches(model)
    logp, _ = reference_logprobs(model, prompts, chains, answers, gradient=True)
    logp.sum().backward()
    assert torch.allclose(logp, expected, atol=1e-5)


def test_adapters_are_looked_through() -> None:
    from peft import LoraConfig, get_peft_model

    model, (prompts, chains, answers) = model_of(), drawn()
    expected, _ = reference_logprobs(model, prompts, chains, answers)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert module._caches(adapted)
    assert torch.allclose(reference_logprobs(adapted, prompts, chains, answers)[0], expected, atol=1e-5)


def test_candidates_may_be_ragged_groups() -> None:
    model = model_of()
    prompts, owners = [[5, 6, 7], [8, 9]], [1, 0, 0, 1, 0]
    suffixes, lengths = [[3, 4], [5], [6, 7, 8], [9], [4, 4, 4, 4]], [1, 1, 2, 1, 3]
    logp, mask = score_candidates(model, prompts, owners, suffixes, lengths)
    assert mask.sum(dim=1).tolist() == lengths
    for row in range(5):
        alone = naive(
            model, [prompts[owners[row]]], [[suffixes[row][: -lengths[row]]]], [suffixes[row][-lengths[row] :]]
        )
        assert torch.allclose(logp[row, : lengths[row]], alone[0, 0], atol=1e-5)


def test_nothing_to_score() -> None:
    logp, mask = reference_logprobs(model_of(), [], [], [])
    assert logp.shape == mask.shape == (0, 0, 0)


def test_answers_of_padded_rows() -> None:
    model = model_of()
    ids, mask = padded([[3, 4, 5, 6], [7, 8]], torch.device("cpu"))
    assert ids.tolist() == [[3, 4, 5, 6], [0, 0, 7, 8]]
    found = answer_logprobs(model, ids, mask, torch.tensor([2, 1]), 3)
    assert found.shape == (2, 3)
    assert torch.allclose(found[1, :1], naive(model, [[7]], [[[]]], [[8]])[0, 0], atol=1e-5)
    assert (found[0, 2], found[1, 1], found[1, 2]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[3]], [[[4]]], [[]]), "prompt 0, sample 0: the answer has no token"),
        (([[]], [[[4], []]], [[5]]), "prompt 0, sample 1: nothing stands before"),
        (([[3]], [[[4], [64]]], [[5]]), "prompt 0, sample 1: token 64 is outside the vocabulary of 64"),
        (([[3]], [[[-1]]], [[5]]), "token -1 is outside"),
        (([[3], [4]], [[[5]]], [[5]]), "2 prompts and 1 groups"),
        (([[3], [4]], [[[5]], [[5], [6]]], [[5], [5]]), r"sizes \[1, 2\]"),
        (([[3]], [[[5], [6]]], [[[5], [5], [5]]]), "one answer a prompt"),
        ((torch.zeros(1, 2, 3, dtype=torch.int64), [[[5]]], [[5]]), "prompt_ids has shape"),
        ((torch.zeros(1, 2), [[[5]]], [[5]]), "prompt_ids has shape"),
    ],
)
def test_errors_name_prompt_and_sample(arguments: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        reference_logprobs(model_of(), *arguments)


def test_masks_go_with_tensors() -> None:
    with pytest.raises(InvalidInputError, match="goes with a tensor"):
        reference_logprobs(model_of(), [[3]], [[[4]]], [[5]], prompt_mask=torch.ones(1, 1))
    with pytest.raises(InvalidInputError, match="mask of prompt_ids has shape"):
        reference_logprobs(model_of(), torch.ones(1, 2).long(), [[[4]]], [[5]], prompt_mask=torch.ones(1, 1))
    with pytest.raises(InvalidInputError, match="max_tokens"):
        reference_logprobs(model_of(), [[3]], [[[4]]], [[5]], max_tokens=0)
