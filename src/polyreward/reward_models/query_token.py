"""Think, then score: a causal model writes a chain of thought, and a query token after it reads the reward.

The sequence is [context, thought, query]. The reward is ``w . h_query``, the last hidden state of the query token
through a linear map without bias, so that it learns by the exact gradient of Bradley-Terry while the thought learns by
policy gradient. The query token never is part of what the policy writes: its log-probability is minus infinity when
thoughts are sampled and when their log-probabilities are computed. Of the token embeddings only its row learns.

Paper: Think, then Score: Decoupled Reasoning and Scoring for Video Reward Modeling (DeScore, arXiv 2605.05922).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from polyreward.errors import InvalidInputError

PAD = -1
"""In token ids: there is no token here."""


class QueryTokenRewardModel(nn.Module):
    """A causal model with a query token and a reward head (arXiv 2605.05922).

    Token ids are int64 (B, L); -1 stands where there is no token, anywhere in a row.

    Parameters
    ----------
    backbone : causal model of transformers, or a module with the same calls
        ``backbone(input_ids=..., attention_mask=...)`` returns an object with ``logits`` (B, L, V) and
        ``hidden_states`` or ``last_hidden_state`` (B, L, H); ``get_input_embeddings()`` returns a module with
        ``weight``. One that takes ``past_key_values`` writes with a cache. ``output_hidden_states``, ``use_cache``,
        ``position_ids`` and ``logits_to_keep`` are passed where its signature has them.
    query_token_id : int
        A token that occurs nowhere else; with transformers, add a special token and resize the embeddings.
    eos_token_id : int, optional
        Ends a thought; it is the last token of it.
    max_cot_tokens : int
        Length at which a thought ends.

    The row of the query token is the parameter ``query``; the backbone's embedding matrix is frozen and shows the same
    row. Other weights of the backbone learn as their ``requires_grad`` says.

    Raises
    ------
    InvalidInputError
        The query token is no row of the embeddings; ids with the query token, or none in a row.
    """

    def __init__(
        self, backbone: nn.Module, query_token_id: int, eos_token_id: int | None = None, max_cot_tokens: int = 512
    ) -> None:
        super().__init__()
        table = embedding_of(backbone)
        rows, width = table.weight.shape
        if not 0 <= query_token_id < rows:
            raise InvalidInputError(f"query_token_id is {query_token_id}, the embeddings have the rows 0 to {rows - 1}")
        if max_cot_tokens < 1:
            raise InvalidInputError(f"max_cot_tokens must be at least 1, got {max_cot_tokens}")
        self.backbone = backbone
        self.query_token_id, self.eos_token_id, self.max_cot_tokens = query_token_id, eos_token_id, max_cot_tokens
        table.weight.requires_grad_(False)
        self.query = nn.Parameter(table.weight.data[query_token_id])
        self.head = nn.Linear(width, 1, bias=False, dtype=table.weight.dtype, device=table.weight.device)
        table.register_forward_hook(self._embed_query, with_kwargs=True)
        taken = inspect.signature(backbone.forward).parameters
        open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
        # models of transformers pass on what their signature does not name
        every = open_ended and hasattr(backbone, "generate")
        self._takes = {name for name in _OPTIONAL if every or name in taken}
        if open_ended:
            self._takes.add("output_hidden_states")

    def forward(self, context_ids: Tensor, cot_ids: Tensor | None = None, **inputs: Any) -> Tensor:
        """As `score`."""
        return self.score(context_ids, cot_ids, **inputs)

    def score(self, context_ids: Tensor, cot_ids: Tensor | None = None, **inputs: Any) -> Tensor:
        """Rewards (B,) in float32 or wider, with gradient.

        Parameters
        ----------
        context_ids : int64 (B, L)
        cot_ids : int64 (B, T), optional
            Thoughts; without, the query token follows the context.
        inputs : further inputs of the backbone, such as ``pixel_values``
        """
        return self.read(self.states(context_ids, cot_ids, **inputs))

    def read(self, states: Tensor) -> Tensor:
        """Rewards (B,) of hidden states (B, H) of the query token."""
        return self.head(states).squeeze(-1).to(torch.promote_types(states.dtype, torch.float32))

    def states(self, context_ids: Tensor, cot_ids: Tensor | None = None, **inputs: Any) -> Tensor:
        """Last hidden state of the query token after context and thought, (B, H)."""
        self._refuse_query(context_ids, "context_ids")
        parts = [context_ids]
        if cot_ids is not None:
            self._refuse_query(cot_ids, "cot_ids")
            if len(cot_ids) != len(context_ids):
                raise InvalidInputError(f"{len(context_ids)} contexts and {len(cot_ids)} thoughts")
            parts.append(cot_ids)
        query = context_ids.new_full((len(context_ids), 1), self.query_token_id)
        return self.sequence_states(torch.cat([*parts, query], dim=1), **inputs)

    def score_sequence(self, ids: Tensor, **inputs: Any) -> Tensor:
        """Rewards (B,) of sequences (B, L) that hold the query token exactly once; what follows it has no effect."""
        return self.read(self.sequence_states(ids, **inputs))

    def sequence_states(self, ids: Tensor, **inputs: Any) -> Tensor:
        """Last hidden state of the one query token of each sequence, (B, H)."""
        _check_ids(ids, "the sequence")
        packed, keep = pack(ids)
        at = packed == self.query_token_id
        wrong = at.sum(dim=1) != 1
        if bool(wrong.any()):
            row = int(wrong.int().argmax())
            raise InvalidInputError(
                f"the query token {self.query_token_id} must occur exactly once in a scoring sequence; row {row} has "
                f"it {int(at[row].sum())} times"
            )
        if not len(ids):
            return self.head.weight.new_zeros(0, self.head.in_features)
        found = self._run(packed, keep, output_hidden_states=True, logits_to_keep=1, **inputs)
        states = getattr(found, "last_hidden_state", None)
        states = found.hidden_states[-1] if states is None else states
        return states[torch.arange(len(ids), device=ids.device), at.int().argmax(dim=1)]

    def log_probabilities(
        self, context_ids: Tensor, cot_ids: Tensor, temperature: float = 1.0, **inputs: Any
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each token of the thoughts, (B, T), 0 where there is none, and the mask of the tokens.

        Raises
        ------
        InvalidInputError
            The thoughts hold the query token, which the policy never writes.
        """
        self._refuse_query(context_ids, "context_ids")
        self._refuse_query(cot_ids, "cot_ids")
        mask = cot_ids >= 0
        if not bool((context_ids >= 0).any(dim=1).all()):
            raise InvalidInputError("a context has no token, so its thought has no log-probability")
        packed, keep = pack(torch.cat([context_ids, cot_ids], dim=1))
        logits = self._run(packed, keep, **inputs).logits
        # token t of a thought is predicted one place before it in the packed row
        before = (context_ids >= 0).sum(dim=1, keepdim=True) + mask.cumsum(dim=1) - 2
        at = before.clamp(min=0, max=logits.shape[1] - 1)
        rows = torch.arange(len(logits), device=logits.device).unsqueeze(1)
        chosen = self._policy(logits[rows, at], temperature)
        found = chosen.gather(2, cot_ids.clamp(min=0).unsqueeze(2)).squeeze(2)
        return torch.where(mask, found, 0.0), mask

    @torch.no_grad()
    def generate_cot(
        self,
        context: Tensor,
        temperature: float = 1.0,
        max_tokens: int | None = None,
        generator: torch.Generator | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Thoughts int64 (B, T), T at most `max_tokens`; -1 after the token that ends one.

        Parameters
        ----------
        context : int64 (B, L)
        temperature : float >= 0
            0 takes the likeliest token.
        generator : torch.Generator on the context's device, optional
            Default: torch's own.
        """
        self._refuse_query(context, "context")
        if not temperature >= 0:
            raise InvalidInputError(f"temperature must be at least 0, got {temperature}")
        length = self.max_cot_tokens if max_tokens is None else max_tokens
        writing = torch.ones(len(context), dtype=torch.bool, device=context.device)
        cot = context.new_empty(len(context), 0)
        step = self._cached_step if "past_key_values" in self._takes else self._plain_step
        memory: dict[str, Any] = {}
        while cot.shape[1] < length and bool(writing.any()):
            chances = self._policy(step(context, cot, memory, inputs), temperature or 1.0)
            if temperature:
                token = torch.multinomial(chances.exp(), 1, generator=generator)
            else:
                token = chances.argmax(dim=1, keepdim=True)
            cot = torch.cat([cot, torch.where(writing.unsqueeze(1), token, PAD)], dim=1)
            if self.eos_token_id is not None:
                writing = writing & (token.squeeze(1) != self.eos_token_id)
        return cot

    @torch.no_grad()
    def think_then_score(
        self,
        context: Tensor,
        temperature: float = 0.0,
        max_tokens: int | None = None,
        generator: torch.Generator | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Rewards (B,) after thoughts that the model writes itself, and the thoughts (B, T)."""
        cot = self.generate_cot(context, temperature, max_tokens, generator, **inputs)
        return self.score(context, cot, **inputs), cot

    def _plain_step(self, context: Tensor, cot: Tensor, memory: dict[str, Any], inputs: dict[str, Any]) -> Tensor:
        """Logits (B, V) of the next token, from the whole sequence anew."""
        packed, keep = pack(torch.cat([context, cot], dim=1))
        logits = self._run(packed, keep, **inputs).logits
        last: Tensor = logits[torch.arange(len(context), device=context.device), (keep.sum(dim=1) - 1).clamp(min=0)]
        return last

    def _cached_step(self, context: Tensor, cot: Tensor, memory: dict[str, Any], inputs: dict[str, Any]) -> Tensor:
        """Logits (B, V) of the next token, from the newest one and what is kept of those before."""
        if not memory:
            packed, keep = pack(context, left=True)
            memory |= {"keep": keep, "padded": not bool(keep.all())}
            ids, given = packed, inputs
        else:
            memory["keep"] = torch.cat([memory["keep"], torch.ones_like(cot[:, -1:], dtype=torch.bool)], dim=1)
            ids, given = cot[:, -1:].clamp(min=0), {"past_key_values": memory["past"]}
        if memory["padded"]:
            places = (memory["keep"].cumsum(dim=1) - 1).clamp(min=0)
            given = {**given, "position_ids": places[:, -ids.shape[1] :]}
        found = self._run(ids, memory["keep"], use_cache=True, logits_to_keep=1, **given)
        memory["past"] = found.past_key_values
        logits: Tensor = found.logits[:, -1]
        return logits

    def _policy(self, logits: Tensor, temperature: float) -> Tensor:
        """Log-probabilities (..., V) of the tokens that the policy may write."""
        if not temperature > 0:
            raise InvalidInputError(f"log-probabilities need a temperature above 0, got {temperature}")
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        if wide.shape[-1] > self.query_token_id:
            query = torch.zeros(wide.shape[-1], dtype=torch.bool, device=wide.device)
            query[self.query_token_id] = True
            wide = wide.masked_fill(query, -torch.inf)
        return wide.log_softmax(dim=-1)

    def _run(self, ids: Tensor, keep: Tensor, **options: Any) -> Any:
        self._tie()
        backbone: Any = self.backbone
        options.setdefault("use_cache", False)
        chosen = {name: value for name, value in options.items() if name not in _OPTIONAL or name in self._takes}
        return backbone(input_ids=ids.clamp(min=0), attention_mask=keep.long(), **chosen)

    def _embed_query(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor:
        ids = args[0] if args else next(iter(kwargs.values()))
        return torch.where((ids == self.query_token_id).unsqueeze(-1), self.query.to(out.dtype), out)

    def _tie(self) -> None:
        """The row of the matrix and `query` share their memory; a copy or move of the module parts them."""
        row = embedding_of(self.backbone).weight.data[self.query_token_id]
        if row.data_ptr() != self.query.data_ptr():
            row.copy_(self.query.data)
            if row.dtype == self.query.dtype and row.device == self.query.device:
                self.query.data = row

    def _refuse_query(self, ids: Tensor, name: str) -> None:
        _check_ids(ids, name)
        held = (ids == self.query_token_id).any(dim=1)
        if bool(held.any()):
            raise InvalidInputError(
                f"{name}, row {int(held.int().argmax())} holds the query token {self.query_token_id}; it is added by "
                "the model, and the policy never writes it"
            )


_OPTIONAL = ("output_hidden_states", "use_cache", "position_ids", "past_key_values", "logits_to_keep")


def embedding_of(backbone: Any) -> Any:
    """The module of a backbone that embeds tokens; `InvalidInputError` where there is none."""
    found = backbone.get_input_embeddings() if hasattr(backbone, "get_input_embeddings") else None
    if found is None or not isinstance(getattr(found, "weight", None), Tensor) or found.weight.ndim != 2:
        raise InvalidInputError(
            f"{type(backbone).__name__} has no get_input_embeddings() that returns a module with weight (V, H)"
        )
    return found


def pack(ids: Tensor, left: bool = False) -> tuple[Tensor, Tensor]:
    """Tokens of each row in order and without gaps, at its start (or its end), and the mask of them; both (B, L).

    Columns that no row needs are cut off.
    """
    keep = ids >= 0
    order = (keep if left else ~keep).int().argsort(dim=1, stable=True)
    packed, mask = ids.gather(1, order), keep.gather(1, order)
    longest = int(mask.sum(dim=1).max()) if mask.numel() else 0
    cut = slice(packed.shape[1] - longest, None) if left else slice(0, longest)
    return packed[:, cut], mask[:, cut]


def padded(rows: list[list[int]]) -> Tensor:
    """Token ids of different lengths as int64 (B, L) with -1 after each."""
    longest = max((len(row) for row in rows), default=0)
    tensors = [pad(torch.tensor(row, dtype=torch.int64), (0, longest - len(row)), value=PAD) for row in rows]
    return torch.stack(tensors) if tensors else torch.zeros(0, 0, dtype=torch.int64)


def _check_ids(ids: Tensor, name: str) -> None:
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise InvalidInputError(
            f"{name} must hold whole token ids of shape (B, L), got {ids.dtype} of shape {tuple(ids.shape)}"
        )
