"""A reference answer behind a chain of thought as token ids: text is joined, tokenised once, and the answer located.

Tokenising chain and answer apart would move the boundary between them, so prompt, chain, answer tags and reference are
tokenised as one text. The answer's tokens are those that hold characters from the first of the reference to the end of
its closing tag; without a closing tag, the end-of-text token closes it, for otherwise length would be free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polyreward.errors import InvalidInputError


@dataclass(frozen=True)
class AnswerTemplate:
    """How a reference stands behind a chain: ``chain + prefix + reference + suffix``.

    Parameters
    ----------
    prefix, suffix : str
        Tags around the answer. The suffix counts as part of the answer.
    reasoning_end : str, optional
        Tag that closes the reasoning: the chain goes up to its first occurrence, included. Default: the chain goes up
        to the first occurrence of `prefix`, not included. Where the tag does not occur, the chain was cut off.
    end_token : bool, optional
        Whether the tokenizer's end-of-text token follows and counts. Default: where the suffix is empty.

    Raises
    ------
    InvalidInputError
        Neither `prefix` nor `reasoning_end` says where a chain ends.
    """

    prefix: str = "<answer>"
    suffix: str = "</answer>"
    reasoning_end: str | None = None
    end_token: bool | None = None

    def __post_init__(self) -> None:
        if not (self.reasoning_end if self.reasoning_end is not None else self.prefix.strip()):
            raise InvalidInputError("a chain needs an end: give answer_prefix or reasoning_end")

    @property
    def ends_with_token(self) -> bool:
        """Whether the end-of-text token counts."""
        return not self.suffix if self.end_token is None else self.end_token

    def chain(self, completion: str) -> str | None:
        """The chain of thought in a completion; None where it is cut off."""
        if self.reasoning_end is not None:
            before, found, _ = completion.partition(self.reasoning_end)
            return before + found if found else None
        before, found, _ = completion.partition(self.prefix.strip())
        # Space that belongs to the prefix would otherwise stand there twice.
        return before.removesuffix(self.prefix[: -len(self.prefix.lstrip())]) if found else None


@dataclass(frozen=True)
class Encoded:
    """Token ids of N texts that end with an answer.

    Attributes
    ----------
    ids : N lists of token ids
    lengths : N integers, how many of the last ids are the answer; 0 where the reference has no token
    chain_tokens : N integers, tokens of the chain
    """

    ids: list[list[int]]
    lengths: list[int]
    chain_tokens: list[int]


def prompt_text(tokenizer: Any, prompt: Any, options: Mapping[str, Any]) -> str:
    """A prompt as the text that the policy continues: itself, or its messages in the tokenizer's chat template."""
    if isinstance(prompt, str):
        return prompt
    messages = [prompt] if isinstance(prompt, Mapping) else list(prompt)
    opened = bool(messages) and messages[-1].get("role") == "assistant"
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=not opened, continue_final_message=opened, **options
    )
    return str(text)


