"""What goes to a chat endpoint and comes back: messages, replies, their totals, and the folder that keeps them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyreward.endpoint_transport import Outcome
from polyreward.errors import InvalidInputError
from polyreward.storage import write_text


@dataclass(frozen=True)
class ChatReply:
    """What came of one conversation.

    Attributes
    ----------
    text : str or None
        What the model wrote; None where the request failed.
    error : str or None
        Why it failed: "429 after 5 tries", "timeout after 30 s", ...
    prompt_tokens, completion_tokens : int
        As the server counts them; 0 where it does not tell.
    finish_reason : str or None
        "stop", "length", ...
    logprobs : as the server gives them, or None
    cached : bool
        Nothing was sent: the reply was on disk, or the same request stands earlier in the call.
    tries : int
        Requests sent for it.
    """

    text: str | None
    error: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str | None = None
    logprobs: Any = None
    cached: bool = False
    tries: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Usage:
    """What a client has sent and received since it was made; replies from the cache count in `cached` alone.

    Attributes
    ----------
    answered, cached, failed : int
        Conversations by what came of them.
    retries : int
        Requests beyond the first of a conversation.
    prompt_tokens, completion_tokens : int
    cost : float or None
        By the client's prices, in their currency; None without prices.
    """

    answered: int = 0
    cached: int = 0
    failed: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None


@dataclass(frozen=True)
class ReplyCache:
    """A folder with one JSON file a reply, written whole: any number of processes and machines may share it.

    Attributes
    ----------
    folder : Path
    """

    folder: Path

    def get(self, key: str) -> ChatReply | None:
        """The reply under a key; None where there is none that can be read."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            reply = ChatReply(**json.loads(self._path(key).read_text(encoding="utf-8"))["reply"], cached=True)
            return reply if isinstance(reply.text, str) else None
        return None

    def put(self, key: str, body: str, reply: ChatReply) -> None:
        """Keep a reply with the request that it answers.

        Raises
        ------
        StorageError
            The file cannot be written.
        """
        names = ("text", "prompt_tokens", "completion_tokens", "finish_reason", "logprobs")
        record = {"request": json.loads(body), "reply": {name: getattr(reply, name) for name in names}}
        write_text(self._path(key), json.dumps(record, indent=1))  # ASCII: a reply may hold half of a character

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


def messages_of(conversation: Any, row: int) -> list[dict[str, Any]]:
    """A conversation as messages; an error names its place."""
    if isinstance(conversation, str):
        return [{"role": "user", "content": conversation}]
    listed = isinstance(conversation, Sequence) and not isinstance(conversation, bytes) and len(conversation) > 0
    if not listed or not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in conversation):
        found = repr(conversation)
        raise InvalidInputError(
            f"conversation {row}: expected a text or a list of messages with role and content, got {found[:100]}"
        )
    return [dict(message) for message in conversation]


def sorted_json(body: str) -> str:
    """JSON with its keys in order, so that equal requests are equal texts."""
    return json.dumps(json.loads(body), sort_keys=True)


def read_reply(outcome: Outcome) -> tuple[ChatReply, dict[str, int]]:
    """A reply from what came of a request, and what to add to the counts."""
    counts = {"retries": max(outcome.tries - 1, 0)}
    if outcome.data is None:
        return ChatReply(None, outcome.failure, tries=outcome.tries), counts
    choice, usage = outcome.data["choices"][0], outcome.data.get("usage")
    choice = choice if isinstance(choice, dict) else {}
    prompt, completion = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    message, reason = choice.get("message"), choice.get("finish_reason")
    message, reason = message if isinstance(message, dict) else {}, reason if isinstance(reason, str) else None
    text, refusal, error = _text(message.get("content")), message.get("refusal"), None
    if text is None:
        refused = f"refused: {' '.join(refusal.split())[:200]}" if isinstance(refusal, str) and refusal else None
        error = refused or f"a reply without text (finish reason {reason!r})"
    reply = ChatReply(text, error, prompt, completion, reason, choice.get("logprobs"), tries=outcome.tries)
    return reply, counts | {"prompt_tokens": prompt, "completion_tokens": completion}


def _text(content: Any) -> str | None:
    if isinstance(content, list):
        parts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        return "".join(parts) if parts else None
    return content if isinstance(content, str) else None


def _count(usage: Any, name: str) -> int:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if type(value) is int and value > 0 else 0
