"""Questions about digits in pictures or in words, for the study of the BaseReward recipe: data and backbone.

An item is a picture of a digit (`load_digits`, 8 x 8) or its name as a text, one of four questions, and an answer. The
questions: which digit is it; is it even; is it at least five; and a request that is to be refused where the digit is
divisible by three. The backbone plays a pretrained vision-language model: an encoder of pictures that was aligned with
the embeddings of the ten names, embeddings of questions and answers, and layers that mix the three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyreward.errors import require
from polyreward.preferences import PreferenceData

QUESTIONS = ("name", "parity", "at least five", "refusal")
SEEN, UNSEEN = (0, 2), (1, 3)
IMAGE_WIDTH, MIXED = 32, 128
ALIGN_IMAGES, ALIGN_STEPS, ALIGN_BATCH, ALIGN_RATE, TEMPERATURE = 600, 200, 128, 1e-3, 0.1
# answers: ten names, even, odd, yes, no, refuse, comply
ANSWERS = 16


def right_answer(digit: np.ndarray, question: np.ndarray) -> np.ndarray:
    """Number of the right answer to each question about each digit."""
    choices = [digit, 10 + digit % 2, 13 - (digit >= 5), 15 - (digit % 3 == 0)]
    return np.asarray(np.choose(question, choices))


def wrong_answer(rng: np.random.Generator, digit: np.ndarray, question: np.ndarray) -> np.ndarray:
    """A wrong answer of the right kind: another name, or the other one of two."""
    other = (digit + 1 + rng.integers(9, size=digit.shape)) % 10
    right = right_answer(digit, question)
    return np.where(question == 0, other, right + 1 - 2 * (right % 2))


@dataclass(frozen=True)
class Items:
    """Items as columns: picture (row of the pictures, or -1 for the name as a text), digit, question, answer."""

    picture: np.ndarray
    digit: np.ndarray
    question: np.ndarray
    answer: np.ndarray

    def __len__(self) -> int:
        return len(self.digit)


def pairs(
    rng: np.random.Generator, digit: np.ndarray, picture: np.ndarray, questions: Sequence[int], count: int
) -> Items:
    """Items (2 count): right and wrong answers in turn, to drawn questions about drawn digits."""
    rows = rng.integers(len(digit), size=count)
    question = rng.choice(np.array(questions), size=count)
    return both_answers(rng, digit[rows], picture[rows], question)


def both_answers(rng: np.random.Generator, digit: np.ndarray, picture: np.ndarray, question: np.ndarray) -> Items:
    """Items (2 n): to each question its right and a wrong answer."""
    answers = np.stack([right_answer(digit, question), wrong_answer(rng, digit, question)], axis=1)
    return Items(picture.repeat(2), digit.repeat(2), question.repeat(2), answers.reshape(-1))


def together(parts: Sequence[Items]) -> Items:
    """Items below one another."""
    columns = ("picture", "digit", "question", "answer")
    return Items(*(np.concatenate([getattr(part, name) for part in parts]) for name in columns))


def preferences(items: Items) -> PreferenceData:
    """The right answer is preferred; prompts and responses are rows."""
    count = len(items) // 2
    return PreferenceData(np.arange(count), np.arange(2 * count), choice=np.zeros(count, np.int64), source="digits")


def pictures(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """All pictures (1797, 64) in [0, 1] and their digits, in a random order."""
    data: Any = require("sklearn.datasets", "tasks")
    found = data.load_digits()
    order = rng.permutation(len(found.target))
    return (found.data[order] / 16).astype(np.float32), found.target[order].astype(np.int64)


class Backbone(nn.Module):
    """Pictures or names, question and answer, mixed to 128 features; an encoder that learns, slowly.

    Parameters
    ----------
    images : float32 (N, 64)
    items : Items
        What rows of prompts and responses stand for.
    with_length : bool
        Append the number of tokens of a response as a last feature: names are one token, the other answers three.
    """

    identity = "digits"

    def __init__(self, images: Tensor, items: Items, with_length: bool = False) -> None:
        super().__init__()
        self.see = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, IMAGE_WIDTH))
        self.names = nn.Embedding(10, IMAGE_WIDTH)
        self.questions, self.answers = nn.Embedding(4, IMAGE_WIDTH), nn.Embedding(ANSWERS, IMAGE_WIDTH)
        self.mix = nn.Sequential(
            nn.Linear(3 * IMAGE_WIDTH, MIXED), nn.GELU(), nn.LayerNorm(MIXED),
            nn.Linear(MIXED, MIXED), nn.GELU(), nn.LayerNorm(MIXED),
        )  # fmt: skip
        self.images, self.items, self.with_length = images, items, with_length

    @property
    def width(self) -> int:
        """Width of the features."""
        return MIXED + self.with_length

    def forward(self, prompts: Any, responses: Any, comparison: Tensor | None = None) -> Tensor:
        """Features (M, width) of the items in rows `responses`."""
        rows = np.asarray(responses)
        picture, digit, question, answer = (
            torch.from_numpy(getattr(self.items, name)[rows]) for name in ("picture", "digit", "question", "answer")
        )
        subject = torch.where(
            (picture >= 0).unsqueeze(1), self.see(self.images[picture.clamp(min=0)]), self.names(digit)
        )
        mixed: Tensor = self.mix(torch.cat([subject, self.questions(question), self.answers(answer)], dim=1))
        if not self.with_length:
            return mixed
        return torch.cat([mixed, answer_length(answer).to(mixed.dtype).unsqueeze(1)], dim=1)

    @torch.no_grad()
    def encode(self, prompts: Any, responses: Any) -> np.ndarray:
        """The same without gradient."""
        return np.asarray(self(prompts, responses).numpy())


def answer_length(answer: Tensor) -> Tensor:
    """Tokens of an answer: 2 for a name, 3 for even, odd, yes and no, 5 for refuse and comply."""
    return 2 + (answer >= 10).long() + 2 * (answer >= 14).long()


def pretrained(images: np.ndarray, digits: np.ndarray, seed: int, steps: int) -> Backbone:
    """A backbone whose pictures are aligned with the names; then a name is the mean of its pictures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = Backbone(torch.from_numpy(images), Items(*(np.zeros(0, np.int64),) * 4))
        shown, named = torch.from_numpy(images[:ALIGN_IMAGES]), torch.from_numpy(digits[:ALIGN_IMAGES])
        learns = [*backbone.see.parameters(), *backbone.names.parameters()]
        optimizer = torch.optim.Adam(learns, lr=ALIGN_RATE)
        for _ in range(steps):
            batch = torch.randint(len(shown), (ALIGN_BATCH,))
            seen = nn.functional.normalize(backbone.see(shown[batch]), dim=1)
            names = nn.functional.normalize(backbone.names.weight, dim=1)
            loss = nn.functional.cross_entropy(seen @ names.T / TEMPERATURE, named[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            seen = backbone.see(shown)
            counts = torch.bincount(named, minlength=10).clamp(min=1).unsqueeze(1)
            backbone.names.weight.copy_(torch.zeros(10, IMAGE_WIDTH).index_add_(0, named, seen) / counts)
    return backbone
