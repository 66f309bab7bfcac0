"""Questions of two types with eight candidate answers each, generated with their exact worth.

Verifiable ones are word problems of arithmetic: an answer is right or wrong, long or bare, and now and then breaks off
before it says its number. Open ones ask for the description of an object of five attributes: an answer is worth the
share of attributes that it gets right less the share that it gets wrong. How an answer is worded has nothing to do with
its worth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CANDIDATES = 8
NAMES = ("Ana", "Bo", "Chidi", "Dora", "Emre", "Farah", "Goran", "Hana")
ITEMS = ("apples", "coins", "books", "marbles", "stamps", "pencils", "shells", "cards")
BOXES = ("bags", "boxes", "packs", "rows")
OBJECTS = ("lamp", "chair", "kettle", "clock", "basket", "mirror", "drum", "vase")
ATTRIBUTES = {
    "colour": ("red", "green", "blue", "white", "black", "yellow"),
    "material": ("wood", "steel", "glass", "paper", "leather", "stone"),
    "size": ("tiny", "small", "large", "huge", "tall", "flat"),
    "age": ("new", "old", "ancient", "recent", "medieval", "worn"),
    "place": ("kitchen", "garden", "attic", "office", "hallway", "cellar"),
}
SAYINGS = {
    "colour": ("It is {}.", "Its colour is {}."),
    "material": ("It is made of {}.", "Somebody built it from {}."),
    "size": ("It looks {}.", "As to size, {} describes it."),
    "age": ("It seems {}.", "One would call it {}."),
    "place": ("It stands in the {}.", "You find it in the {}."),
}


@dataclass(frozen=True)
class Answers:
    """Candidates, eight in a row for each question.

    Attributes
    ----------
    prompts, completions, types, answers, references : lists of N texts
        `answers` has the number of a word problem, and None for an open question; `references` a full answer.
    groups : int (N,)
    worth : float (N,)
        0 or 1 for a word problem, [0, 1] for a description.
    """

    prompts: list[str]
    completions: list[str]
    types: list[str]
    answers: list[str | None]
    references: list[str]
    groups: np.ndarray
    worth: np.ndarray


def draw_answers(rng: np.random.Generator, questions: int = 40) -> Answers:
    """`questions` word problems and as many descriptions, with their candidates."""
    rows: list[tuple[str, str, str, str | None, str, int, float]] = []
    for number in range(2 * questions):
        word_problem = number < questions
        prompt, answer, reference, candidates = _problem(rng) if word_problem else _description(rng)
        kind = "verifiable" if word_problem else "open"
        rows += [(prompt, text, kind, answer, reference, number, worth) for text, worth in candidates]
    prompts, completions, types, answers, references, groups, worth = (list(part) for part in zip(*rows, strict=True))
    return Answers(prompts, completions, types, answers, references, np.array(groups), np.array(worth))


def _problem(rng: np.random.Generator) -> tuple[str, str, str, list[tuple[str, float]]]:
    name, items, boxes = (str(rng.choice(choices)) for choices in (NAMES, ITEMS, BOXES))
    a, b, c = (int(rng.integers(low, high)) for low, high in ((3, 60), (2, 9), (3, 12)))
    prompt = f"{name} has {a} {items} and gets {b} {boxes} of {c} more. How many {items} does {name} have then?"
    total = a + b * c
    candidates = []
    for _ in range(CANDIDATES):
        product = b * c
        fate = rng.choice(["right", "slip", "sum", "broken"], p=[0.4, 0.3, 0.2, 0.1])
        if fate == "slip":
            product += int(rng.choice([-10, -1, 1, 10]))
        said = a + b + c if fate == "sum" else a + product
        long = f"{name} gets {b} * {c} = {product} {items}, and with the {a} from before that makes "
        style = rng.integers(3)
        text = ("", long, f"We add what comes in the {boxes} to the {a} {items}. {long}")[style]
        text += "so many that" if fate == "broken" else f"{said}."
        candidates.append((text.strip(), float(fate != "broken" and said == total)))
    return prompt, str(total), f"{name} gets {b} * {c} = {b * c} {items}, and {a} + {b * c} = {total}.", candidates


def _description(rng: np.random.Generator) -> tuple[str, None, str, list[tuple[str, float]]]:
    thing = str(rng.choice(OBJECTS))
    true = {name: str(rng.choice(values)) for name, values in ATTRIBUTES.items()}
    candidates = []
    for _ in range(CANDIDATES):
        sentences, worth = [f"This is a {thing}."], 0.0
        skill = rng.random()
        for name in rng.permutation(list(ATTRIBUTES)):
            if rng.random() < 0.3:
                continue
            said = true[name] if rng.random() < skill else str(rng.choice(ATTRIBUTES[name]))
            worth += (1 if said == true[name] else -1) / len(ATTRIBUTES)
            sentences.append(SAYINGS[name][rng.integers(2)].format(said))
        candidates.append((" ".join(sentences), max(worth, 0.0)))
    listed = ", ".join(f"{name} {value}" for name, value in true.items())
    reference = " ".join([f"This is a {thing}.", *(SAYINGS[name][0].format(value) for name, value in true.items())])
    return f"Describe the {thing} ({listed}).", None, reference, candidates
