"""The likelihood of the reference answer as a reward: from texts, by the policy itself or by a frozen model.

`ReferenceLikelihood` cuts each completion at the end of its reasoning, puts the reference answer there and asks a
causal language model for its probability. In `PolyrewardGRPOTrainer` it needs nothing else: the trainer binds its
policy and tokenizer, and adds the direct term, the gradient of the reference's own likelihood. With a `model` of its
own it scores with that one, frozen.

    PolyrewardGRPOTrainer(model, reward_funcs=[ReferenceLikelihood("log-prob")], advantage=rloo(),
                          objective=likelihood_objective(), ...)

Papers: Likelihood-Based Reward Designs for General LLM Reasoning (arXiv 2602.03979), VeriFree (arXiv 2505.21493), RLPR
(arXiv 2506.18254), NOVER (arXiv 2505.16022), JEPO (arXiv 2503.19618).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.likelihood import KINDS, jepo_advantages, likelihood_values, underflow_count
from polyreward.rewards.composition import weighted_sum
from polyreward.rewards.contract import Reward, RewardFunction, Sample, as_list, first_row, values_of
from polyreward.rewards.formats import TagFormat
from polyreward.rewards.groups import group_key
from polyreward.rewards.likelihood import LikelihoodReward, efficiency_reward, nover_perplexity, rank_reward
from polyreward.rewards.reference_encoding import (
    AnswerTemplate,
    Encoded,
    completion_text,
    encode,
    prompt_text,
    share_prefixes,
)
from polyreward.rewards.reference_logprobs import MAX_TOKENS, score_candidates

_OF_GROUP = ("jepo", "nover")
_FLOOR = -20.0


@dataclass(frozen=True)
class LikelihoodBatch:
    """Scores of one batch, and what the direct term needs.

    Attributes
    ----------
    values : float64 (N,)
        NaN where the reward does not apply.
    rows : rows of the batch that were scored, increasing
    encoded : the texts of these rows as token ids
    weights : float64 (len(rows),)
        What multiplies the gradient of each row's value in the direct term; 0 for a failed chain.
    """

    values: np.ndarray
    rows: list[int]
    encoded: Encoded
    weights: np.ndarray


@dataclass(frozen=True)
class ReferenceLikelihood(Reward):
    """How likely the model makes the reference answer after the completion's reasoning (arXiv 2602.03979).

    Parameters
    ----------
    kind : "log-prob", "avg-log-prob", "prob", "avg-prob", "geo-prob", "jepo" or "nover"
        The first five are values of a sample, see `polyreward.likelihood`. "jepo" is G times what the sample adds to
        the bound of its group and needs no further baseline (advantage ``WeightedSum()`` alone). "nover" is the rank
        of the sample in its group by length-normalised perplexity plus its efficiency, in [0, 2], without the format.
    column : str
        Column of the references: texts or numbers. None: the reward does not apply.
    answer_prefix, answer_suffix, reasoning_end, end_token
        Where the reference stands, see `AnswerTemplate`. A completion without `reasoning_end` (or, where that is None,
        without `answer_prefix`) is cut off and earns the lowest value: probability 0, or `token_floor` at every token.
    require : reward, optional
        A completion for which it gives less than 1 counts as cut off: a format, say.
    baseline_no_cot : bool
        Subtract the value of the reference right after the prompt (RLPR's debiasing).
    clip_min : float, optional
        Lowest value after that.
    token_floor : float < 0
        Lowest log-probability of a token in the log kinds. -20 by default, one in half a billion: with -100 one failed
        chain would decide the advantages of its whole group.
    direct_term : bool
        Whether a trainer that binds its policy adds the gradient of the value itself to the loss. Not for "nover",
        whose ranks have none.
    direct_weight : float
        Factor of that term. 1 is the gradient of the expected reward where the chain's term is summed over tokens
        (`likelihood_objective`).
    max_tokens : int
        Most tokens of one forward pass.
    model, tokenizer
        A frozen scorer. None: the trainer binds its own.
    template_options : mapping, optional
        Keyword arguments of the chat template; a trainer gives its own.

    Raises
    ------
    UnknownNameError
        No such kind.
    InvalidInputError
        At construction, options outside their ranges. At a call: no model; a reference that is no text or number, is
        empty, or has no token; reward, column and row are named.
    MissingColumnError
        At a call, no such column.
    """

    kind: str = "log-prob"
    column: str = "answer"
    answer_prefix: str = "<answer>"
    answer_suffix: str = "</answer>"
    reasoning_end: str | None = None
    end_token: bool | None = None
    require: RewardFunction | None = None
    baseline_no_cot: bool = False
    clip_min: float | None = None
    token_floor: float = _FLOOR
    direct_term: bool = True
    direct_weight: float = 1.0
    max_tokens: int = MAX_TOKENS
    model: Any = field(default=None, repr=False, compare=False)
    tokenizer: Any = field(default=None, repr=False, compare=False)
    template_options: Mapping[str, Any] | None = None

    per_sample: ClassVar[bool] = False  # one batch shares its prompts

    def __post_init__(self) -> None:
        kind = str(self.kind).replace("_", "-")
        if kind not in (known := (*KINDS, "nover")):
            raise UnknownNameError(f"no kind of likelihood reward {self.kind!r}{nearest(kind, known)}")
        object.__setattr__(self, "kind", kind)
        if kind in _OF_GROUP and (self.baseline_no_cot or self.clip_min is not None):
            raise InvalidInputError(f"{kind!r} compares the chains of a group: no baseline_no_cot, no clip_min")
        self._values()  # its checks
        AnswerTemplate(self.answer_prefix, self.answer_suffix, self.reasoning_end, self.end_token)
        if not math.isfinite(self.direct_weight):
            raise InvalidInputError(f"direct_weight must be a finite number, got {self.direct_weight!r}")
        if (self.model is None) != (self.tokenizer is None):
            raise InvalidInputError("a scorer is a model with its tokenizer: give both or neither")

    @property
    def __name__(self) -> str:
        """Name in logs."""
        return f"reference_{self.kind.replace('-', '_')}"

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of references."""
        return (self.column,)

    @property
    def compares_group(self) -> bool:
        """Whether the samples of a prompt are compared."""
        return self.kind in _OF_GROUP

    @property
    def differentiable(self) -> bool:
        """Whether the policy it is bound to gets the direct term."""
        return self.direct_term and self.kind != "nover" and self.direct_weight != 0

    def bind(
        self, model: Any, tokenizer: Any, template_options: Mapping[str, Any] | None = None
    ) -> ReferenceLikelihood:
        """The same reward with the policy as its model; itself where it has a scorer of its own."""
        if self.model is not None:
            return self
        options = self.template_options if self.template_options is not None else template_options
        return replace(self, model=model, tokenizer=tokenizer, template_options=options)

    def __call__(self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One value a completion; needs the prompts."""
        return as_list(self.explain(prompts, completions, **columns).values)

    def explain(self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any) -> LikelihoodBatch:
        """Values with what the direct term needs."""
        values = np.full(len(completions), np.nan)
        samples = list(self.samples(prompts, completions, columns))
        if not samples:
            return LikelihoodBatch(values, [], Encoded([], [], []), np.zeros(0))
        if self.model is None:
            raise InvalidInputError(
                f"reward {self.__name__!r} has no model: give model= and tokenizer=, or hand it to "
                "PolyrewardGRPOTrainer, which binds its policy"
            )
        if prompts is None:
            raise InvalidInputError(f"reward {self.__name__!r} needs the prompts")
        template = AnswerTemplate(self.answer_prefix, self.answer_suffix, self.reasoning_end, self.end_token)
        asked = self._prompts(samples)
        chains = [template.chain(self._written(sample, text)) for sample, text in zip(samples, asked, strict=True)]
        encoded = self._encode(samples, asked, [self._empty_chain if c is None else c for c in chains], template)
        failed = np.array([c is None for c in chains]) | self._too_long(encoded)
        if self.require is not None:
            fits = values_of(self.require, prompts, completions, columns)
            failed |= fits[[sample.row for sample in samples]] < 1
        logp, mask = self._logp(encoded, asked, failed)
        scores, weights = self._score(samples, asked, encoded, logp, mask, failed, template)
        values[[sample.row for sample in samples]] = scores.numpy()
        self._report(columns.get("log_metric"), logp, mask, failed)
        return LikelihoodBatch(values, [s.row for s in samples], encoded, np.where(failed, 0.0, weights.numpy()))

    @property
    def _empty_chain(self) -> str:
        return self.reasoning_end or ""

    def _values(self) -> LikelihoodReward:
        kind = "log-prob" if self.kind in _OF_GROUP else self.kind
        return LikelihoodReward(kind, self.baseline_no_cot, self.clip_min, self.token_floor)

    def _reference(self, sample: Sample) -> str:
        value = sample.columns[self.column]
        if isinstance(value, str):
            if not value.strip():
                raise self.refuse(sample, self.column, "the reference is empty; use None where there is none")
            return value
        if isinstance(value, Real) and not isinstance(value, bool):
            return str(value)
        raise self.refuse(sample, self.column, f"expected a text or a number, got {type(value).__name__}")

    def _prompts(self, samples: list[Sample]) -> list[str]:
        """The prompts as texts, each distinct one rendered once."""
        options = dict(self.template_options or {})
        rendered: dict[str, str] = {}
        keys = [json.dumps(sample.prompt, sort_keys=True, default=str) for sample in samples]
        for key, sample in zip(keys, samples, strict=True):
            if key not in rendered:
                rendered[key] = prompt_text(self.tokenizer, sample.prompt, options)
        return [rendered[key] for key in keys]

    def _written(self, sample: Sample, prompt: str) -> str:
        """What the policy wrote: by its token ids where the trainer gives them, else the completion's text."""
        ids = sample.columns.get("completion_ids")
        if ids is None:
            return sample.text
        text = completion_text(self.tokenizer, prompt, isinstance(sample.prompt, str), ids)
        return sample.text if text is None else text

    def _encode(
        self, samples: list[Sample], prompts: list[str], chains: list[str], template: AnswerTemplate
    ) -> Encoded:
        references = [self._reference(sample) for sample in samples]
        special = [isinstance(sample.prompt, str) for sample in samples]
        encoded = encode(self.tokenizer, template, prompts, chains, references, special)
        if 0 in encoded.lengths:
            row = encoded.lengths.index(0)
            problem = f"the reference {references[row]!r} has no token in this tokenizer"
            raise self.refuse(samples[row], self.column, problem)
        return encoded

    def _too_long(self, encoded: Encoded) -> np.ndarray:
        config = getattr(self.model, "config", None)
        limit = getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None
        return np.array([limit is not None and len(ids) > limit for ids in encoded.ids])

    def _logp(self, encoded: Encoded, texts: list[str], failed: np.ndarray) -> tuple[Tensor, Tensor]:
        """Log-probabilities (N, 1, L) on the CPU and mask; 0 for failed chains, whose mask tells the length."""
        kept = [row for row in range(len(texts)) if not failed[row]]
        width = max(encoded.lengths)
        logp = torch.zeros(len(texts), 1, width)
        mask = torch.arange(width) < torch.tensor(encoded.lengths).view(-1, 1, 1)
        if kept:
            lengths = [encoded.lengths[row] for row in kept]
            prefixes, owners, suffixes = share_prefixes(
                [encoded.ids[row] for row in kept], lengths, [texts[row] for row in kept]
            )
            found, _ = score_candidates(self.model, prefixes, owners, suffixes, lengths, max_tokens=self.max_tokens)
            logp[kept, 0, : found.shape[1]] = found.cpu()
        bad = logp.isnan().any(dim=2).flatten().numpy()
        if bad.any():
            raise InvalidInputError(
                f"reward {self.__name__!r}: the model gave NaN for completion {first_row.get() + int(bad.argmax())}"
            )
        return logp, mask

    def _score(
        self,
        samples: list[Sample],
        prompts: list[str],
        encoded: Encoded,
        logp: Tensor,
        mask: Tensor,
        failed: np.ndarray,
        template: AnswerTemplate,
    ) -> tuple[Tensor, Tensor]:
        """Values and direct weights, float64 (N,)."""
        lost = torch.from_numpy(failed).view(-1, 1)
        if self.kind in _OF_GROUP:
            return self._score_groups(samples, encoded, logp, mask, lost)
        baseline: dict[str, Any] = {}
        if self.baseline_no_cot:
            alone = self._without_chain(samples, prompts, template)
            baseline = dict(zip(("baseline", "baseline_mask"), alone, strict=True))
        values = self._values()(logp.double(), mask, failed=lost, **baseline).flatten()
        weights = torch.ones_like(values)
        if self.clip_min is not None:
            weights = (values > self.clip_min).double()  # no gradient where the clip holds
        return values, weights

    def _without_chain(
        self, samples: list[Sample], prompts: list[str], template: AnswerTemplate
    ) -> tuple[Tensor, Tensor]:
        """The references right after their prompts, each distinct pair once."""
        keys = [json.dumps([s.prompt, str(s.columns[self.column])], sort_keys=True, default=str) for s in samples]
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        chosen = [samples[row] for row in first.values()]
        asked = [prompts[row] for row in first.values()]
        encoded = self._encode(chosen, asked, [self._empty_chain] * len(chosen), template)
        logp, mask = self._logp(encoded, asked, np.zeros(len(chosen), dtype=bool))
        position = {key: place for place, key in enumerate(first)}
        order = [position[key] for key in keys]
        return logp[order].double(), mask[order]

    def _score_groups(
        self, samples: list[Sample], encoded: Encoded, logp: Tensor, mask: Tensor, lost: Tensor
    ) -> tuple[Tensor, Tensor]:
        labels = [group_key(sample) for sample in samples]
        groups = {label: number for number, label in enumerate(dict.fromkeys(labels))}
        codes = torch.tensor([groups[label] for label in labels])
        # Rows of a group side by side: (groups, size), NaN where a group is smaller.
        order = codes.argsort(stable=True)
        sizes = torch.bincount(codes)
        places = torch.empty_like(codes)
        places[order] = torch.arange(len(codes)) - (sizes.cumsum(0) - sizes)[codes[order]]
        shape = (len(groups), int(sizes.max()))

        def table(values: Tensor) -> Tensor:
            full = torch.full(shape, torch.nan, dtype=torch.float64)
            full[codes, places] = values.double().flatten()
            return full

        if self.kind == "nover":
            length = torch.tensor(encoded.chain_tokens).view(-1, 1)
            ranked = table(nover_perplexity(logp.double(), mask, length, failed=lost))
            values = rank_reward(ranked) + efficiency_reward(ranked, table(length.double()).nan_to_num())
            return values[codes, places], torch.zeros(len(samples), dtype=torch.float64)
        total = table(likelihood_values(logp.double(), mask, token_floor=self.token_floor, failed=lost))
        if int(sizes.min()) < 2:
            row = first_row.get() + samples[int((sizes[codes] < 2).nonzero()[0])].row
            raise InvalidInputError(
                f"reward {self.__name__!r} compares the chains of a prompt, and completion {row} is alone with its own"
            )
        share = total.masked_fill(total.isnan(), -torch.inf).softmax(dim=1)
        number = sizes[codes].double()
        return number * jepo_advantages(total)[codes, places], number * share[codes, places]

    def _report(self, log_metric: Any, logp: Tensor, mask: Tensor, failed: np.ndarray) -> None:
        if not callable(log_metric):
            return
        name, lost = self.__name__, torch.from_numpy(failed).view(-1, 1)
        log_metric(f"{name}/failed", float(failed.mean()))
        log_metric(f"{name}/underflow", float(underflow_count(logp, mask, self.kind, lost)))
        if not failed.all():
            mean = likelihood_values(logp, mask, "avg-log-prob", failed=lost)[~lost].mean()
            log_metric(f"{name}/perplexity", math.exp(min(-float(mean), 700.0)))


def verifree(column: str = "answer", **options: Any) -> ReferenceLikelihood:
    """VeriFree (arXiv 2505.21493): probability of the reference, with its direct term; use `rloo`, G = 8, no KL."""
    return ReferenceLikelihood("prob", column, **options)


def rlpr(column: str = "answer", format_weight: float = 0.1, **options: Any) -> Reward:
    """RLPR (arXiv 2506.18254): ``0.9 max(0, p - p_no_chain) + 0.1 format``, p the mean probability of a token.

    The format is ``<think>...</think><answer>...</answer>``; no direct term. `EMAStdFilter` chooses the prompts.
    """
    if not 0 <= format_weight <= 1:
        raise InvalidInputError(f"format_weight must be in [0, 1], got {format_weight!r}")
    score = ReferenceLikelihood("avg-prob", column, baseline_no_cot=True, clip_min=0.0, direct_term=False, **options)
    return weighted_sum(score, TagFormat(), weights=(1 - format_weight, format_weight), name="rlpr")


def nover(column: str = "answer", **options: Any) -> Reward:
    """NOVER (arXiv 2505.16022): format + rank by discounted perplexity + efficiency, weights 1; no direct term.

    The released code scores with a proxy model: give `model` and `tokenizer`, and mix the policy into it as you train.
    """
    ranks = ReferenceLikelihood("nover", column, require=TagFormat(), direct_term=False, **options)
    return weighted_sum(TagFormat(), ranks, name="nover")
