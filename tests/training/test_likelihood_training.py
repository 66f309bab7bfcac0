from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from text_runs import history, policy, tokenizer, trainer
from torch import nn

from polyreward.advantages.parts import WeightedSum
from polyreward.advantages.presets import rloo
from polyreward.errors import InvalidInputError
from polyreward.objectives.likelihood import likelihood_objective
from polyreward.rewards.composition import named
from polyreward.rewards.executor import RewardExecutor
from polyreward.rewards.formats import TagFormat
from polyreward.rewards.reference_likelihood import ReferenceLikelihood, nover, rlpr
from polyreward.training.likelihood import DirectTerm, bind_rewards, wants_policy

CUT = {"answer_prefix": " d ", "answer_suffix": "", "column": "answer"}


def rows(count: int = 8) -> Dataset:
    prompts = ["a b c", "b c a", "c a b", "a a b"]
    answers = ["0 1", "2", "3 4 5", "6 7"]
    return Dataset.from_list([{"prompt": prompts[i % 4], "answer": answers[i % 4]} for i in range(count)])


def one_token(asked: list[Any], trainer: Any) -> dict[str, Any]:
    """Completions: a letter that differs within a group, then the tag that ends the chain."""
    words = trainer.processing_class(asked)["input_ids"]
    letters = trainer.processing_class("e f g h")["input_ids"]
    tag = trainer.processing_class("d")["input_ids"]
    completions = [[letters[i % 4], *tag] for i in range(len(asked))]
    return {"prompt_ids": words, "completion_ids": completions, "logprobs": None}


def run_of(folder: Path, *rewards: Any, args: dict[str, Any] | None = None, **parts: Any) -> Any:
    chosen = {"advantage": rloo(), "objective": likelihood_objective(), "train_dataset": rows()} | parts
    return trainer(folder, reward_funcs=list(rewards), args=args, **chosen)


def sharp() -> nn.Module:
    """A policy with opinions, so that chains differ."""
    model = policy()
    for name, parameter in model.named_parameters():
        parameter.data *= 1 if "norm" in name else 8
    return model


def chain_logp(model: nn.Module, words: list[int], chain: list[int]) -> torch.Tensor:
    ids = torch.tensor([words + chain])
    logp = model(input_ids=ids).logits.float().log_softmax(-1)[0, :-1]
    return logp.gather(1, ids[0, 1:, None])[len(words) - 1 :, 0].sum()


def answer_logp(model: nn.Module, words: list[int], answer: list[int]) -> torch.Tensor:
    ids = torch.tensor([words + answer])
    logp = model(input_ids=ids).logits.float().log_softmax(-1)[0, :-1]
    return logp.gather(1, ids[0, 1:, None])[-len(answer) :, 0].sum()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["log-prob", "prob", "jepo"])
