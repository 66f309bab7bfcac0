"""All responses of a prompt judged in one forward pass, against one pass for each, on two tasks made for it.

Claim: a reward model that reads all responses behind one prompt is up to N times cheaper than one that reads each
alone, and more accurate, because later responses are seen beside earlier ones: 71.2 on the mean of six benchmarks
against 66.9 of the best open model that is not (You Only Judge Once, arXiv 2604.10966).

The tasks. Four responses of four tokens behind eight tokens of prompt. "absolute": the last token of the prompt is a
key, and the best response holds it most often; each response can be judged alone. "consensus": each response ends in
one of 16 answers, of which exactly two agree, and the best are these two. One that sees a response alone can at most
give all the same score and pick one in two; by symmetry a fixed ranking of the answers finds an agreeing one in a third
of the sets. A causal reader of all four can score a response high iff it repeats an earlier answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import require
from polyreward.preferences import PreferenceData
from polyreward.reward_models.heads import Items, run_head
from polyreward.reward_models.model import PreferenceModel
from polyreward.reward_models.multi_response import MultiResponseRewardModel, flops_ratio, order_consistency
from polyreward.reward_models.multi_response_batch import MultiResponseCollator
from polyreward.reward_models.multimodal_encoders import FineTunedMultimodalEncoder
from polyreward.reward_models.one_pass import one_pass_model
from polyreward.reward_models.reward_head import RewardHead
from polyreward.studies.base import (
    Figures,
    Judgement,
    Study,
    StudyConfig,
    Verdict,
    arm,
    best_rate,
    paired_bootstrap,
    rated,
)

SYMBOLS, RESPONSES, PROMPT, LENGTH = 16, 4, 8, 4
WIDTH, LAYERS, HEADS, HIDDEN = 64, 2, 4, 1024
STEPS, BATCH, TEST = 500, 64, 1000
RATES = (1e-3, 2e-3)
SIZES = ((256, 32, 4), (256, 32, 8), (512, 16, 4), (64, 64, 4))
REPEATS, PROMPTS_TIMED = 5, 4
TASKS = ("absolute", "consensus")
NAMES = {True: "together", False: "one by one"}


def absolute(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts (count, 8), responses (count, 4, 4) and ranks (count, 4): most often the key is best."""
    prompts = rng.integers(SYMBOLS, size=(count, PROMPT))
    key = prompts[:, -1, None, None]
    counts = rng.permuted(np.broadcast_to(np.arange(LENGTH + 1), (count, LENGTH + 1)), axis=1)[:, :RESPONSES]
    places = rng.permuted(np.broadcast_to(np.arange(LENGTH), (count, RESPONSES, LENGTH)), axis=2)
    other = (key + 1 + rng.integers(SYMBOLS - 1, size=(count, RESPONSES, LENGTH))) % SYMBOLS
    responses = np.where(places < counts[:, :, None], key, other)
    return prompts, responses, 1.0 + np.argsort(np.argsort(-counts, axis=1), axis=1)


