"""Preferences with a known answer: features, a direction that people like, and pairs drawn from Bradley-Terry."""

import numpy as np

from polyreward.preferences import PreferenceData
from polyreward.reward_models.encoders import Features


def planted(pairs=400, width=8, seed=0, strength=3.0):
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=width)
    direction /= np.linalg.norm(direction)
    features = rng.normal(size=(2 * pairs, width)).astype(np.float32)
    score = strength * features @ direction
    wins = rng.random(pairs) < 1 / (1 + np.exp(score[1::2] - score[::2]))
    data = PreferenceData(np.arange(pairs), np.arange(2 * pairs), choice=np.where(wins, 0, 1), source="planted")
    return data, Features(features, name="planted"), direction