def test_the_gradient_of_the_trainers_loss_is_that_of_the_surrogate(
    tmp_path: Path, kind: str, weight: float, direct: bool
) -> None:
    """Loss -mean_i[A_i log pi(z_i) + R_i] worked with plain forward passes, one sample at a time."""
    reward = ReferenceLikelihood(kind, direct_term=direct, token_floor=-100.0, **CUT)
    run = run_of(
        tmp_path,
        reward,
        args={"reward_weights": [weight]},
        rollout_func=one_token,
        model=sharp(),
        advantage=WeightedSum() if kind == "jepo" else rloo(),
    )
    run.model.train()
    run.current_gradient_accumulation_steps = 2
    inputs = [dict(run.train_dataset[row]) for row in (0, 0, 0, 0, 2, 2, 2, 2)]
    batch = run._prepare_inputs(inputs)
    run.model.zero_grad()
    run._compute_loss(run.model, batch).backward()
    found = [p.grad.clone() for p in run.model.parameters()]

    words = run.processing_class
    losses = []
    for row in (0, 2):
        prompt = words(run.train_dataset[row]["prompt"])["input_ids"]
        answer = words(run.train_dataset[row]["answer"])["input_ids"] + [words.eos_token_id]
        tag = words("d")["input_ids"]
        chains = [words(letter)["input_ids"] + tag for letter in "efgh"]
        own = torch.stack([chain_logp(run.model, prompt, chain) for chain in chains])
        after = torch.stack([answer_logp(run.model, prompt + chain, answer) for chain in chains])
        if kind == "jepo":
            bound = after.logsumexp(0) - math.log(4)
            others = [torch.cat([after[:i], after[i + 1 :]]).logsumexp(0) - math.log(3) for i in range(4)]
            gain = torch.stack([bound - other for other in others]).detach()
            term = (gain * own).sum() + (bound if direct else 0)
            losses.append(-term)  # mean over samples of G times each part
        else:
            value = after.exp() if kind == "prob" else after
            gain = (value - (value.sum() - value) / 3).detach()
            losses.append(-(gain * own + (value if direct else 0)).mean())
    run.model.zero_grad()
    (weight / 2 * torch.stack(losses).mean()).backward()
    largest = max(gradient.abs().max() for gradient in found)
    assert largest > 1e-6
    for gradient, parameter in zip(found, run.model.parameters(), strict=True):
        assert (gradient - parameter.grad).abs().max() < 1e-4 * largest


def test_the_expected_gradient_is_that_of_the_expected_reward(tmp_path: Path) -> None:
    """All pairs of one-letter chains of one prompt, each by its probability, against autograd of E_z[R(z)]."""
    model = policy().double()
    words = tokenizer()
    prompt, answer, tag = words("a b c")["input_ids"], words("0 1")["input_ids"] + [1], words("d")["input_ids"]
    letters = [[token] for token in range(len(words))]

    def pieces() -> tuple[torch.Tensor, torch.Tensor]:
        prefix = torch.tensor([prompt])
        first = model(input_ids=prefix).logits[0, -1].log_softmax(-1)
        after = torch.stack([_plain(model, prompt + z + tag, answer) for z in letters])
        return first, after

    first, after = pieces()
    (first.exp() * after).sum().backward()
    exact = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    first, after = pieces()
    chance, value = first.exp().detach(), after.detach()
    # E over pairs of mean_i[A_i grad log pi(z_i) + grad R_i], A_i = R_i - R_j
    weight = chance * (value - (chance * value).sum())
    (weight * first + chance * after).sum().backward()
    for gradient, parameter in zip(exact, model.parameters(), strict=True):
        assert torch.allclose(gradient, parameter.grad, atol=1e-9)
    # and the same pairs through the library's loss
    from polyreward.objectives.likelihood import LikelihoodPolicyLoss

    model.zero_grad()
    first, after = pieces()
    few = [5, 6, 7]
    total = first.new_zeros(())
    for pair in itertools.product(few, few):
        loss = LikelihoodPolicyLoss()(first[list(pair)][None], after[list(pair)].view(1, 2, 1)).loss
        total = total + (chance[pair[0]] * chance[pair[1]]) * loss
    total.backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    first, after = pieces()
    restricted = chance[few] * chance[few].sum()
    mean = (chance[few] * value[few]).sum() * chance[few]
    (-(restricted * value[few] - mean) * first[few] - restricted * after[few]).sum().backward()
    for gradient, parameter in zip(ours, model.parameters(), strict=True):
        assert torch.allclose(gradient, parameter.grad, atol=1e-9)


def _plain(model: nn.Module, before: list[int], answer: list[int]) -> torch.Tensor:
    ids = torch.tensor([before + answer])
    logp = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
    return logp.gather(1, ids[0, 1:, None])[-len(answer) :, 0].sum()


