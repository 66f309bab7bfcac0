"""Prompts that hold images with text, as the numbers that a vision-language model reads.

A prompt is a text, or the list of chat messages of transformers whose contents are texts or lists of parts
``{"type": "text", "text": ...}`` and ``{"type": "image", "image": PIL image, (H, W, C) array, or path}``. It goes
through the processor of the model, alone, so that its token numbers and the tensors of its images belong to it;
responses are texts and are put behind it as token numbers. Control tokens in texts that people or models wrote are
taken out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError, MissingFileError, require
from polyreward.preferences import Column
from polyreward.reward_models.multi_response_batch import strip_separator
from polyreward.reward_models.text_encoders import tokenize
from polyreward.reward_models.texts import plain

_PLACEHOLDERS = ("image", "video", "audio")


@dataclass(frozen=True)
class PromptInputs:
    """A prompt as a model reads it.

    Attributes
    ----------
    ids : list of token numbers, with a placeholder for every piece of an image
    by_token : mapping of name to a number for each token, where the processor gives such
    media : mapping of name to the tensors of its images, such as ``pixel_values``
    """

    ids: list[int]
    by_token: Mapping[str, list[int]] = field(default_factory=dict)
    media: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What prompts of one pass must have in common: no images, or tensors that fit together."""
        return (*self.by_token, *((name, tuple(value.shape[1:])) for name, value in self.media.items()))


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor, or the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def width_of(network: Any) -> int:
    """H, the width of the hidden states of the language model."""
    config = network.config
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return int(config.hidden_size)


def control_tokens(processor: Any, *more: str) -> tuple[str, ...]:
    """Tokens that stand for images, video and sound, and `more`: none of them may come from a text."""
    tokenizer = tokenizer_of(processor)
    found = [getattr(owner, f"{kind}_token", None) for kind in _PLACEHOLDERS for owner in (processor, tokenizer)]
    return tuple(dict.fromkeys([*more, *(token for token in found if isinstance(token, str) and token)]))


def read_prompts(
    processor: Any, prompts: Column, rows: Sequence[int] | None = None, control: Sequence[str] = ()
) -> list[PromptInputs]:
    r"""Prompts with their images through the processor; `rows` are their names in errors.

    A conversation goes through the chat template where there is one, up to where the assistant begins; else every
    message is ``"\n\nrole: content"``. A text ends in a line break unless it ends in white space.

    Raises
    ------
    InvalidInputError
        What is no prompt, an image that cannot be read, or a processor without images; names the row.
    MissingFileError
        An image that is a path without a file.
    """
    control = tuple(control) or control_tokens(processor)
    places = range(len(prompts)) if rows is None else rows
    rendered = [_rendered(processor, prompt, row, control) for prompt, row in zip(prompts, places, strict=True)]
    # texts without images go through the tokenizer at once
    texts = iter(tokenize(tokenizer_of(processor), [text for text, images in rendered if not images], 2**31))
    return [
        _with_images(processor, text, images, row) if images else PromptInputs(next(texts))
        for (text, images), row in zip(rendered, places, strict=True)
    ]


def _with_images(processor: Any, text: str, images: list[Any], row: int) -> PromptInputs:
    try:
        found = dict(processor(text=[text], images=[images], return_tensors="pt"))
    except (ValueError, TypeError, RuntimeError) as error:
        raise InvalidInputError(f"prompt {row}: the processor refused it ({error})") from error
    mask = found.pop("attention_mask", torch.ones_like(found["input_ids"]))[0].bool()
    ids = found.pop("input_ids")
    by_token = {name: value[0][mask].tolist() for name, value in found.items() if value.shape == ids.shape}
    media = {name: value for name, value in found.items() if name not in by_token}
    return PromptInputs(ids[0][mask].tolist(), by_token, media)


def response_tokens(tokenizer: Any, responses: Column, control: Sequence[str] = ()) -> list[list[int]]:
    """Token numbers of responses, without control tokens."""
    texts = [_response(response, row) for row, response in enumerate(responses)]
    texts = [strip_separator(text, *control) if control else text for text in texts]
    # the prompt has the tokens that begin a text
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return [list(one) for one in ids]


def model_inputs(
    prompts: Sequence[PromptInputs], tails: Sequence[Sequence[int]], pad: int = 0, device: Any = "cpu"
) -> dict[str, Tensor]:
    """A batch of prompts of one `kind` with token numbers behind them, padded on the right."""
    rows = [[*prompt.ids, *tail] for prompt, tail in zip(prompts, tails, strict=True)]
    longest = max(len(row) for row in rows)
    mask = np.arange(longest)[None] < np.array([len(row) for row in rows])[:, None]

    def padded(values: Iterable[Sequence[int]], filler: int) -> Tensor:
        out = np.full(mask.shape, filler, np.int64)
        out[mask] = np.concatenate([np.asarray(one, np.int64) for one in values])
        return torch.from_numpy(out).to(device)

    batch = {"input_ids": padded(rows, pad), "attention_mask": torch.from_numpy(mask.astype(np.int64)).to(device)}
    for name in prompts[0].by_token:
        pairs = zip(prompts, tails, strict=True)
        batch[name] = padded([[*prompt.by_token[name], *([0] * len(tail))] for prompt, tail in pairs], 0)
    for name in prompts[0].media:
        batch[name] = torch.cat([prompt.media[name] for prompt in prompts]).to(device)
    return batch


