"""Real dialogues of two kinds of annotator, the part of the study `latent_users` that needs data."""

from __future__ import annotations

import gzip
import json
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from polyreward.preferences import PreferenceData
from polyreward.reward_models.encoders import Features, HashingEncoder
from polyreward.reward_models.feature_cache import CachedEncoder
from polyreward.reward_models.heads import TwoLayerHead
from polyreward.reward_models.latent_user_head import LatentUserHead, infer_annotators
from polyreward.reward_models.model import PreferenceModel
from polyreward.reward_models.text_encoders import SentenceEncoder

EACH, CONTEXT, WIDTH = 25, 12, 64
"""Comparisons of a made-up annotator, those of them that one who is new is inferred from, and hidden units."""


def dialogue_figures(path: Path, seed: int, quick: bool) -> dict[str, dict[str, float]]:
    """Real dialogues judged for helpfulness or for harmlessness: made-up annotators of one kind each, a quarter
    unseen.
    """
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rng = np.random.default_rng(seed)
    rows = [rows[i] for i in rng.permutation(len(rows))][: 400 if quick else len(rows)]
    # comparison i of an objective is that of its annotator i // EACH
    objectives = np.array([row["objective"] for row in rows])
    number = np.zeros(len(rows), np.int64)
    for objective in ("helpful", "harmless"):
        number[objectives == objective] = np.arange((objectives == objective).sum())
    names = [f"{objective} {i // EACH}" for objective, i in zip(objectives, number.tolist(), strict=True)]
    found, sizes = np.unique(names, return_counts=True)
    people = found[sizes == EACH].tolist()
    late = set(rng.permutation(people)[: max(len(people) // 4, 2)].tolist())
    encoder = (None if quick else SentenceEncoder.packaged()) or HashingEncoder(384)
    texts = [response for row in rows for response in row["responses"]]
    # the same texts in every seed: they are encoded once for all
    cached = CachedEncoder(encoder, Path(tempfile.gettempdir()) / "polyreward-study-features")
    features = Features(np.asarray(cached.encode([""] * len(texts), texts)))
    data = PreferenceData(
        np.arange(len(rows)), np.arange(len(texts)), choice=np.array([row["label"] for row in rows]), annotators=names
    )
    turn = number % EACH
    known = np.array([name in people and name not in late for name in names])
    new = np.array([name in late for name in names])
    train, context, asked = (data.select(part) for part in (known, new & (turn < CONTEXT), new & (turn >= CONTEXT)))
    figures: dict[str, dict[str, float]] = {}
    options = {"epochs": 3 if quick else 30, "batch_size": 256, "learning_rate": 1e-3, "seed": seed}
    for name, head in (("VPL", LatentUserHead), ("BTL", partial(TwoLayerHead, hidden=WIDTH))):
        model = PreferenceModel(features, head).fit(train, **options)
        if isinstance(model.head, LatentUserHead):
            used = {"kl": model.head.kl(), "active units": float(model.head.active_units())}
            infer_annotators(model, context)
        else:
            used = {}
        figures[f"{name}, dialogues"] = {"accuracy": model.evaluate(asked)["accuracy"], **used}
    figures["dialogues"] = {
        "sentence encoder": float(isinstance(encoder, SentenceEncoder)), "unseen comparisons": float(len(asked)),
    }  # fmt: skip
    return figures
