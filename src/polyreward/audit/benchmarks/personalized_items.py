"""Items of Personalized RewardBench, and what a model under test may see of them.

An item pairs two answers of equal quality to one user's question. The rubric and the user's own narrative are hidden;
the user's past posts may be shown, ordered by their likeness to the question. Aspects of the rubric may be inferred
from the posts by a planner; the true ones give an upper bound.

Personalized RewardBench: Evaluating Reward Models with Human Aligned Personalization, arXiv 2604.07343.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from polyreward.audit.benchmarks.intervals import numbers
from polyreward.errors import InvalidInputError

HIDDEN = ("rubric_aspects", "narrative")
ANSWERS = ("chosen", "rejected")
POSTS = 10
Condition = Literal["question", "profile", "inferred", "oracle"]
CONDITIONS: tuple[Condition, ...] = ("question", "profile", "inferred", "oracle")
Planner = Callable[[Sequence[str], Sequence[Sequence[Mapping[str, Any]]]], Sequence[Sequence[str]]]
Ranker = Callable[[str, Sequence[Mapping[str, Any]]], Sequence[Mapping[str, Any]]]


class ModelView(Mapping[str, Any]):
    """What a model under test may see of an item: ``id``, ``question``, ``category`` and ``profile``.

    Raises
    ------
    InvalidInputError
        On access to the rubric, the narrative, or which answer is the chosen one, by key or by attribute.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = dict(fields)

    def __getitem__(self, name: str) -> Any:
        if name in HIDDEN or name in ANSWERS:
            raise InvalidInputError(f"item {self._fields['id']!r}: {name!r} is hidden from the model under test")
        return self._fields[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def get(self, name: str, default: Any = None) -> Any:
        """As of a mapping; hidden fields raise here too."""
        return self[name] if name in self._fields or name in HIDDEN or name in ANSWERS else default


@dataclass(frozen=True)
class PersonalizedPairItem:
    """One question of one user with two answers of equal quality.

    Attributes
    ----------
    id, question : text
    profile : posts of the user, each a mapping with ``text`` and usually ``id`` and ``category``
    narrative : the user's own explanation of what they want; hidden
    rubric_aspects : mappings with ``aspect``, ``evidence``, ``reason``; hidden
    category : text
    chosen, rejected : the answer that meets the aspects, and the one that avoids them
    user : text, optional; default the id

    Raises
    ------
    InvalidInputError
        An answer or question that is no text, a post without text.
    """

    id: str
    question: str
    profile: Sequence[Mapping[str, Any]] = ()
    narrative: str = ""
    rubric_aspects: Sequence[Any] = ()
    category: str = ""
    chosen: str = ""
    rejected: str = ""
    user: str | None = None

    def __post_init__(self) -> None:
        for name in ("question", *ANSWERS):
            if not isinstance(getattr(self, name), str):
                raise InvalidInputError(f"item {self.id!r}: {name} is {type(getattr(self, name)).__name__}, not a text")
        for place, post in enumerate(self.profile):
            if not isinstance(post, Mapping) or not isinstance(post.get("text"), str):
                raise InvalidInputError(f"item {self.id!r}: profile[{place}] must be a mapping with a 'text'")

    def model_view(self, profile_k: int | None = None, rank: Ranker | None = None) -> ModelView:
        """What the model may see, with the first `profile_k` posts (0 or None: none) in the order of `rank`.

        Raises
        ------
        InvalidInputError
            Posts are asked for and the item has none.
        """
        posts: Sequence[Mapping[str, Any]] = []
        if profile_k:
            if not len(self.profile):
                raise InvalidInputError(f"item {self.id!r} has no profile, and the profile is to be shown")
            posts = list(self.profile if rank is None else rank(self.question, self.profile))[:profile_k]
        return ModelView({"id": self.id, "question": self.question, "category": self.category, "profile": posts})


def check_items(items: Sequence[PersonalizedPairItem], where: str = "items") -> None:
    """Refuse no items, and ids that come twice."""
    if not len(items):
        raise InvalidInputError(f"{where} has no items")
    seen: dict[str, int] = {}
    for place, item in enumerate(items):
        if item.id in seen:
            raise InvalidInputError(f"{where}, rows {seen[item.id] + 1} and {place + 1} have the same id {item.id!r}")
        seen[item.id] = place


def rank_by_dot_product(encode: Callable[[Sequence[str]], Any]) -> Ranker:
    """Order posts by the dot product of their embedding with the question's; a post keeps its id and text together.

    Parameters
    ----------
    encode : texts -> (N, d)
    """

    def rank(question: str, posts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        vectors = numbers(encode([question, *(post["text"] for post in posts)]), "embeddings", 2)
        order = np.argsort(-(vectors[1:] @ vectors[0]), kind="stable")
        return [posts[i] for i in order.tolist()]

    return rank


def prompt_of(view: Mapping[str, Any], aspects: Sequence[str] = ()) -> str:
    """The user's turn: posts and aspects where there are any, and the question."""
    parts = [f"- {post['text']}" for post in view["profile"]]
    shown = ["Earlier posts of the user:", *parts, ""] if parts else []
    if aspects:
        shown += ["What the user cares about:", *(f"- {aspect}" for aspect in aspects), ""]
    return "\n".join([*shown, view["question"]])


def prompts_for(
    items: Sequence[PersonalizedPairItem],
    condition: Condition = "question",
    profile_k: int = POSTS,
    rank: Ranker | None = None,
    planner: Planner | None = None,
) -> list[str]:
    """Prompts of all items.

    Parameters
    ----------
    condition : "question", "profile", "inferred" or "oracle"
        The question alone; with the first `profile_k` posts; with these and the aspects that `planner` reads from
        question and posts; with the true aspects, an upper bound and never a figure to compare by.
    planner : (questions, posts of each) -> aspects of each, as texts

    Raises
    ------
    InvalidInputError
        No profile where one is to be shown, no planner for inferred aspects, the narrative in a prompt.
    """
    if condition not in CONDITIONS:
        raise InvalidInputError(f"condition must be one of {', '.join(CONDITIONS)}, got {condition!r}")
    posts = profile_k if condition in ("profile", "inferred") else 0
    if condition in ("profile", "inferred") and not profile_k:
        raise InvalidInputError(f"condition {condition!r} shows posts; profile_k must be at least 1")
    views = [item.model_view(posts, rank) for item in items]
    aspects: Sequence[Sequence[str]] = [[] for _ in items]
    if condition == "inferred":
        if planner is None:
            raise InvalidInputError("condition 'inferred' needs a planner that reads aspects from the profile")
        aspects = planner([view["question"] for view in views], [view["profile"] for view in views])
        if len(aspects) != len(items):
            raise InvalidInputError(f"the planner gave aspects of {len(aspects)} items for {len(items)}")
    elif condition == "oracle":
        aspects = [[aspect_text(aspect) for aspect in item.rubric_aspects] for item in items]
    prompts = [prompt_of(view, own) for view, own in zip(views, aspects, strict=True)]
    refuse_leaks(items, prompts)
    return prompts


def refuse_leaks(items: Sequence[PersonalizedPairItem], prompts: Sequence[str]) -> None:
    """Refuse a prompt that holds the item's narrative."""
    for item, prompt in zip(items, prompts, strict=True):
        hidden = item.narrative.strip()
        if hidden and hidden not in item.question and hidden in prompt:
            raise InvalidInputError(f"item {item.id!r}: the narrative is in the model's input, and is to be hidden")


def aspect_text(aspect: Any) -> str:
    """The name of an aspect."""
    return str(aspect.get("aspect", aspect)) if isinstance(aspect, Mapping) else str(aspect)


def users_of(items: Sequence[PersonalizedPairItem]) -> list[str]:
    """The user of each item."""
    return [item.id if item.user is None else item.user for item in items]
