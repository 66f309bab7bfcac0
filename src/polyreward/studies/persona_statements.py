"""Statements of personas from Anthropic's evaluations, and who would say them.

Two pairs of personas that exclude one another. A statement of one persona of a pair is what the other would not say.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

from polyreward.errors import MissingFileError

PERSONAS = (("politically-liberal", "politically-conservative"), ("risk-averse", "risk-seeking"))
STATEMENTS = 300
"""Statements of each persona."""


def statements(folder: Path, rng: np.random.Generator, encoder: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (N, d) of unit deviation, which persona of its pair would say each statement, and of which pair."""
    texts, side, topic = [], [], []
    for number, pair in enumerate(PERSONAS):
        for place, persona in enumerate(pair):
            path = folder / "preferences" / "persona" / f"{persona}.jsonl.gz"
            if not path.exists():
                raise MissingFileError(f"{path} does not exist; the study reads statements of personas from there")
            with gzip.open(path, "rt", encoding="utf-8") as lines:
                found = [json.loads(line) for line in lines]
            for row in rng.choice(len(found), size=min(STATEMENTS, len(found)), replace=False):
                matches = found[row]["answer_matching_behavior"].strip() == "Yes"
                texts.append(found[row]["statement"])
                side.append(place if matches else 1 - place)
                topic.append(number)
    features = np.asarray(encoder.encode_prompts(texts), dtype=np.float32)
    return features / features.std(), np.array(side), np.array(topic)
