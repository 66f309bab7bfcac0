"""A language model as an ordinal reward model with no new weights: its logits of the tokens "1" to "9".

    encoder = DigitLogits("Qwen/Qwen2.5-7B-Instruct", lora={"r": 16, "target_modules": ["q_proj", "v_proj"]})
    PreferenceModel(encoder, RatingLogits, OrdinalLikelihood()).fit(data)

The model reads prompt and response in a template that ends where the rating would stand. Its prior over digits is
neither even nor about quality, and a text that rates itself ("Score: 9") can move it.
"Learning Ordinal Probabilistic Reward from Preferences" (arXiv 2602.12660).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyreward.errors import InvalidInputError, MissingFileError, require
from polyreward.preferences import Column
from polyreward.reward_models.fine_tuning import model_under_adapter
from polyreward.reward_models.heads import Items, Scores
from polyreward.reward_models.ordinal import digit_logits
from polyreward.reward_models.text_encoders import batches_by_length, load, pad, tokenize
from polyreward.reward_models.texts import plain

TEMPLATE = (
    "Rate the quality of the response to the prompt from 1 (worst) to 9 (best).\n\n"
    "Prompt: {prompt}\n\nResponse: {response}\n\nScore:"
)
DIGITS = tuple("123456789")


class RatingLogits(nn.Module):
    """A head without weights: the features are the logits of the ratings.

    Parameters
    ----------
    width : int
        M.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"width": width}

    def forward(self, items: Items) -> Scores:
        """Values (R, M)."""
        return Scores(items.features)


