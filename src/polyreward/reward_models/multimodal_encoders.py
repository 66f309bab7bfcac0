"""Encoders of prompts with images and text, frozen or learning, and the one that reads responses together.

`MultimodalEncoder` gives features once; `FineTunedMultimodalEncoder` learns with the head, in full or by LoRA, and with
``together=True`` reads all responses of a comparison in one pass (You Only Judge Once, arXiv 2604.10966). Both take
vision-language models with their processors and language models with their tokenizers, and pool the response alone, by
its own tokens: no end-of-turn token is put behind it, for any response.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError, MissingFileError, require
from polyreward.preferences import Column
from polyreward.reward_models.fine_tuning import FineTunedEncoder, model_under_adapter
from polyreward.reward_models.multi_response import (
    RespRepr,
    check_representation,
    hidden_states,
    response_vectors,
)
from polyreward.reward_models.multi_response_batch import SEPARATOR, add_separator, response_boundaries
from polyreward.reward_models.multimodal_inputs import (
    PromptInputs,
    control_tokens,
    model_inputs,
    prompt_keys,
    read_prompts,
    response_tokens,
    tokenizer_of,
    width_of,
)
from polyreward.reward_models.text_encoders import batches_by_length, known_as, load
from polyreward.storage import write_json

Order = Literal["content", "given"]


@dataclass(frozen=True, eq=False)
class MultimodalEncoder:
    """Hidden states of a frozen vision-language model (or language model) of transformers.

    Parameters
    ----------
    model : name on the Hugging Face hub, folder, or a loaded model
    processor : processor or tokenizer, optional
        Default: the one that belongs to `model`; must be given with a loaded model.
    resp_repr : as of `response_vectors`
        What stands for the response: "last" is its last token.
    max_length : int
        Tokens of prompt and response. A longer prompt of text loses its beginning; with images it is an error.
    batch_tokens : int
        Tokens of a batch, padding included.
    device, dtype : where and in what the model computes; features are float32
    name : str, optional
        Identity of a loaded model; default its ``name_or_path``.
    """

    model: Any
    processor: Any = None
    resp_repr: RespRepr = "last"
    max_length: int = 2048
    batch_tokens: int = 16_384
    device: str = "cpu"
    dtype: str = "float32"
    name: str = ""

    def __post_init__(self) -> None:
        check_representation(self.resp_repr)
        if self.max_length < 1 or self.batch_tokens < 1:
            raise InvalidInputError("max_length and batch_tokens must be at least 1")

    @property
    def identity(self) -> str:
        """Model and what changes the features."""
        name = known_as(self.name, self.model, "MultimodalEncoder")
        return f"multimodal {name} {self.resp_repr} {self.max_length} {self.dtype}"

    def encode(self, prompts: Column, responses: Column) -> np.ndarray:
        """Features float32 (M, d) of the responses given their prompts."""
        network, processor = self._loaded
        if not len(responses):
            return np.zeros((0, self.width), np.float32)
        return self._read(prompts, responses, network, processor)

    def encode_prompts(self, prompts: Column) -> np.ndarray:
        """Features float32 (N, H) of the prompts alone: of their last token."""
        network, processor = self._loaded
        if not len(prompts):
            return np.zeros((0, width_of(network)), np.float32)
        return self._read(prompts, None, network, processor)

    @property
    def width(self) -> int:
        """Width d of the features."""
        return width_of(self._loaded[0]) * (2 if self.resp_repr == "first_last_concat" else 1)

    @torch.no_grad()
    def _read(self, prompts: Column, responses: Column | None, network: Any, processor: Any) -> np.ndarray:
        found = _features(
            network, processor, prompts, responses, [[row] for row in range(len(prompts))],
            resp_repr=self.resp_repr if responses is not None else "last", max_length=self.max_length,
            batch_tokens=self.batch_tokens, device=self.device,
        )  # fmt: skip
        return np.asarray(found.cpu().numpy(), dtype=np.float32)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        network, processor = load(self.model, self.processor, reads="processor")
        network = getattr(network, "base_model", network) if not hasattr(network, "peft_config") else network
        return network.to(self.device, getattr(torch, self.dtype)).eval().requires_grad_(False), processor


class FineTunedMultimodalEncoder(FineTunedEncoder):
    """A vision-language model (or language model) whose weights learn with the head, in full or by LoRA.

    Parameters
    ----------
    model, processor : as of `MultimodalEncoder`
    together : bool
        Read all responses of a comparison in one pass, with a separator between them; while it learns, in an order
        drawn anew each time. `encode` reads together what stands behind equal prompts.
    lora : mapping or ``peft.LoraConfig``, optional
        As of `FineTunedEncoder`. The separator's embedding learns too.
    resp_repr, max_length, batch_tokens : as of `MultimodalEncoder`
    order : "content" or "given"
        Order in which responses are read together outside training. "content" is an order by the hash of the responses:
        the score of a response does not depend on where in the list it stood, and files that put the chosen response
        first give nothing away. "given" keeps the caller's.
    gradient_checkpointing : bool
    name : str
        Where a loaded model comes from, for its configuration.

    Raises
    ------
    InvalidInputError
        Responses that do not fit `max_length`, or a prompt with images that would be cut.
    """

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        *,
        together: bool = False,
        lora: Any = None,
        resp_repr: RespRepr = "last",
        max_length: int = 2048,
        batch_tokens: int = 16_384,
        order: Order = "content",
        gradient_checkpointing: bool = False,
        name: str = "",
    ) -> None:
        check_representation(resp_repr)
        if order not in ("content", "given"):
            raise InvalidInputError(f"order must be 'content' or 'given', got {order!r}")
        named = name or (model if isinstance(model, str) else getattr(model.config, "_name_or_path", ""))
        network, processor = load(model, processor, reads="processor")
        separator = None
        if together:
            separator = add_separator(tokenizer_of(processor), network)
            if isinstance(lora, Mapping):
                lora = {"trainable_token_indices": [separator], **lora}
        super().__init__(
            network, tokenizer_of(processor), lora=lora, max_length=max_length, batch_tokens=batch_tokens,
            gradient_checkpointing=gradient_checkpointing, name=named,
        )  # fmt: skip
        self.settings: dict[str, Any] = {
            "together": together, "resp_repr": resp_repr, "max_length": max_length, "batch_tokens": batch_tokens,
            "order": order,
        }  # fmt: skip
        self.processor, self.separator = processor, separator
        self.together, self.resp_repr, self.order = together, resp_repr, order

    @property
    def identity(self) -> str:
        """Where the weights came from; they change, so it is no key for a cache."""
        return f"fine-tuned multimodal {self.name} {self.resp_repr}{' together' if self.together else ''}"

    @property
    def width(self) -> int:
        """Width d of the features."""
        return width_of(self.network) * (2 if self.resp_repr == "first_last_concat" else 1)

    def forward(self, prompts: Column, responses: Column, comparison: Tensor | None = None) -> Tensor:
        """Features float32 (M, d), with gradient.

        Parameters
        ----------
        prompts, responses : length M
        comparison : int64 (M,), optional
            What is read together; default equal prompts.
        """
        codes = _codes(prompts) if comparison is None else comparison.cpu().numpy()
        return self.read(prompts, responses, self._groups(codes, responses))

    def read(self, prompts: Column, responses: Column | None, groups: Sequence[Sequence[int]]) -> Tensor:
        """Features float32 (sum of the groups' sizes, d) of rows that are read together, in the order of `groups`."""
        return _features(
            self.network, self.processor, prompts, responses, groups, resp_repr=self.resp_repr,
            max_length=self.max_length, batch_tokens=self.batch_tokens, device=next(self.network.parameters()).device,
            separator=self.separator,
        )  # fmt: skip

    def _groups(self, codes: np.ndarray, responses: Column) -> list[list[int]]:
        if not self.together:
            return [[row] for row in range(len(codes))]
        if self.training:
            within = torch.rand(len(codes)).numpy()  # the fit seeds torch's own generator
        elif self.order == "content":
            keys = prompt_keys(responses)
            within = np.argsort(np.argsort(np.array([key.hex() for key in keys]), kind="stable"), kind="stable")
        else:
            within = np.arange(len(codes))
        rows = np.lexsort((within, codes))
        cuts = np.flatnonzero(np.diff(codes[rows])) + 1
        return [part.tolist() for part in np.split(rows, cuts)]

    @torch.no_grad()
    def encode_prompts(self, prompts: Column) -> np.ndarray:
        """Features float32 (N, H) of the prompts alone, as they are now: of their last token."""
        if not len(prompts):
            return np.zeros((0, width_of(self.network)), np.float32)
        device = next(self.network.parameters()).device
        return self._still(
            lambda: _features(
                self.network, self.processor, prompts, None, [[row] for row in range(len(prompts))], resp_repr="last",
                max_length=self.max_length, batch_tokens=self.batch_tokens, device=device,
            )
        )  # fmt: skip

    def save_pretrained(self, folder: str | Path) -> None:
        """The model, or only the adapter of LoRA, its processor, and how it reads."""
        self.network.save_pretrained(str(folder))
        self.processor.save_pretrained(str(folder))
        write_json(Path(folder) / "reading.json", {"name": self.name, **self.settings})

    @classmethod
    def from_pretrained(cls, folder: str | Path, base: Any = None, **settings: Any) -> FineTunedMultimodalEncoder:
        """Read back what `save_pretrained` wrote; `base` is the model under an adapter, default the one it names.

        Raises
        ------
        MissingFileError, InvalidInputError
            There is no model in the folder, or the adapter's model cannot be loaded.
        """
        folder = Path(folder)
        transformers: Any = require("transformers", "text")
        if not (folder / "reading.json").exists():
            raise MissingFileError(f"{folder} holds no multimodal encoder: there is no reading.json")
        settings = {**json.loads((folder / "reading.json").read_text(encoding="utf-8")), **settings}
        if not (folder / "adapter_config.json").exists():
            return cls(str(folder), **{**settings, "name": settings["name"] or str(folder)})
        peft: Any = require("peft", "text")
        under = model_under_adapter(folder, base)
        try:
            network = transformers.AutoModel.from_pretrained(under) if isinstance(under, str) else under
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"cannot load {under!r}: {str(error).splitlines()[0]}") from error
        processor = transformers.AutoProcessor.from_pretrained(str(folder))
        if len(tokenizer_of(processor)) > network.get_input_embeddings().num_embeddings:
            network.resize_token_embeddings(len(tokenizer_of(processor)))
        made = cls(network, processor, **settings)
        made.network = peft.PeftModel.from_pretrained(made.network, str(folder), is_trainable=True)
        return made


