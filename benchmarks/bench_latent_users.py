"""A latent-user head on 200,000 pairs of cached features by 1,000 annotators, beside a head that knows no annotators.

Target: less than 60 s to convergence on 2 cores, that is until early stopping, or the last epoch. Annotators are of two
tastes in part opposed; the accuracy is that on held-out comparisons, and on comparisons of people who came after the
fit and were inferred from 16 of theirs. The ceiling is the accuracy of the rewards that the labels were drawn from.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial

import numpy as np
import torch

WIDTH, SECONDS = 384, 60.0


def planted(pairs: int, annotators: int, new: int, each: int, seed: int = 0):
    """Features, comparisons of known people, of new people to infer from and to test on, and the labels' ceilings."""
    from polyreward.preferences import PreferenceData
    from polyreward.reward_models.encoders import Features

    rng = np.random.default_rng(seed)
    count = pairs + 2 * new * each
    features = rng.standard_normal((2 * count, WIDTH), dtype=np.float32)
    shared, apart = rng.standard_normal((2, WIDTH)).astype(np.float32) / np.sqrt(WIDTH)
    side = np.where(np.arange(annotators + new) % 2, 1.0, -1.0)
    person = np.concatenate([rng.integers(annotators, size=pairs), annotators + np.repeat(np.arange(new), 2 * each)])
    worth = 2 * (features @ shared) + 3 * np.repeat(side[person], 2) * (features @ apart)
    difference = worth[::2] - worth[1::2]
    lost = rng.random(count) > 1 / (1 + np.exp(-difference))
    data = PreferenceData(
        np.arange(count), np.arange(2 * count), choice=lost.astype(int), annotators=person, source="benchmark"
    )
    place = np.arange(count)
    known, late = place[:pairs], place[pairs:]
    held = rng.permutation(pairs)[: pairs // 20]
    context = late[(late - pairs) % (2 * each) < each]
    test = late[(late - pairs) % (2 * each) >= each]
    right = (difference < 0) == lost
    parts = [data.select(rows) for rows in (np.setdiff1d(known, held), held, context, test)]
    return Features(features), parts, (float(right[held].mean()), float(right[test].mean()))


def main() -> int:
    from polyreward.reward_models.heads import TwoLayerHead
    from polyreward.reward_models.latent_user_head import LatentUserHead, infer_annotators
    from polyreward.reward_models.model import PreferenceModel

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=200_000)
    parser.add_argument("--annotators", type=int, default=1000)
    parser.add_argument("--new", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    encoder, (train, held, context, test), ceiling = planted(options.pairs, options.annotators, options.new, 16)
    print("## latent users\n")
    print(
        f"`PreferenceModel.fit` on {len(train):,} pairs of {WIDTH} features in memory by {options.annotators:,} "
        f"annotators, {options.threads} thread{'s' * (options.threads > 1)}, until early stopping.\n"
    )
    print(
        "| head | seconds | of processor time | target | epochs | held-out accuracy | of new people | ceiling "
        "| active units |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    good = True
    for name, head in (("latent users", LatentUserHead), ("two layers, 64", partial(TwoLayerHead, hidden=64))):
        model = PreferenceModel(encoder, head)
        model.fit(train.select(np.arange(2000)), epochs=1, validation=None)  # loads what torch loads at a first step
        begin, work = time.perf_counter(), time.process_time()
        model.fit(train, epochs=options.epochs, batch_size=1024, learning_rate=3e-3, validation=0.02, patience=1)
        seconds, work = time.perf_counter() - begin, time.process_time() - work
        units = "-"
        if isinstance(model.head, LatentUserHead):
            good &= seconds < SECONDS
            units = str(model.head.active_units())
            infer_annotators(model, context)
        known, late = (model.evaluate(part)["accuracy"] for part in (held, test))
        print(
            f"| {name} | {seconds:.1f} | {work:.1f} | {SECONDS:.0f} | {len(model.history)} | {known:.3f} | {late:.3f} "
            f"| {ceiling[0]:.3f}, {ceiling[1]:.3f} | {units} |", flush=True,
        )  # fmt: skip
    print()
    if not good:
        print("The target was missed on this machine.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