class DigitLogits(nn.Module):
    """A causal language model as an encoder whose features are its logits of the ratings' tokens (arXiv 2602.12660).

    It learns with the head, in full or by LoRA; with ``encoder.requires_grad_(False)`` it stays as it is, for an
    `OrdinalHead` on top.

    Parameters
    ----------
    model : name on the Hugging Face hub, folder, or a loaded causal language model
    tokenizer : tokenizer, optional
        Default: the one that belongs to `model`; must be given with a loaded model.
    template : str
        With ``{prompt}`` and ``{response}``; the rating's token would come next. Double other braces.
    answers : texts, default "1" to "9"
        Worst first; each must be one token after the template.
    lora : mapping or ``peft.LoraConfig``, optional
    max_length : int
        Tokens; what is longer loses its beginning, so that the end of the template stays.
    batch_tokens : int
        Tokens of one forward pass, padding included.
    name : str
        Where a loaded model comes from, for its configuration.

    Raises
    ------
    InvalidInputError
        A rating that is several tokens, or unknown to the tokenizer; a model without a vocabulary head; a template
        without ``{response}``.
    """

    token_ids: Tensor

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        template: str = TEMPLATE,
        answers: Sequence[str] = DIGITS,
        lora: Any = None,
        max_length: int = 2048,
        batch_tokens: int = 16_384,
        name: str = "",
    ) -> None:
        super().__init__()
        self.name = name or (model if isinstance(model, str) else getattr(model.config, "_name_or_path", ""))
        self.template, self.max_length, self.batch_tokens = template, max_length, batch_tokens
        self.answers = tuple(answers)
        ending = _ending(template)
        network, self.tokenizer = load(model, tokenizer, "AutoModelForCausalLM")
        if network.get_output_embeddings() is None:
            raise InvalidInputError(f"{type(network).__name__} has no vocabulary head; load a causal language model")
        rows = network.get_output_embeddings().weight.shape[0]
        self.register_buffer("token_ids", torch.tensor(answer_tokens(self.tokenizer, self.answers, ending)))
        if int(self.token_ids.max()) >= rows:
            raise InvalidInputError(
                f"the rating {self.answers[int(self.token_ids.argmax())]!r} is token {int(self.token_ids.max())}, the "
                f"model has {rows} tokens: tokenizer and model do not belong together"
            )
        if lora is not None:
            peft: Any = require("peft", "text")
            network = peft.get_peft_model(network, peft.LoraConfig(**lora) if isinstance(lora, Mapping) else lora)
        self.network = network

    @property
    def identity(self) -> str:
        """Where the weights came from; they change, so it is no key for a cache."""
        return f"logits of {' '.join(self.answers)} by {self.name}"

    @property
    def settings(self) -> dict[str, Any]:
        """What makes it again, beside the model."""
        return {
            "template": self.template,
            "answers": self.answers,
            "max_length": self.max_length,
            "batch_tokens": self.batch_tokens,
        }

    @property
    def width(self) -> int:
        """M."""
        return len(self.answers)

    def forward(self, prompts: Column, responses: Column, comparison: Tensor | None = None) -> Tensor:
        """Logits of the ratings, float32 (N, M), with gradient."""
        texts = [
            self.template.format(prompt=plain(prompt, "prompt", row), response=plain(response, "response", row))
            for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        ]
        device = next(self.network.parameters()).device
        tokens = tokenize(self.tokenizer, texts, self.max_length)
        if not tokens:
            return torch.zeros(0, self.width, device=device)
        order, found = [], []
        for rows in batches_by_length([len(ids) for ids in tokens], self.batch_tokens):
            batch = pad([tokens[i] for i in rows], self.tokenizer, device)
            found.append(digit_logits(self._last(batch), self.token_ids.to(device)).float())
            order.append(rows)
        back = np.argsort(np.concatenate(order))
        return torch.cat(found)[torch.from_numpy(back).to(device)]

    def _last(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits of the vocabulary after the last token of each text, (B, V)."""
        last = batch["attention_mask"].sum(dim=1) - 1
        inner = self.network.get_base_model() if hasattr(self.network, "peft_config") else self.network
        if "logits_to_keep" not in inspect.signature(inner.forward).parameters:
            return torch.as_tensor(self.network(**batch).logits)[torch.arange(len(last), device=last.device), last]
        # the vocabulary head runs at the few last places alone: all of them would be the largest tensor by far
        places, which = last.unique(return_inverse=True)
        logits = torch.as_tensor(self.network(**batch, logits_to_keep=places).logits)
        return logits[torch.arange(len(last), device=last.device), which]

    @torch.no_grad()
    def encode(self, prompts: Column, responses: Column) -> np.ndarray:
        """Logits float32 (N, M) as they are now."""
        training = self.training
        self.eval()
        try:
            return np.asarray(self(prompts, responses).cpu().numpy(), dtype=np.float32)
        finally:
            self.train(training)

    def save_pretrained(self, folder: str | Path) -> None:
        """The model, or only the adapter of LoRA, and the tokenizer, as transformers and peft write them."""
        self.network.save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path, base: Any = None, **settings: Any) -> DigitLogits:
        """Read back what `save_pretrained` wrote; `base` is the model under an adapter, default the one it names.

        Raises
        ------
        MissingFileError
            There is no model in the folder.
        """
        folder = Path(folder)
        if (folder / "adapter_config.json").exists():
            peft: Any = require("peft", "text")
            under = model_under_adapter(folder, base)
            transformers: Any = require("transformers", "text")
            made = cls(under, transformers.AutoTokenizer.from_pretrained(str(folder)), **settings)
            made.network = peft.PeftModel.from_pretrained(made.network, str(folder), is_trainable=True)
            return made
        if not (folder / "config.json").exists():
            raise MissingFileError(f"{folder} holds no model")
        return cls(str(folder), **settings)


def answer_tokens(tokenizer: Any, answers: Sequence[str] = DIGITS, ending: str = "Score:") -> list[int]:
    """The one token that each answer adds after `ending`.

    Raises
    ------
    InvalidInputError
        Fewer than two answers; one that is several tokens, changes those before it, is unknown, or shares its token.
    """
    if len(answers) < 2:
        raise InvalidInputError(f"answers must be at least two texts, got {list(answers)}")
    before = tokenizer(ending, add_special_tokens=False)["input_ids"]
    found: list[int] = []
    for answer in answers:
        ids = tokenizer(ending + answer, add_special_tokens=False)["input_ids"]
        if ids[: len(before)] != before or len(ids) != len(before) + 1:
            raise InvalidInputError(
                f"the rating {answer!r} is {len(ids) - len(before)} tokens after {ending!r}, expected one: use ratings "
                "that are single tokens, at most 1 to 9, or map them to other texts with answers=..."
            )
        if ids[-1] == tokenizer.unk_token_id:
            raise InvalidInputError(f"the rating {answer!r} is unknown to the tokenizer; pass other answers=...")
        if ids[-1] in found:
            raise InvalidInputError(f"the rating {answer!r} has the same token as {answers[found.index(ids[-1])]!r}")
        found.append(ids[-1])
    return found


def _ending(template: str) -> str:
    """What stands after the response; the tokens at the place of the rating depend on it alone."""
    try:
        template.format(prompt="", response="")
    except (LookupError, ValueError) as error:
        raise InvalidInputError(
            f"the template holds braces other than {{prompt}} and {{response}} ({error}); double them"
        ) from error
    if "{response}" not in template:
        raise InvalidInputError("the template must hold {response}")
    return template.rsplit("{response}", 1)[1].format(prompt="", response="") or "."
