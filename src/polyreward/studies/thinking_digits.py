"""Items of three images of digits, a transformer that names the digits, and pairs of items with a true order.

The task of the study of thinking before scoring: an item's quality is the sum of a number for each digit, a preference
is drawn from Bradley-Terry of twice the difference, and a thought names the three digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyreward.errors import require
from polyreward.reward_models.query_token import QueryTokenRewardModel

VALUES = (0.9, -0.6, 0.3, -1.0, 0.7, -0.2, 1.0, -0.8, 0.1, -0.4)
STEEPNESS, TRAIN_IMAGES, FRAMES = 2.0, 900, 3
DIGITS, QUERY, FIRST_IMAGE, WIDTH = 10, 10, 11, 64
PRETRAIN_RATE, BATCH = 1e-3, 32


class Tokens(nn.Module):
    """Embeddings of ten digits and the query token; further ids are images, through a frame encoder."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = images
        self.weight = nn.Parameter(torch.randn(FIRST_IMAGE, WIDTH) * 0.1)
        self.frames = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings (B, L, WIDTH)."""
        shown = ids >= FIRST_IMAGE
        found = self.weight[ids.clamp(max=FIRST_IMAGE - 1)]
        return found.masked_scatter(shown.unsqueeze(-1), self.frames(self.images[ids[shown] - FIRST_IMAGE]))


class Judge(nn.Module):
    """A causal transformer of two layers that names digits."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.tokens, self.places = Tokens(images), nn.Parameter(torch.randn(2 * FRAMES + 1, WIDTH) * 0.1)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.names = nn.Linear(WIDTH, DIGITS)

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings."""
        return self.tokens

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Logits of the next digit and hidden states."""
        length = input_ids.shape[1]
        causal = torch.triu(torch.full((length, length), -torch.inf), 1)
        hidden = self.layers(self.tokens(input_ids) + self.places[:length], mask=causal, is_causal=True)
        return SimpleNamespace(logits=self.names(hidden), last_hidden_state=hidden)


class Items:
    """Items as ids of images, thoughts as digits."""

    def contexts(self, prompts: Sequence[Any], responses: Sequence[Any]) -> Tensor:
        """Ids (N, 3)."""
        return torch.tensor([list(item) for item in responses], dtype=torch.int64).view(-1, FRAMES) + FIRST_IMAGE

    def thoughts(self, thoughts: Sequence[Any]) -> Tensor:
        """Ids (N, 3), -1 where there is no thought."""
        return torch.tensor([[-1] * FRAMES if t is None else list(t) for t in thoughts], dtype=torch.int64)

    def read(self, ids: Tensor) -> list[tuple[int, ...]]:
        """The digits."""
        return [tuple(row) for row in ids.tolist()]


class Task:
    """Images, digits, and pairs of items with their order."""

    def __init__(self, rng: np.random.Generator) -> None:
        data: Any = require("sklearn.datasets", "tasks")
        digits = data.load_digits()
        order = rng.permutation(len(digits.target))
        self.images = torch.from_numpy(digits.data[order].astype(np.float32) / 16)
        self.digits = digits.target[order]
        self.rng = rng

    def items(self, count: int, test: bool = False) -> np.ndarray:
        """Rows of images (count, 2, 3) of pairs of items."""
        low, high = (TRAIN_IMAGES, len(self.digits)) if test else (0, TRAIN_IMAGES)
        return self.rng.integers(low, high, size=(count, 2, FRAMES))

    def quality(self, items: np.ndarray) -> np.ndarray:
        """Quality of items (..., 3)."""
        return np.asarray(np.array(VALUES)[self.digits[items]].sum(axis=-1))

    def pairs(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Training pairs (count, 2, 3), and which of each was preferred (count,)."""
        items = self.items(count)
        quality = self.quality(items)
        chance = 1 / (1 + np.exp(-STEEPNESS * (quality[:, 0] - quality[:, 1])))
        return items, (self.rng.random(count) > chance).astype(np.int64)


def pretrained(task: Task, steps: int, named: int, seed: int) -> QueryTokenRewardModel:
    """The model that names digits, taught on the first images of the task."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = QueryTokenRewardModel(Judge(task.images), QUERY, max_cot_tokens=FRAMES)
        optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=PRETRAIN_RATE)
        for _ in range(steps):
            items = torch.randint(named, (BATCH, FRAMES))
            logp, _ = network.log_probabilities(items + FIRST_IMAGE, torch.from_numpy(task.digits)[items])
            optimizer.zero_grad()
            (-logp.mean()).backward()
            optimizer.step()
    return network.eval()