def _features(
    network: Any,
    processor: Any,
    prompts: Column,
    responses: Column | None,
    groups: Sequence[Sequence[int]],
    *,
    resp_repr: RespRepr,
    max_length: int,
    batch_tokens: int,
    device: Any,
    separator: int | None = None,
) -> Tensor:
    """Features (M, d) by row of what stands in each group behind its prompt; of the prompt alone without responses."""
    prompts, tokenizer = list(prompts), tokenizer_of(processor)
    control = control_tokens(processor, *((SEPARATOR,) if separator is not None else ()))
    # what several groups share is read once
    first = {id(prompts[group[0]]): group[0] for group in reversed(groups)}
    shared = read_prompts(processor, [prompts[row] for row in first.values()], [*first.values()], control)
    read = dict(zip(first, shared, strict=True))
    heads = [read[id(prompts[group[0]])] for group in groups]
    tokens = [[] for _ in prompts] if responses is None else response_tokens(tokenizer, responses, control)
    several = [[tokens[row] for row in group] for group in groups]
    tails = [_tail(parts, separator) for parts in several]
    heads = [
        _fitted(head, len(tail), max_length, group[0]) for head, tail, group in zip(heads, tails, groups, strict=True)
    ]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    found, order = [], []
    kinds = [head.kind for head in heads]
    for kind in dict.fromkeys(kinds):
        members = np.array([i for i, other in enumerate(kinds) if other == kind])
        for part in batches_by_length([len(heads[i].ids) + len(tails[i]) for i in members], batch_tokens):
            chosen = members[part].tolist()
            batch = model_inputs([heads[i] for i in chosen], [tails[i] for i in chosen], pad, device)
            states = hidden_states(network, **batch)
            start, end = response_boundaries(
                batch["input_ids"], batch["attention_mask"], -1 if separator is None else separator,
                [len(heads[i].ids) for i in chosen], [len(groups[i]) for i in chosen],
            )  # fmt: skip
            vectors = response_vectors(states, start, end, resp_repr)
            found.append(vectors[end >= 0].float())
            order += [row for i in chosen for row in groups[i]]
    back = torch.from_numpy(np.argsort(np.array(order), kind="stable"))
    return torch.cat(found)[back.to(device)]


def _tail(parts: Iterable[Sequence[int]], separator: int | None) -> list[int]:
    tail: list[int] = []
    for place, ids in enumerate(parts):
        if place:
            assert separator is not None
            tail.append(separator)
        tail.extend(ids)
    return tail


def _fitted(prompt: PromptInputs, tail: int, max_length: int, row: int) -> PromptInputs:
    """The prompt, without its beginning where it is too long: a response is never cut."""
    if len(prompt.ids) + tail <= max_length:
        return prompt
    if prompt.media or tail >= max_length:
        what = "a prompt with images cannot be cut" if prompt.media else "the responses alone do not fit"
        raise InvalidInputError(
            f"row {row}: {len(prompt.ids)} tokens of prompt and {tail} of responses, max_length is {max_length} and "
            f"{what}"
        )
    return PromptInputs(prompt.ids[tail - max_length :])


def _codes(prompts: Column) -> np.ndarray:
    codes: dict[bytes, int] = {}
    return np.array([codes.setdefault(key, len(codes)) for key in prompt_keys(prompts)], np.int64)