def completion_text(tokenizer: Any, prompt: str, special: bool, completion_ids: Sequence[int]) -> str | None:
    """What the policy wrote after `prompt`, as its token ids say: with the space it begins with, and special tokens.

    Decoding the completion by itself may drop both. None where the decoded prompt is not the beginning of the whole.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    before = _plain(tokenizer, prompt, special)
    head, whole = (
        tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for ids in (before, [*before, *completion_ids])
    )
    return whole[len(head) :] if whole.startswith(head) else None


def encode(
    tokenizer: Any,
    template: AnswerTemplate,
    prompts: Sequence[str],
    chains: Sequence[str],
    references: Sequence[str],
    special: Sequence[bool],
) -> Encoded:
    """Token ids of each ``prompt + chain + prefix + reference + suffix``, with the answer located.

    Parameters
    ----------
    prompts, chains, references : N texts
    special : N bools
        Whether the tokenizer puts its own tokens around the text (not for chat templates, which hold them).

    Raises
    ------
    InvalidInputError
        The template asks for an end-of-text token that the tokenizer does not have.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    heads = [p + c + template.prefix for p, c in zip(prompts, chains, strict=True)]
    texts = [_writable(h + r + template.suffix) for h, r in zip(heads, references, strict=True)]
    rows: list[tuple[list[int], int, int]] = [([], 0, 0)] * len(texts)
    for kind in set(special):
        chosen = [row for row, own in enumerate(special) if own == kind]
        located = _by_offsets if getattr(tokenizer, "is_fast", False) else _by_ids
        spans = [(len(prompts[r]), len(prompts[r]) + len(chains[r]), len(heads[r]), len(references[r])) for r in chosen]
        for row, found in zip(chosen, located(tokenizer, [texts[r] for r in chosen], spans, kind), strict=True):
            rows[row] = found
    end = [tokenizer.eos_token_id] if template.ends_with_token else []
    if None in end:
        raise InvalidInputError("the tokenizer has no end-of-text token to close the answer; set answer_suffix")
    return Encoded(
        [ids + end for ids, _, _ in rows],
        [length + len(end) if length else 0 for _, length, _ in rows],
        [chain for _, _, chain in rows],
    )


def share_prefixes(ids: Sequence[Sequence[int]], lengths: Sequence[int], keys: Sequence[Any]) -> Any:
    """Split N texts into what those with the same key begin with and the rest.

    Returns
    -------
    prefixes : distinct beginnings; owners : index of its beginning for each text; suffixes : N rests, answer included
    """
    members: dict[Any, list[int]] = {}
    for row, key in enumerate(keys):
        members.setdefault(key, []).append(row)
    prefixes: list[list[int]] = []
    owners, suffixes = [0] * len(ids), [[]] * len(ids)  # type: ignore[var-annotated]
    for rows in members.values():
        before = min(len(ids[row]) - lengths[row] for row in rows)
        common = _common([list(ids[row][:before]) for row in rows])
        for row in rows:
            owners[row], suffixes[row] = len(prefixes), list(ids[row][len(common) :])
        prefixes.append(common)
    return prefixes, owners, suffixes


def _by_offsets(tokenizer: Any, texts: list[str], spans: list[Any], special: bool) -> list[tuple[list[int], int, int]]:
    encoded = tokenizer(texts, add_special_tokens=special, return_offsets_mapping=True)
    found = []
    for ids, offsets, (begin, stop, start, size) in zip(
        encoded["input_ids"], encoded["offset_mapping"], spans, strict=True
    ):
        count = len(ids)
        while count and offsets[count - 1][1] == 0:  # an end-of-text token that the tokenizer appends
            count -= 1
        answer = [first < start + size and last > start for first, last in offsets[:count]]
        first = answer.index(True) if any(answer) else count
        chain = sum(begin <= left < stop and right > left for left, right in offsets[:count])
        found.append((ids[:count], count - first, chain))
    return found


def _by_ids(tokenizer: Any, texts: list[str], spans: list[Any], special: bool) -> list[tuple[list[int], int, int]]:
    """Without offsets: the answer begins where the ids differ from those of the text before it."""
    found = []
    for text, (begin, stop, start, size) in zip(texts, spans, strict=True):
        parts = (text, text[:start], text[:start] + text[start + size :], text[:begin], text[:stop])
        ids, head, without, prompt, chain = (_plain(tokenizer, part, special) for part in parts)
        length = 0 if ids == without else len(ids) - len(_common([ids, head]))
        found.append((ids, length, len(chain) - len(prompt)))
    return found


def _writable(text: str) -> str:
    """Text without lone surrogates, which no tokenizer takes, in the same number of characters."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _common(rows: Sequence[list[int]]) -> list[int]:
    """What all rows begin with: what the smallest and the largest in the order of lists share."""
    first, last = min(rows), max(rows)
    apart = (place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return first[: next(apart, min(len(first), len(last)))]


def _plain(tokenizer: Any, text: str, special: bool) -> list[int]:
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    while special and ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token)):
        ids.pop()
    return ids