def consensus(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same, where the best are the two responses that end in the same answer."""
    prompts = rng.integers(SYMBOLS, size=(count, PROMPT))
    responses = rng.integers(SYMBOLS, size=(count, RESPONSES, LENGTH))
    three = rng.permuted(np.broadcast_to(np.arange(SYMBOLS), (count, SYMBOLS)), axis=1)[:, :3]
    answers = rng.permuted(np.concatenate([three[:, :1], three], axis=1), axis=1)
    # answers have tokens of their own
    responses[:, :, -1] = SYMBOLS + answers
    agree = (answers[:, :, None] == answers[:, None, :]).sum(axis=2) == 2
    return prompts, responses, np.where(agree, 1.0, 2.0)


def comparisons(prompts: np.ndarray, responses: np.ndarray, ranks: np.ndarray) -> PreferenceData:
    """As texts, a word a token."""

    def texts(tokens: np.ndarray) -> list[str]:
        return [" ".join(f"w{token}" for token in row) for row in tokens.tolist()]

    count = len(prompts)
    return PreferenceData(
        texts(prompts),
        texts(responses.reshape(-1, LENGTH)),
        np.arange(0, count * RESPONSES + 1, RESPONSES),
        ranks=ranks.reshape(-1),
    )


def tokenizer() -> Any:
    """Of words w0 to w31."""
    library: Any = require("tokenizers", "text")
    transformers: Any = require("transformers", "text")
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(2 * SYMBOLS))]
    inner = library.Tokenizer(library.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def network(positions: int, seed: int) -> Any:
    """A causal transformer with learned positions, from scratch.

    Weights start from N(0, 1 / width). GPT-2's 0.02 is for a width of 768: from it, at a width of 64, most seeds of the
    one that reads together stay on the plateau of the constant score for much of a run (0.46 to 0.93 on consensus after
    1,000 steps, where this start gives 0.99 after 500).
    """
    transformers: Any = require("transformers", "text")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.GPT2Model(
            transformers.GPT2Config(
                vocab_size=64, n_positions=positions, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, resid_pdrop=0.0,
                embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1, activation_function="gelu_pytorch_tanh",
                initializer_range=WIDTH**-0.5,
            )
        )  # fmt: skip


def fit(data: PreferenceData, together: bool, rate: float, seed: int) -> PreferenceModel:
    """The same network, head, loss and steps; only how it reads differs."""
    encoder = FineTunedMultimodalEncoder(
        network(PROMPT + RESPONSES * (LENGTH + 1), seed), tokenizer(), together=together, name="tiny"
    )
    return one_pass_model(encoder, HIDDEN).fit(
        data, epochs=1, batch_size=BATCH, learning_rate=rate, encoder_learning_rate=rate, weight_decay=0.0,
        schedule="cosine", validation=None, seed=seed,
    )  # fmt: skip


@torch.no_grad()
def scores_in(model: PreferenceModel, data: PreferenceData, orders: np.ndarray) -> Tensor:
    """Scores by place (N, 4) of every set in the given order (N, 4)."""
    assert isinstance(model.encoder, FineTunedMultimodalEncoder)
    assert model.head is not None
    model.encoder.eval()
    rows = np.arange(len(data))[:, None] * RESPONSES + orders
    together = model.encoder.together
    groups: list[list[int]] = rows.tolist() if together else [[row] for row in range(rows.size)]
    prompts = data.of_responses(data.prompts)
    features = model.encoder.read(prompts, data.responses, groups)
    codes = torch.from_numpy(data.owner)
    scores = run_head(model.head.eval(), Items(features, torch.full_like(codes, -1), codes)).values
    return scores[torch.from_numpy(rows)]


def evaluate(model: PreferenceModel, data: PreferenceData, rng: np.random.Generator) -> dict[str, float]:
    """Accuracy of the winner in a random order, how often it survives another, and how often each place wins."""
    assert data.ranks is not None
    ranks = torch.from_numpy(data.ranks.reshape(-1, RESPONSES))
    orders = [rng.permuted(np.broadcast_to(np.arange(RESPONSES), ranks.shape), axis=1) for _ in range(2)]
    found = [scores_in(model, data, order) for order in orders]
    first, second = (torch.from_numpy(order) for order in orders)
    place = found[0].argmax(dim=1)
    winner = first.gather(1, place.unsqueeze(1))
    right = (ranks.gather(1, winner) == 1).double().mean()
    same = order_consistency(found[0], first, found[1], second).double().mean()
    shares = torch.bincount(place, minlength=RESPONSES).double() / len(place)
    return {
        "accuracy": float(right),
        "winner survives another order": float(same),
        **{f"picks of place {i + 1}": float(share) for i, share in enumerate(shares)},
    }


def process_seconds(work: Callable[[], Any]) -> float:
    """Least processor time of a few runs."""
    work()
    found = []
    for _ in range(REPEATS):
        begin = time.process_time()
        work()
        found.append(time.process_time() - begin)
    return min(found)


@torch.no_grad()
def speed(sizes: tuple[int, int, int], seed: int) -> dict[str, float]:
    """Processor time of separate sequences (in one batch) over that of one sequence with all responses."""
    prompt, length, count = sizes
    rng = np.random.default_rng(seed)
    model = MultiResponseRewardModel(network(1024, seed), RewardHead(WIDTH, hidden_dim=HIDDEN)).eval()
    samples: list[Any] = []
    for _ in range(PROMPTS_TIMED):
        responses = rng.integers(3, 60, size=(count, length)).tolist()
        samples.append((rng.integers(3, 60, size=prompt).tolist(), responses, None))
    collate = MultiResponseCollator(63, shuffle=False)
    joint = collate(samples)
    apart = collate([(p, [one], None) for p, responses, _ in samples for one in responses])
    ratio = process_seconds(lambda: model(**apart)) / process_seconds(lambda: model(**joint))
    return {"ratio": ratio, "tokens": flops_ratio(*sizes).tokens, "attention": flops_ratio(*sizes).attention}


def run_seed(seed: int, config: StudyConfig) -> Figures:
    """Both tasks by both readers at every rate, and the speed."""
    torch.set_num_threads(1)
    steps, tests = (4, 40) if config.quick else (STEPS, TEST)
    rates = RATES[:1] if config.quick else RATES
    figures: dict[str, dict[str, float]] = {}
    for number, (task, make) in enumerate(zip(TASKS, (absolute, consensus), strict=True)):
        rng = np.random.default_rng([seed, number])
        train, test = comparisons(*make(rng, steps * BATCH)), comparisons(*make(rng, tests))
        for together, name in NAMES.items():
            for rate in rates:
                model = fit(train, together, rate, seed)
                figures[rated(f"{task}, {name}", rate)] = {
                    **evaluate(model, test, np.random.default_rng([seed, number, 1])),
                    "first loss": model.history[0]["loss"],
                }
    for sizes in SIZES[-1:] if config.quick else SIZES:
        figures[_sized(sizes)] = speed(sizes, seed)
    return figures


def _sized(sizes: tuple[int, int, int]) -> str:
    return "speed, prompt {}, responses of {}, {} of them".format(*sizes)


def judge(runs: Sequence[Figures]) -> Judgement:
    """Apply `STUDY.rule`."""
    rates = [rate for rate in RATES if all(rated("absolute, together", rate) in run for run in runs)]
    names = [f"{task}, {name}" for task in TASKS for name in NAMES.values()]
    best = {name: best_rate(runs, name, "accuracy", rates) for name in names}

    def figure(name: str, quantity: str = "accuracy") -> np.ndarray:
        return arm(runs, rated(name, best[name]), quantity)

    multi, single = figure("consensus, together"), figure("consensus, one by one")
    plain, plain_single = figure("absolute, together"), figure("absolute, one by one")
    effect, interval = paired_bootstrap(multi, single)
    sizes = [size for size in SIZES if all(_sized(size) in run for run in runs)]
    ratios = {size: float(np.median(arm(runs, _sized(size), "ratio"))) for size in sizes}
    long = [size for size in sizes if size[0] >= 16 * size[1] and size[2] == 4]
    checks = {
        "consensus, together at least 0.80 in every seed": bool(multi.min() >= 0.80),
        "consensus, one by one at most 0.52 in every seed": bool(single.max() <= 0.52),
        "absolute, together at least 0.95 in every seed": bool(plain.min() >= 0.95),
        "3 times faster for 4 responses to a prompt 16 times as long": all(ratios[s] >= 0.75 * s[2] for s in long),
    }
    refuted = multi.mean() <= 0.6 or plain_single.mean() - plain.mean() > 0.05
    verdict: Verdict = "supported" if all(checks.values()) else "not supported" if refuted else "inconclusive"
    survives = figure("consensus, together", "winner survives another order").mean()
    picks = [figure("consensus, together", f"picks of place {i + 1}").mean() for i in range(RESPONSES)]
    speeds = "; ".join(
        f"P {p}, L {length}, N {n}: {ratios[p, length, n]:.2f} (tokens {flops_ratio(p, length, n).tokens:.2f})"
        for p, length, n in sizes
    )
    summary = (
        f"Consensus: together {multi.mean():.3f} (lowest seed {multi.min():.3f}), one by one {single.mean():.3f} "
        f"(highest {single.max():.3f}), difference {effect:+.3f} [{interval[0]:.3f}, {interval[1]:.3f}]. Absolute: "
        f"{plain.mean():.3f} and {plain_single.mean():.3f}. Rates: "
        + ", ".join(f"{name} {rate:g}" for name, rate in best.items())
        + f". Together on consensus, the winner survives another order in {survives:.0%} of the sets (two are equally "
        f"good) and the places win {', '.join(f'{share:.0%}' for share in picks)}; on absolute it survives in "
        f"{figure('absolute, together', 'winner survives another order').mean():.0%}. Processor time of separate "
        f"sequences over one pass, median: {speeds}."
    )
    return Judgement(verdict, effect, interval, summary, checks)


STUDY = Study(
    slug="43-yojo",
    method="yojo",
    claim="One pass over all responses of a prompt is up to N times cheaper than one pass for each and more accurate: "
    "a mean of 71.2 on six multimodal benchmarks, best open baseline 66.9 (arXiv 2604.10966).",
    task="Sets of four responses of four tokens behind a prompt of eight: the best holds the prompt's key most often "
    "(absolute), or is one of the two that end in the same answer (consensus).",
    baselines="The same causal transformer (2 layers, width 64, learned positions), head, loss, data and steps, "
    f"reading each response in a sequence of its own. Both at the learning rates {', '.join(f'{r:g}' for r in RATES)}, "
    "each shown at its best mean accuracy. Weights start from N(0, 1 / width), of both: from GPT-2's 0.02 a first full "
    "run of 1,000 steps ended inconclusive (consensus 0.763 together, lowest seed 0.622; 0.375 one by one).",
    measure="Share of 1,000 fresh sets, in a random order, whose highest score is a best response. Processor time of "
    "scoring separate sequences (in one batch) over that of one sequence, least of 5 repeats; median over seeds.",
    rule="Supported: on consensus together at least 0.80 and one by one at most 0.52 in every seed, on absolute "
    "together at least 0.95 in every seed, and a ratio of at least 3 for 4 responses of 16 tokens to a prompt of 512. "
    "Not supported: together at most 0.60 on consensus, or more than 0.05 below one by one on absolute, in the mean. "
    "Otherwise inconclusive. Order sensitivity is reported beside it.",
    effect="accuracy on consensus, together - one by one",
    full_scale="Molmo2-4B or Qwen3-VL-4B with LoRA of rank 128 on ten public preference sets, six multimodal "
    "benchmarks, and GRPO on Molmo2-4B with it as the reward; 8 GPUs.",
    seeds=5,
    run_seed=run_seed,
    judge=judge,
    config={
        "symbols": SYMBOLS,
        "responses": RESPONSES,
        "prompt": PROMPT,
        "length": LENGTH,
        "width": WIDTH,
        "layers": LAYERS,
        "attention heads": HEADS,
        "head": HIDDEN,
        "steps": STEPS,
        "batch": BATCH,
        "rates": list(RATES),
        "test sets": TEST,
        "sizes timed": [list(size) for size in SIZES],
        "prompts timed": PROMPTS_TIMED,
    },
)
