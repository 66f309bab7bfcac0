"""A diverse subset of a corpus: the largest set of texts that are pairwise dissimilar.

Two texts are joined when their similarity is below a threshold; a clique of that graph is a set without
near-duplicates, and a maximum clique keeps as many texts as possible. The corpus is cut into blocks, each block keeps a
maximum clique, and passes over shuffled survivors let texts of different blocks meet.

    edge (a, b)  iff  similarity(a, b) < threshold

A clique of the dissimilar pairs is an independent set of the similar ones, which falls into the connected components of
the similar pairs; each is solved by branch and bound with a colouring bound (Tomita and Kameda, 2007).

Paper: CodeBoost: Boosting Code LLMs by Squeezing Knowledge from Code Snippets with RL (arXiv 2508.05242). The release
has the threshold, the block and the number of passes, and not the routine: the direction of the edge, the similarity
over characters and the shuffling between passes are this library's reading.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher
from typing import Any, Literal

import numpy as np

from polyreward.errors import InvalidInputError

Similarity = Callable[[Any, Any], float] | Literal["characters", "lines"]


class CuratedIndices(list[int]):
    """Indices that a curation keeps, ascending; a list with three marks.

    Attributes
    ----------
    exact : bool
        Whether every block kept a maximum clique; False where a component was too large or the time ran out.
    pairwise : bool
        Whether every two kept texts were compared: the survivors fitted in one block at the end. Otherwise only texts
        which met in a block are known to be dissimilar.
    passes : int
        Passes that were made; they end when the survivors fit in one block.
    """

    def __init__(self, indices: Iterable[int] = (), *, exact: bool = True, pairwise: bool = True, passes: int = 0):
        super().__init__(indices)
        self.exact, self.pairwise, self.passes = exact, pairwise, passes


def maximum_clique_curation(
    texts: Sequence[Any],
    threshold: float = 0.5,
    block: int = 400,
    passes: int = 10,
    similarity: Similarity = "characters",
    seed: int | np.random.Generator = 0,
    *,
    exact_limit: int = 60,
    time_limit: float = 10.0,
) -> CuratedIndices:
    """Indices of a largest set of pairwise dissimilar texts (arXiv 2508.05242).

    Parameters
    ----------
    texts : sequence of N str; anything that `similarity` takes, where that is a function
    threshold : float
        Two texts may both stay when their similarity is below it. Above 1 keeps all, 0 one a block.
    block : int >= 1
        Texts that are compared with each other; a block costs ``block^2 / 2`` comparisons.
    passes : int >= 1
        The first takes consecutive blocks, the others shuffle the survivors.
    similarity : "characters", "lines", or (text, text) -> float, symmetric
        ``difflib.SequenceMatcher.ratio`` over characters or lines, the larger of the two orders of its arguments. Lines
        are some twenty times faster, and blind to a name that is changed everywhere.
    seed : int or numpy.random.Generator
        Of the shuffles between passes.
    exact_limit : int
        Connected components of similar texts up to this size are solved exactly, larger ones greedily with local
        search. A block of at most this many texts is therefore exact.
    time_limit : float > 0
        Seconds of exact search in one block. What is found by then stays, and the result is marked as not exact.

    Returns
    -------
    CuratedIndices
        Ascending; empty for no texts. Which of several largest sets is kept is fixed by the order of the texts.

    Raises
    ------
    InvalidInputError
        A text that is not a str, a similarity that is NaN, `block`, `passes`, `threshold` or a limit out of range.
    """
    _check(texts, threshold, block, passes, similarity, exact_limit, time_limit)
    rng = np.random.default_rng(seed)
    kept, exact, made = np.arange(len(texts)), True, 0
    while made < passes and kept.size:
        order = kept if made == 0 else rng.permutation(kept)
        chosen = []
        for start in range(0, order.size, block):
            members = np.sort(order[start : start + block])
            similar = _similar_pairs([texts[i] for i in members], threshold, similarity, members.tolist())
            stay, solved = maximum_independent_set(similar, exact_limit, time.monotonic() + time_limit)
            exact &= solved
            chosen.append(members[stay])
        single = len(chosen) == 1
        kept, made = np.sort(np.concatenate(chosen)), made + 1
        if single:
            break
    return CuratedIndices(kept.tolist(), exact=exact, pairwise=not kept.size or single, passes=made)


def long_enough(texts: Sequence[str], lines: int = 10, characters: int = 30, keep_every: int = 1) -> list[int]:
    """Indices of the texts with at least so many lines and characters, of which every `keep_every`-th stays.

    Defaults are those of the paper's corpora; its largest has 20 lines, 60 characters and every second text
    (arXiv 2508.05242).

    Raises
    ------
    InvalidInputError
        ``keep_every < 1``.
    """
    if keep_every < 1:
        raise InvalidInputError(f"keep_every must be at least 1, got {keep_every}")
    fit = (i for i, text in enumerate(texts) if len(text) >= characters and len(text.splitlines()) >= lines)
    return list(itertools.islice(fit, 0, None, keep_every))


def maximum_independent_set(
    neighbours: Sequence[int], exact_limit: int = 60, deadline: float | None = None
) -> tuple[list[int], bool]:
    """A largest set of nodes without an edge between them, and whether it is known to be largest.

    Parameters
    ----------
    neighbours : for each node the set of its neighbours, as bits of an int
    exact_limit : int
        Components above this size are solved greedily with local search; the result is still known to be largest where
        it reaches the colouring bound, as in a component of copies.
    deadline : float, optional
        ``time.monotonic()`` at which exact search stops.
    """
    left, chosen, exact = (1 << len(neighbours)) - 1, [], True
    while left:
        component = _component(left & -left, neighbours)
        left &= ~component
        best = _improve(_greedy(component, neighbours), component, neighbours)
        if len(best) < _coloured(component, neighbours)[-1][1]:
            if component.bit_count() <= exact_limit:
                best, solved = _branch_and_bound(best, component, neighbours, deadline)
                exact &= solved
            else:
                exact = False
        chosen.extend(best)
    return sorted(chosen), exact


def _check(
    texts: Sequence[Any],
    threshold: float,
    block: int,
    passes: int,
    similarity: Similarity,
    exact_limit: int,
    time_limit: float,
) -> None:
    if threshold != threshold:
        raise InvalidInputError("maximum_clique_curation: threshold is NaN")
    for name, value in (("block", block), ("passes", passes)):
        if not isinstance(value, int | np.integer) or value < 1:
            raise InvalidInputError(f"maximum_clique_curation: {name} must be a whole number >= 1, got {value!r}")
    if exact_limit < 0 or not time_limit > 0:
        raise InvalidInputError(
            "maximum_clique_curation: exact_limit must be >= 0 and time_limit positive, "
            f"got {exact_limit} and {time_limit}"
        )
    if callable(similarity):
        return
    if similarity not in ("characters", "lines"):
        raise InvalidInputError(f"similarity must be 'characters', 'lines' or a function, got {similarity!r}")
    if isinstance(texts, str):
        raise InvalidInputError("maximum_clique_curation: texts is a single str, expected a list of them")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InvalidInputError(f"maximum_clique_curation: text {i} is {type(text).__name__}, expected str")


def _similar_pairs(texts: list[Any], threshold: float, similarity: Similarity, names: Sequence[int]) -> list[int]:
    """For each text the set of those it may not stay with, as bits."""
    neighbours = [0] * len(texts)
    if callable(similarity):
        below = _by_function(texts, threshold, similarity, names)
    else:
        below = _by_difference(texts, threshold, similarity)
    for i, j in below:
        neighbours[i] |= 1 << j
        neighbours[j] |= 1 << i
    return neighbours


def _by_function(
    texts: list[Any], threshold: float, similarity: Callable[[Any, Any], float], names: Sequence[int]
) -> Iterable[tuple[int, int]]:
    for i, j in itertools.combinations(range(len(texts)), 2):
        value = similarity(texts[i], texts[j])
        if value != value:
            raise InvalidInputError(f"the similarity of texts {names[i]} and {names[j]} is NaN, expected a number")
        if value >= threshold:
            yield i, j


def _by_difference(texts: list[str], threshold: float, unit: str) -> Iterable[tuple[int, int]]:
    units: list[Sequence[Any]] = [text.splitlines() for text in texts] if unit == "lines" else list(texts)
    # A matcher keeps an index of its second sequence: one a text, made once.
    matchers = [SequenceMatcher(None, "", text) for text in units]
    places = [_places(text) for text in units]
    for i, j in itertools.combinations(range(len(units)), 2):
        if texts[i] == texts[j]:
            if threshold <= 1:
                yield i, j
            continue
        forth, back = matchers[j], matchers[i]
        forth.set_seq1(units[i])
        # Bounds that are the same for either order of the texts and never below the ratio, the cheapest first.
        if forth.real_quick_ratio() < threshold or (unit == "lines" and forth.quick_ratio() < threshold):
            continue
        # What the matcher matches is a common subsequence; code that has nothing to do with each other stops here.
        size = len(units[i]) + len(units[j])
        if unit == "characters" and 2.0 * _common(places[j], len(units[j]), units[i]) / size < threshold:
            continue
        back.set_seq1(units[j])
        if forth.ratio() >= threshold or back.ratio() >= threshold:
            yield i, j


def _places(text: Sequence[Any]) -> dict[Any, int]:
    """Where each character stands, as bits."""
    found: dict[Any, int] = {}
    for at, character in enumerate(text):
        found[character] = found.get(character, 0) | 1 << at
    return found


def _common(places: dict[Any, int], length: int, other: Sequence[Any]) -> int:
    """Length of the longest common subsequence, a column of the table at a time in the bits of an int (Hyyro, 2004)."""
    row = full = (1 << length) - 1
    for character in other:
        matches = row & places.get(character, 0)
        row = (row + matches) | (row - matches)
    return length - (row & full).bit_count()


def _bits(nodes: int) -> Iterable[int]:
    while nodes:
        low = nodes & -nodes
        yield low.bit_length() - 1
        nodes ^= low


def _component(seen: int, neighbours: Sequence[int]) -> int:
    fresh = seen
    while fresh:
        reached = 0
        for node in _bits(fresh):
            reached |= neighbours[node]
        fresh = reached & ~seen
        seen |= fresh
    return seen


def _greedy(nodes: int, neighbours: Sequence[int]) -> list[int]:
    """Take the node with the fewest remaining neighbours, drop them, repeat."""
    chosen = []
    while nodes:
        node = min(_bits(nodes), key=lambda n: (neighbours[n] & nodes).bit_count())
        chosen.append(node)
        nodes &= ~(neighbours[node] | 1 << node)
    return chosen


def _improve(chosen: list[int], nodes: int, neighbours: Sequence[int]) -> list[int]:
    """Local search: put two or more nodes in the place of one while that is possible."""
    inside = sum(1 << node for node in chosen)
    better = True
    while better:
        better = False
        for node in _bits(inside):
            rest = inside ^ (1 << node)
            free = [n for n in _bits(nodes & ~rest) if not neighbours[n] & rest and n != node]
            pair = next(((a, b) for a, b in itertools.combinations(free, 2) if not neighbours[a] >> b & 1), None)
            if pair:
                inside, better = rest | 1 << pair[0] | 1 << pair[1], True
                for other in free:
                    if not neighbours[other] & inside:
                        inside |= 1 << other
                break
    return list(_bits(inside))


def _branch_and_bound(
    best: list[int], nodes: int, neighbours: Sequence[int], deadline: float | None
) -> tuple[list[int], bool]:
    """Exact search from a good start; (best set, whether the search was finished)."""
    found, stopped = best, False

    def search(taken: list[int], candidates: int) -> None:
        nonlocal found, stopped
        for node, bound in reversed(_coloured(candidates, neighbours)):
            if len(taken) + bound <= len(found) or stopped:
                return
            if deadline is not None and time.monotonic() > deadline:
                stopped = True
                return
            rest = candidates & ~(neighbours[node] | 1 << node)
            if rest:
                search([*taken, node], rest)
            elif len(taken) + 1 > len(found):
                found = [*taken, node]
            candidates &= ~(1 << node)

    search([], nodes)
    return found, not stopped


def _coloured(nodes: int, neighbours: Sequence[int]) -> list[tuple[int, int]]:
    """The nodes class by class, each class pairwise adjacent, with the number of classes up to theirs.

    An independent set takes at most one node of a class, so that number bounds what the nodes so far can add.
    """
    order, classes = [], 0
    while nodes:
        classes += 1
        fit = nodes
        while fit:
            node = (fit & -fit).bit_length() - 1
            order.append((node, classes))
            nodes ^= 1 << node
            fit &= neighbours[node]
    return order
