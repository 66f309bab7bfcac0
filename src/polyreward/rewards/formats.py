"""Format rewards: tags that occur once and in order, or a regular expression.

Formats are what DeepSeek-R1 (arXiv 2501.12948) rewards beside the answer: ``<think>...</think><answer>...</answer>``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from polyreward.errors import InvalidInputError
from polyreward.rewards.contract import Reward, Sample


@dataclass(frozen=True)
class TagFormat(Reward):
    """Whether each tag opens and closes exactly once, in the given order, without overlap (arXiv 2501.12948).

    Parameters
    ----------
    tags : names without brackets
    outside : bool
        Whether text may stand outside the tags; white space always may.
    graded : bool
        Give the fraction of tags that occur exactly once, times 1/2 where order or outside text is wrong, in place of
        all or nothing.

    Range: 0 or 1; [0, 1] when graded.
    """

    tags: tuple[str, ...] = ("think", "answer")
    outside: bool = False
    graded: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "tags", tuple(self.tags))
        if not self.tags or len(set(self.tags)) != len(self.tags):
            raise InvalidInputError(f"tags must be distinct and at least one, got {self.tags}")

    def score(self, sample: Sample) -> float:
        """Value of one completion."""
        text = sample.text
        once = [text.count(f"<{tag}>") == 1 == text.count(f"</{tag}>") for tag in self.tags]
        if not self.graded:
            return float(all(once) and self._in_order(text))
        share = sum(once) / len(once)
        return share if self._in_order(text) else share / 2

    def _in_order(self, text: str) -> bool:
        end = 0
        for tag in self.tags:
            start = text.find(f"<{tag}>", end)
            close = text.find(f"</{tag}>", start)
            if start < 0 or close < 0 or (text[end:start].strip() and not self.outside):
                return False
            end = close + len(tag) + 3
        return self.outside or not text[end:].strip()


@dataclass(frozen=True)
class RegexFormat(Reward):
    """1 where the whole completion matches `pattern` (arXiv 2501.12948 and most recipes since), else 0.

    Parameters
    ----------
    pattern : str
        Regular expression; the dot matches line ends too.
    part : bool
        Accept a match anywhere in the text.

    Range: 0 or 1. Nested quantifiers can take exponential time: run such patterns in the reward executor.
    """

    pattern: str
    part: bool = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern, re.DOTALL)
        except re.error as error:
            raise InvalidInputError(f"pattern {self.pattern!r} is no regular expression: {error}") from error

    def score(self, sample: Sample) -> float:
        """1 or 0."""
        match = re.search if self.part else re.fullmatch
        return float(match(self.pattern, sample.text, re.DOTALL) is not None)
