"""Time of the log-probabilities of a reference after 64 chains of one prompt: with the prompt shared, and each alone.

Both run on one decoder of 3 million parameters, in one process, in turn. "Alone" is a forward pass of each chain with
its prompt, batched and without padding to waste: all texts have one length. The ratio is the median over pairs; the
share of tokens that still run bounds it from below.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
import warnings
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import set_verbosity_error

from polyreward.rewards.reference_logprobs import reference_logprobs

TARGET = 1 / 3
CANDIDATES, ANSWER = 64, 16
SIZES = ((256, 32), (512, 32), (512, 64))


def alone(model: Any, prompt: list[int], chains: list[list[int]], answer: list[int], rows: int) -> torch.Tensor:
    """Each chain with its prompt, `rows` at a time."""
    texts = torch.tensor([prompt + chain + answer for chain in chains])
    found = []
    with torch.no_grad():
        for part in texts.split(rows):
            logits = model(input_ids=part, use_cache=False, logits_to_keep=ANSWER + 1).logits[:, :-1]
            found.append(logits.float().log_softmax(-1).gather(-1, part[:, -ANSWER:, None]).squeeze(-1))
    return torch.cat(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    lines = []
    for before, thought in SIZES:
        prompt = torch.randint(3, 1024, (before,)).tolist()
        chains = torch.randint(3, 1024, (CANDIDATES, thought)).tolist()
        answer = torch.randint(3, 1024, (ANSWER,)).tolist()
        seconds: dict[str, list[float]] = {"shared": [], "alone": [], "one by one": []}
        for turn in range(options.rounds + 1):
            begin = time.perf_counter()
            shared, _ = reference_logprobs(model, [prompt], [chains], [answer])
            middle = time.perf_counter()
            batched = alone(model, prompt, chains, answer, CANDIDATES)
            end = time.perf_counter()
            single = alone(model, prompt, chains, answer, 1)
            last = time.perf_counter()
            for other in (batched, single):
                if (shared[0] - other).abs().max() > 1e-5:
                    print(f"shared and alone differ by {(shared[0] - other).abs().max():.1e}", file=sys.stderr)
                    return 1
            if turn:  # the first warms up
                for name, took in zip(seconds, (middle - begin, end - middle, last - end), strict=True):
                    seconds[name].append(took)
        ratios = {
            name: statistics.median(a / b for a, b in zip(seconds["shared"], seconds[name], strict=True))
            for name in ("alone", "one by one")
        }
        took = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
        lines.append(
            f"| {before} | {thought} | {took['shared']:.0f} | {took['alone']:.0f} | {took['one by one']:.0f} | "
            f"{(thought + ANSWER) / (before + thought + ANSWER):.3f} | {ratios['alone']:.3f} | "
            f"{ratios['one by one']:.3f} | {TARGET:.3f} |"
        )
    print("## Reference log-probabilities: 64 chains that share a prompt, beside each alone\n")
    print(f"Answers of {ANSWER} tokens, a decoder of 3 million parameters, one thread, {options.rounds} rounds.\n")
    print(
        "| prompt tokens | chain tokens | shared, ms | alone in one batch, ms | alone one by one, ms | "
        "share of tokens | ratio to one batch | ratio to one by one | target |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
