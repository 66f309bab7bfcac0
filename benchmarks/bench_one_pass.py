"""Scoring N responses to one prompt in one forward pass, against N passes, and the tokens that it saves.

Both go through the same model (a Llama of 4 layers and width 256, random weights) after both have given the first
response the same score. One pass is expected to be as much faster as it computes fewer tokens, somewhat less where
attention is a large part of the work.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

SEPARATOR, VOCABULARY, REPEATS = 500, 512, 5


def model() -> Any:
    from transformers import LlamaConfig, LlamaModel

    from polyreward.reward_models.multi_response import MultiResponseRewardModel
    from polyreward.reward_models.reward_head import RewardHead

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
        max_position_embeddings=4096, pad_token_id=0,
    )  # fmt: skip
    return MultiResponseRewardModel(LlamaModel(config), RewardHead(256, hidden_dim=1024)).eval()


def seconds(work: Callable[[], Any]) -> float:
    work()
    found = []
    for _ in range(REPEATS):
        begin = time.process_time()
        work()
        found.append(time.process_time() - begin)
    return min(found)


@torch.no_grad()
def main() -> int:
    from polyreward.reward_models.multi_response import flops_ratio
    from polyreward.reward_models.multi_response_batch import MultiResponseCollator

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, nargs="+", default=[512, 128])
    parser.add_argument("--response", type=int, nargs="+", default=[32, 128])
    options = parser.parse_args()
    torch.set_num_threads(1)
    scorer, collate, rng = model(), MultiResponseCollator(SEPARATOR, shuffle=False), np.random.default_rng(0)
    print("## one pass for all responses\n")
    print(
        "`MultiResponseRewardModel` on one prompt and N responses, a Llama of 4 layers and width 256, processor time "
        f"of one thread, least of {REPEATS}. N passes are N calls; a batch of N is the same work in one call. Tokens: "
        "how many times fewer tokens one pass computes.\n"
    )
    print("| prompt | response | N | N passes, ms | batch of N, ms | one pass, ms | speed-up over N passes | over the "
          "batch | tokens |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for prompt, length in zip(options.prompt, options.response, strict=True):
        for count in (2, 4, 8, 16):
            ids = rng.integers(1, SEPARATOR, size=prompt).tolist()
            responses = rng.integers(1, SEPARATOR, size=(count, length)).tolist()
            joint = collate([(ids, responses, None)])
            single = [collate([(ids, [one], None)]) for one in responses]
            batch = collate([(ids, [one], None) for one in responses])
            first, alone = float(scorer(**joint)[0, 0]), float(scorer(**single[0])[0, 0])
            if not math.isclose(first, alone, abs_tol=1e-4):
                print(f"the first response scores {first} in one pass, {alone} alone", file=sys.stderr)
                return 1
            apart = seconds(lambda single=single: [scorer(**one) for one in single])
            batched = seconds(lambda batch=batch: scorer(**batch))
            together = seconds(lambda joint=joint: scorer(**joint))
            ratios = (apart / together, batched / together, flops_ratio(prompt, length, count).tokens)
            print(
                f"| {prompt} | {length} | {count} | {1000 * apart:.0f} | {1000 * batched:.0f} | {1000 * together:.0f} "
                f"| {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |"
            )
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