@pytest.mark.slow
@pytest.mark.parametrize("args", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}])
def test_training_raises_the_log_probability_of_the_reference(tmp_path: Path, args: dict[str, Any]) -> None:
    reward = ReferenceLikelihood("log-prob", **CUT)
    run = run_of(tmp_path, reward, args={"max_steps": 12, "learning_rate": 1e-2} | args, rollout_func=one_token)
    run.train()
    steps = history(run)
    assert steps[-1]["rewards/reference_log_prob/mean"] > steps[0]["rewards/reference_log_prob/mean"] + 2
    assert steps[-1]["direct_term/reference_log_prob"] > steps[0]["direct_term/reference_log_prob"] + 2
    assert steps[0]["reference_log_prob/failed"] == 0
    assert steps[-1]["reference_log_prob/perplexity"] < steps[0]["reference_log_prob/perplexity"]


@pytest.mark.slow
def test_the_policy_samples_and_the_default_loss_works_too(tmp_path: Path) -> None:
    """Completions of an untrained policy seldom have the tag: most chains fail, and the run goes on."""
    reward = ReferenceLikelihood("log-prob", **CUT)
    run = trainer(
        tmp_path, reward_funcs=[reward], train_dataset=rows(), args={"max_completion_length": 12, "max_steps": 3}
    )
    run.train()
    failed = [step["reference_log_prob/failed"] for step in history(run)]
    assert all(0 <= share <= 1 for share in failed)
    assert 0 < sum(failed) < len(failed)
    assert all(math.isfinite(step["loss"]) for step in history(run))


def test_references_travel_with_their_samples_and_keep_their_padding_small(tmp_path: Path) -> None:
    run = run_of(tmp_path, ReferenceLikelihood("log-prob", **CUT), rollout_func=one_token)
    run.model.train()
    inputs = [dict(run.train_dataset[row]) for row in (0, 0, 0, 0, 2, 2, 2, 2)]
    batch = run._prepare_inputs(inputs)
    key = "reference_log_prob/reference_"
    for row in range(8):
        ids = batch[f"{key}ids"][row][batch[f"{key}mask"][row].bool()]
        length = int(batch[f"{key}lengths"][row])
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row]
        answer = {"a b c": "0 1", "c a b": "3 4 5"}[run.processing_class.decode(prompt)]
        assert ids.tolist() == [*prompt.tolist(), *completion.tolist(), *_ids(run, answer), 1]
        assert length == len(answer.split()) + 1


def _ids(run: Any, text: str) -> list[int]:
    return list(run.processing_class(text)["input_ids"])


def test_rows_without_a_reference_and_cut_off_chains_carry_no_weight(tmp_path: Path) -> None:
    data = Dataset.from_list([{"prompt": "a b c", "answer": None}, {"prompt": "c a b", "answer": "3"}])

    def half(asked: list[Any], trainer: Any) -> dict[str, Any]:
        result = one_token(asked, trainer)
        result["completion_ids"] = [ids[:1] if i % 2 else ids for i, ids in enumerate(result["completion_ids"])]
        return result

    run = run_of(tmp_path, ReferenceLikelihood("log-prob", **CUT), TagFormat(), rollout_func=half, train_dataset=data)
    run.model.train()
    run.current_gradient_accumulation_steps = 1
    batch = run._prepare_inputs([dict(data[row]) for row in (0, 0, 0, 0, 1, 1, 1, 1)])
    weights = batch["reference_log_prob/reference_weights"]
    assert sorted(weights.tolist()) == [0, 0, 0, 0, 0, 0, 1, 1]
    term = run._direct_terms[0]
    rows_of = weights.bool()
    by_hand = term.value(run.model, batch)
    only = {name: value[rows_of] for name, value in batch.items() if name.startswith("reference_log_prob/")}
    assert by_hand.item() == pytest.approx(term.value(run.model, only).item() / 4, rel=1e-5)
    none = {name: torch.zeros_like(value) for name, value in only.items()}
    assert term.value(run.model, none).item() == 0


def test_evaluation_has_no_direct_term(tmp_path: Path) -> None:
    run = run_of(tmp_path, ReferenceLikelihood("log-prob", **CUT), rollout_func=one_token)
    run.model.eval()
    batch = run._prepare_inputs([dict(run.train_dataset[0]) for _ in range(4)])
    assert not any("reference_ids" in name for name in batch)