def prompt_keys(prompts: Column) -> list[bytes]:
    """16 bytes for each prompt that are equal for equal texts and images."""
    prompts = list(prompts)  # which keeps what an array hands out, and with it the ids, alive
    known: dict[int, bytes] = {}
    for prompt in prompts:
        if id(prompt) not in known:
            known[id(prompt)] = _key(prompt)
    return [known[id(prompt)] for prompt in prompts]


def _rendered(processor: Any, prompt: Any, row: int, control: Sequence[str]) -> tuple[str, list[Any]]:
    if isinstance(prompt, str):
        text = strip_separator(prompt, *control) if control else prompt
        return text + ("\n" if text and not text[-1].isspace() else ""), []
    if not isinstance(prompt, Sequence) or not all(isinstance(m, Mapping) and "content" in m for m in prompt):
        raise InvalidInputError(f"prompt {row} must be a text or a list of chat messages, got {type(prompt).__name__}")
    images: list[Any] = []
    messages = []
    for message in prompt:
        parts = _parts(message["content"], row)
        images += [_image(part, row) for part in parts if part["type"] == "image"]
        cleaned = [
            {"type": "image"} if part["type"] == "image"
            else {"type": "text", "text": strip_separator(part["text"], *control) if control else part["text"]}
            for part in parts
        ]  # fmt: skip
        messages.append({"role": message.get("role", "user"), "content": cleaned})
    template = getattr(processor, "chat_template", None)
    if template and hasattr(processor, "image_processor"):
        return str(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)), images
    if images and not hasattr(processor, "image_processor"):
        raise InvalidInputError(f"prompt {row} holds images, and {type(processor).__name__} reads only texts")
    mark = next((token for token in control_tokens(processor)), "") if images else ""
    flat = [
        {"role": m["role"], "content": "".join(mark if p["type"] == "image" else p["text"] for p in m["content"])}
        for m in messages
    ]
    if template:
        return str(processor.apply_chat_template(flat, tokenize=False, add_generation_prompt=True)), images
    return plain(flat, "prompt", row) + "\n\nassistant: ", images


def _parts(content: Any, row: int) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts = []
    for part in content if isinstance(content, Sequence) else [content]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if (kind == "text" and isinstance(part.get("text"), str)) or (
            kind == "image" and any(part.get(name) is not None for name in ("image", "path"))
        ):
            parts.append(dict(part))
        else:
            raise InvalidInputError(
                f"prompt {row}: a part must be {{'type': 'text', 'text': ...}} or {{'type': 'image', 'image': ...}}, "
                f"got {str(part)[:80]}"
            )
    return parts


def _image(part: Mapping[str, Any], row: int) -> Any:
    found = part["image"] if part.get("image") is not None else part["path"]
    library: Any = require("PIL.Image", "text")
    if isinstance(found, str | Path):
        if not Path(found).is_file():
            raise MissingFileError(f"prompt {row}: there is no image {found}")
        try:
            with library.open(found) as opened:
                return opened.convert("RGB")
        except OSError as error:
            raise InvalidInputError(f"prompt {row}: {found} is no image ({error})") from error
    if isinstance(found, Tensor):
        found = found.cpu().numpy()
    if isinstance(found, np.ndarray):
        array = found if found.ndim == 3 else np.repeat(found[..., None], 3, axis=-1) if found.ndim == 2 else None
        if array is None or array.shape[-1] not in (1, 3, 4) or array.dtype.kind not in "uif":
            raise InvalidInputError(
                f"prompt {row}: an image must be (H, W) or (H, W, C) numbers, got {found.dtype} {found.shape}"
            )
        if array.dtype.kind == "f":
            if not ((array >= 0) & (array <= 1)).all():
                raise InvalidInputError(f"prompt {row}: an image of floating-point numbers must be in [0, 1]")
            array = np.rint(array * 255)
        if array.min() < 0 or array.max() > 255:
            raise InvalidInputError(f"prompt {row}: an image of whole numbers must be in 0..255")
        array = np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array
        return library.fromarray(array.astype(np.uint8)).convert("RGB")
    if hasattr(found, "convert"):
        return found.convert("RGB")
    raise InvalidInputError(f"prompt {row}: an image must be a PIL image, array or path, got {type(found).__name__}")


def _response(response: Any, row: int) -> str:
    if isinstance(response, str):
        return response
    if isinstance(response, Sequence) and all(isinstance(m, Mapping) and "content" in m for m in response):
        texts = []
        for message in response:
            parts = _parts(message["content"], row)
            if any(part["type"] == "image" for part in parts):
                raise InvalidInputError(f"response {row} holds an image; only prompts may")
            texts += [part["text"] for part in parts]
        return "\n\n".join(texts)
    raise InvalidInputError(f"response {row} must be a text or a list of chat messages, got {type(response).__name__}")


def _key(prompt: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=16)

    def feed(value: Any) -> None:
        if isinstance(value, Mapping):
            for name in sorted(value, key=str):
                feed(str(name))
                feed(value[name])
            digest.update(b"}")
        elif isinstance(value, list | tuple):
            for item in value:
                feed(item)
            digest.update(b"]")
        elif hasattr(value, "tobytes") and not isinstance(value, str):
            shape = getattr(value, "shape", None) or getattr(value, "size", ())
            digest.update(f"{getattr(value, 'dtype', getattr(value, 'mode', ''))} {shape}".encode())
            digest.update(value.tobytes())
        elif isinstance(value, Tensor):
            feed(value.cpu().numpy())
        else:
            name = "str" if isinstance(value, str) else type(value).__name__
            digest.update(f"{name} {value}\0".encode())

    feed(prompt)
    return digest.digest()
