"""The built-in policy: a small decoder and its tokenizer, made here and warm-started by supervised training.

The tokenizer knows single characters, and one token each for task names, markup and the words of its tasks. The decoder
is a Llama of a few hundred thousand parameters. The warm start imitates worked solutions, good ones first and then ones
of mixed quality (`polyreward.tasks.mixture.solution`), which leaves a policy that is weakly competent: it knows how to
call a tool and how to answer, and does neither reliably.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from polyreward.tasks.mixture import Family, compact_prompt, solution, words_of
from polyreward.tasks.tools import TOOLS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_PAD, _END, _UNKNOWN = "<pad>", "<end>", "<unknown>"


def make_tokenizer(tasks: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of characters and known words; decoding gives back the text exactly."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    markup = [mark for name in (*TOOLS, "result", "answer") for mark in (f"<{name}>", f"</{name}>")]
    words = [*markup, *tasks, *words_of(tasks), "error"]
    characters = sorted(set(string.ascii_letters + string.digits + string.punctuation + " \n"))
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([_PAD, _END, _UNKNOWN, *words, *characters]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    longest_first = sorted(words, key=len, reverse=True)
    pattern = "|".join(re.escape(word).replace("\\ ", " ") for word in longest_first) + r"|[\s\S]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_END,
        unk_token=_UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast, *, width: int, layers: int, heads: int, seed: int
) -> PreTrainedModel:
    """A randomly initialised Llama decoder for `tokenizer`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    families: Sequence[Family],
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    noise: float,
    seed: int,
    exclude: frozenset[str] = frozenset(),
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> float:
    """Train `model` in place on worked solutions; return the mean loss of the last 20 steps (nats a token).

    Parameters
    ----------
    noise : in [0, 1], how often a solution guesses, repeats itself or breaks the format
    exclude : prompts that must not be trained on, the held-out ones
    progress : called after each step with its number and loss
    """
    rng = random.Random(seed)
    clean = round(0.7 * steps) * batch
    examples = _examples(tokenizer, families, clean, rng, 0.0, exclude)
    examples += _examples(tokenizer, families, steps * batch - clean, rng, noise, exclude)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    model.train()
    losses: list[float] = []
    for step in range(steps):
        part = examples[step * batch : (step + 1) * batch]
        loss = model(**_collate(part, tokenizer, model.device)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress(step + 1, losses[-1])
    return sum(losses[-20:]) / max(len(losses[-20:]), 1)


def _examples(
    tokenizer: Any, families: Sequence[Family], count: int, rng: random.Random, noise: float, exclude: frozenset[str]
) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompt and solution, families in turn; the tool results are read, not imitated."""
    texts: list[tuple[str, str]] = []
    sources = [family.problems(2 * count // len(families) + 100, rng.randrange(2**31)) for family in families]
    streams = [map(source.__getitem__, range(len(source))) for source in sources]  # iterating twice would restart it
    while len(texts) < count:
        for family, stream in zip(families, streams, strict=True):
            entry = next(e for e in stream if compact_prompt(family.name, e) not in exclude)
            texts.append((compact_prompt(family.name, entry), solution(family.name, entry, rng, noise) + _END))
    texts = texts[:count]
    rng.shuffle(texts)
    prompts = tokenizer([p for p, _ in texts], add_special_tokens=False)["input_ids"]
    solutions = tokenizer([s for _, s in texts], add_special_tokens=False)["input_ids"]
    return list(zip(prompts, solutions, strict=True))


def _collate(examples: Sequence[tuple[list[int], list[int]]], tokenizer: Any, device: Any) -> dict[str, torch.Tensor]:
    width = max(len(prompt) + len(answer) for prompt, answer in examples)
    ids = torch.full((len(examples), width), tokenizer.pad_token_id)
    labels = torch.full((len(examples), width), -100)
    start, stop = tokenizer.convert_tokens_to_ids(["<result>", "</result>"])
    for row, (prompt, answer) in enumerate(examples):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        given, kept = False, []
        for token in answer:
            given = given or token == start
            kept.append(-100 if given else token)
            given = given and token != stop
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(kept)
    return {
        "input_ids": ids.to(device),
        "attention_mask": (ids != tokenizer.pad_token_id).long().to(device),
        "labels": labels.to(device),
    }
