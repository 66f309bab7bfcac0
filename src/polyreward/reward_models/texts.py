"""Prompts and responses as one text, and the hash by which it is known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from polyreward.errors import InvalidInputError
from polyreward.preferences import Column


def plain(part: Any, name: str = "response", row: int = 0) -> str:
    r"""A text, or chat messages as ``"\n\nrole: content"`` each; `InvalidInputError` names any other's row."""
    if isinstance(part, str):
        return part
    if isinstance(part, Sequence) and all(isinstance(m, Mapping) and "content" in m for m in part):
        return "".join(f"\n\n{m.get('role', 'user')}: {m['content']}" for m in part)
    raise InvalidInputError(f"{name} {row} must be a text or a list of chat messages, got {type(part).__name__}")


def joined(prompt: Any, response: Any, row: int = 0, tokenizer: Any = None) -> str:
    r"""Prompt and response as one text.

    A conversation goes through the tokenizer's chat template where there is one; else every message is
    ``"\n\nrole: content"``. Two texts are put one after the other, with a line break unless the prompt ends in white
    space.
    """
    if isinstance(prompt, str) and isinstance(response, str):
        return prompt + ("\n" if prompt and not prompt[-1].isspace() else "") + response
    messages = as_messages(prompt, "user") + as_messages(response, "assistant")
    if getattr(tokenizer, "chat_template", None):
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    return plain(messages, row=row)


def as_messages(part: Any, role: str) -> list[dict[str, Any]]:
    """Chat messages of a text or of messages."""
    if isinstance(part, str):
        return [{"role": role, "content": part}] if part else []
    plain(part)
    return [dict(message) for message in part]


def digests(prompts: Column, responses: Column) -> list[bytes]:
    """16 bytes that are the same for the same prompt and response, whatever process or machine."""
    encoder = json.JSONEncoder(ensure_ascii=True, sort_keys=True, default=_number)
    return [
        hashlib.blake2b(encoder.encode([prompt, response]).encode(), digest_size=16).digest()
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def _number(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise InvalidInputError(f"a prompt or response must be text, messages or a row number, got {type(value).__name__}")
