"""`FineTunedEncoder`: a language model whose weights learn with the head, in full or by LoRA (arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyreward.errors import InvalidInputError, MissingFileError, require
from polyreward.preferences import Column
from polyreward.reward_models.text_encoders import Pooling, batches_by_length, load, pad, pool, tokenize
from polyreward.reward_models.texts import joined, plain


class FineTunedEncoder(nn.Module):
    """A model of transformers as an encoder that learns.

    Parameters
    ----------
    model : name on the Hugging Face hub, folder, or a loaded model
    tokenizer : tokenizer, optional
        Default: the one that belongs to `model`; must be given with a loaded model.
    lora : mapping or ``peft.LoraConfig``, optional
        Learn low-rank changes and no other weights: ``{"r": 16, "target_modules": ["q_proj", "v_proj"]}``. None learns
        all weights.
    pooling : "last", "mean" or "first" token
    max_length : int
        Tokens; what is longer loses its beginning.
    batch_tokens : int
        Tokens of one forward pass, padding included: a batch of the fit is spread over as many passes as that takes.
    gradient_checkpointing : bool
        Compute activations again in place of keeping them.
    name : str
        Where a loaded model comes from, for its configuration.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        lora: Any = None,
        pooling: Pooling = "last",
        max_length: int = 2048,
        batch_tokens: int = 16_384,
        gradient_checkpointing: bool = False,
        name: str = "",
    ) -> None:
        super().__init__()
        self.settings = {"pooling": pooling, "max_length": max_length, "batch_tokens": batch_tokens}
        self.name = name or (model if isinstance(model, str) else getattr(model.config, "_name_or_path", ""))
        network, self.tokenizer = load(model, tokenizer)
        if lora is not None:
            peft: Any = require("peft", "text")
            network = peft.get_peft_model(network, peft.LoraConfig(**lora) if isinstance(lora, Mapping) else lora)
        if gradient_checkpointing:
            network.gradient_checkpointing_enable()
            network.enable_input_require_grads()
        self.network = network
        self.pooling, self.max_length, self.batch_tokens = pooling, max_length, batch_tokens

    @property
    def identity(self) -> str:
        """Where the weights came from; they change, so it is no key for a cache."""
        return f"fine-tuned {self.name} {self.pooling}"

    @property
    def width(self) -> int:
        """Width d of the features."""
        return int(self.network.config.hidden_size)

    def forward(self, prompts: Column, responses: Column, comparison: Tensor | None = None) -> Tensor:
        """Features float32 (M, d), with gradient; `comparison` (M,) is for encoders that read responses together."""
        rows = enumerate(zip(prompts, responses, strict=True))
        texts = [joined(prompt, response, row, self.tokenizer) for row, (prompt, response) in rows]
        return self._features(texts)

    def _features(self, texts: list[str]) -> Tensor:
        device = next(self.network.parameters()).device
        tokens = tokenize(self.tokenizer, texts, self.max_length)
        order, found = [], []
        for rows in batches_by_length([len(ids) for ids in tokens], self.batch_tokens):
            batch = pad([tokens[i] for i in rows], self.tokenizer, device)
            states = self.network(**batch).last_hidden_state
            found.append(pool(states, batch["attention_mask"], self.pooling).float())
            order.append(rows)
        back = np.argsort(np.concatenate(order))
        return torch.cat(found)[torch.from_numpy(back).to(device)]

    @torch.no_grad()
    def encode(self, prompts: Column, responses: Column) -> np.ndarray:
        """Features float32 (M, d) as they are now."""
        if not len(responses):
            return np.zeros((0, self.width), np.float32)
        return self._still(lambda: self(prompts, responses))

    @torch.no_grad()
    def encode_prompts(self, prompts: Column) -> np.ndarray:
        """Features float32 (N, d) of the prompts alone, as they are now."""
        return self._still(lambda: self._features([plain(p, "prompt", row) for row, p in enumerate(prompts)]))

    def _still(self, compute: Any) -> np.ndarray:
        training = self.training
        self.eval()
        try:
            return np.asarray(compute().cpu().numpy(), dtype=np.float32)
        finally:
            self.train(training)

    def save_pretrained(self, folder: str | Path) -> None:
        """The model, or only the adapter of LoRA, and the tokenizer, as transformers and peft write them."""
        self.network.save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path, base: Any = None, **settings: Any) -> FineTunedEncoder:
        """Read back what `save_pretrained` wrote; `base` is the model under an adapter, default the one it names.

        Raises
        ------
        MissingFileError, InvalidInputError
            There is no model in the folder, or the adapter's model cannot be loaded.
        """
        folder = Path(folder)
        transformers: Any = require("transformers", "text")
        if (folder / "adapter_config.json").exists():
            peft: Any = require("peft", "text")
            under = model_under_adapter(folder, base)
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
            network, tokenizer = load(under, tokenizer)
            made = cls(network, tokenizer, name=str(under) if isinstance(under, str) else "", **settings)
            made.network = peft.PeftModel.from_pretrained(network, str(folder), is_trainable=True)
            return made
        if not (folder / "config.json").exists():
            raise MissingFileError(f"{folder} holds no model")
        return cls(str(folder), **settings)


def model_under_adapter(folder: Path, base: Any = None) -> Any:
    """The model that the adapter in a folder belongs to: `base`, or the one that it names.

    Raises
    ------
    InvalidInputError
        There is neither.
    """
    peft: Any = require("peft", "text")
    under = base if base is not None else peft.PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not under:
        raise InvalidInputError(f"{folder} holds an adapter and no name of its model; pass base=...")
    return under