@pytest.mark.slow
def test_a_run_resumes_in_the_middle_of_a_buffer(tmp_path: Path) -> None:
    args = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "steps_per_generation": 2,
        "lr_scheduler_type": "constant",
    }
    whole = run_of(tmp_path / "whole", ReferenceLikelihood("log-prob", **CUT), args=args, rollout_func=one_token)
    whole.train()
    first = run_of(
        tmp_path / "parts", ReferenceLikelihood("log-prob", **CUT), args=args | {"max_steps": 3}, rollout_func=one_token
    )
    first.train()
    second = run_of(tmp_path / "parts", ReferenceLikelihood("log-prob", **CUT), args=args, rollout_func=one_token)
    second.train(resume_from_checkpoint=True)
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


class _NamedReward:
    def __init__(self, reward: Any, name: str) -> None:
        self.reward, self.__name__ = reward, name

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> Any:
        return self.reward(prompts=prompts, completions=completions, **columns)


def test_binding_reaches_through_names_and_compositions() -> None:
    model, words = policy(), tokenizer()
    plain = ReferenceLikelihood("log-prob")
    rewards = [_NamedReward(plain, "mine"), named(plain, "other"), rlpr(), nover(), TagFormat()]
    names = ["mine", "other", "rlpr", "nover", "format"]
    bound, terms = bind_rewards(rewards, names, dict.fromkeys(names, 2.0), model, words)
    assert [isinstance(reward, DirectTerm) for reward in bound] == [True, True, False, False, False]
    assert [term.__name__ for term in terms] == ["mine", "other"]
    assert all(term.factor == 2 and term.reward.model is model for term in terms)
    assert bound[2].members[0].model is model
    assert bound[3].members[1].tokenizer is words
    assert plain.model is None
    assert rewards[0].reward is plain
    assert bound[4] is rewards[4]


def test_a_frozen_scorer_is_left_alone_and_has_no_direct_term() -> None:
    scorer, words = policy(), tokenizer()
    reward = ReferenceLikelihood("prob", model=scorer, tokenizer=words)
    bound, terms = bind_rewards([reward], ["r"], {"r": 1.0}, policy(), words)
    assert bound == [reward]
    assert bound[0].model is scorer
    assert terms == []
    assert not wants_policy(reward)


@pytest.mark.parametrize("reward", [ReferenceLikelihood("prob", direct_term=False), ReferenceLikelihood("nover")])
def test_without_a_direct_term_the_reward_is_only_bound(reward: ReferenceLikelihood) -> None:
    bound, terms = bind_rewards([reward], ["r"], {"r": 1.0}, policy(), tokenizer())
    assert terms == []
    assert bound[0].model is not None


def test_a_composed_direct_term_and_an_executor_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="'sum' composes 'reference_log_prob'"):
        bind_rewards([0.5 * ReferenceLikelihood() + TagFormat()], ["sum"], {"sum": 1.0}, policy(), tokenizer())
    with RewardExecutor(workers=1) as executor:
        wrapped = executor.wrap(ReferenceLikelihood())
        with pytest.raises(InvalidInputError, match="cannot run in an executor"):
            bind_rewards([wrapped], ["r"], {"r": 1.0}, policy(), tokenizer())


def test_sharded_policies_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyreward.training.text.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(InvalidInputError, match="ZeRO-3"):
        run_of(tmp_path, ReferenceLikelihood("log-prob", **CUT))


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    steps = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)),
                *(str(Path(__file__).parent / "likelihood_runs.py"), str(folder)),
            ],
            check=True,
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=300,
        )
        steps.append(json.loads((folder / "history.json").read_text()))
    for one, two in zip(*steps, strict=True):
        for name in ("grad_norm", "direct_term/reference_log_prob", "rewards/reference_log_prob/mean"):
            assert two[name] == pytest.approx(one[name], rel=1e-3), name
