"""The trusted reward: a verifier or held-out score that the other rewards stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyreward.errors import InvalidInputError, MissingColumnError, nearest

if TYPE_CHECKING:
    from polyreward.audit.diagnose.evidence import Evidence

REFERENCE_WORDS = (
    "held_out", "heldout", "held-out", "ground_truth", "verifier", "verified", "oracle", "gold", "true_reward",
    "correct", "accuracy", "exact_match", "exact", "solved", "success", "pass_rate", "task_score",
)  # fmt: skip
REFERENCE_NAMES = ("acc", "passed", "em")


def may_be_trusted(name: str) -> bool:
    """Whether a reward or column of this name is likely a verifier or held-out score."""
    return name.lower() in REFERENCE_NAMES or any(word in name.lower() for word in REFERENCE_WORDS)


def find_reference(evidence: Evidence, name: str | None) -> str | None:
    """What the caller names, else the reward or column of numbers whose name says most plainly that it is trusted.

    Raises
    ------
    MissingColumnError, InvalidInputError
        The name is neither a reward nor a column, or it is a column without numbers.
    """
    known = [*evidence.names, *evidence.batch.columns]
    if name is not None:
        if name not in known:
            raise MissingColumnError(f"the reference {name!r} is neither a reward nor a column{nearest(name, known)}")
        if name not in evidence.names and evidence.numbers(name) is None:
            raise InvalidInputError(f"the reference {name!r} is a column without numbers; expected one number a row")
        return name
    words = [*REFERENCE_WORDS, *REFERENCE_NAMES]
    likely = sorted(
        filter(may_be_trusted, known),
        key=lambda known: next(i for i, word in enumerate(words) if word in known.lower()),
    )
    return next((c for c in likely if c in evidence.names or evidence.numbers(c) is not None), None)
