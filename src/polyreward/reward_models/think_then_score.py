"""`ThinkThenScore`: a reward model that writes a chain of thought, and then reads its score from a query token.

    model = ThinkThenScore(QueryTokenRewardModel(language_model, query_id, eos_id), TextCodec(tokenizer))
    model.fit(with_thoughts(data), reward=judgement_reward(), dual={"steps": 200})
    model.score(prompts, responses)

Two stages. The cold start is Bradley-Terry on pairs with given thoughts, of which a share is dropped
(`RationaleDropout`); it runs in the fit that all reward models share. The second stage lets the model write, and learns
thoughts and scores together (`train_dual`). Scores come after the model's own thoughts.

Paper: Think, then Score: Decoupled Reasoning and Scoring for Video Reward Modeling (DeScore, arXiv 2605.05922).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import polyreward
from polyreward.errors import InvalidInputError, MissingColumnError, MissingFileError, nearest, require
from polyreward.preference_record import TIE, UNLABELLED
from polyreward.preferences import Column, PreferenceData
from polyreward.reward_models.comparisons import ComparisonTable
from polyreward.reward_models.contract import ModelReward, as_reward
from polyreward.reward_models.dual_objective import DecidedPairs
from polyreward.reward_models.dual_training import DualOptions, train_dual
from polyreward.reward_models.heads import LinearHead, Scores
from polyreward.reward_models.likelihoods import BradleyTerry
from polyreward.reward_models.model import PreferenceModel
from polyreward.reward_models.query_token import QueryTokenRewardModel
from polyreward.reward_models.rationale_dropout import RationaleDropout
from polyreward.reward_models.saving import load_state, read_config
from polyreward.reward_models.thoughts import OWN, Codec, TextCodec, ThoughtEncoder, parted
from polyreward.storage import write_atomically, write_json

COLD_START: Mapping[str, Any] = {
    "epochs": 4, "batch_size": 32, "learning_rate": 2e-6, "encoder_learning_rate": 2e-6, "warmup": 0.05,
    "validation": None, "patience": None,
}  # fmt: skip
"""Options of the first stage; the batch is ours, the rest the paper's."""


class ThinkThenScore:
    """A reward model that thinks and then scores (DeScore, arXiv 2605.05922).

    Parameters
    ----------
    network : QueryTokenRewardModel
    codec : Codec
    dropout : RationaleDropout
    likelihood : likelihood of the cold start
    temperature : float >= 0
        Of the thoughts before a score; 0 takes the likeliest token.
    batch_size : int
        Samples that are scored at once.

    Attributes
    ----------
    history, dual_history : list of dict
        Figures of the epochs of the first stage and of the steps of the second.
    """

    def __init__(
        self,
        network: QueryTokenRewardModel,
        codec: Codec,
        dropout: RationaleDropout | None = None,
        likelihood: Any = None,
        temperature: float = 0.0,
        batch_size: int = 64,
    ) -> None:
        if batch_size < 1 or not temperature >= 0:
            raise InvalidInputError(f"batch_size is {batch_size} and temperature {temperature}; expected >= 1 and >= 0")
        self.network, self.codec = network, codec
        self.dropout = RationaleDropout() if dropout is None else dropout
        self.likelihood = DecidedPairs() if likelihood is None else likelihood
        self.temperature, self.batch_size = temperature, batch_size
        self.history: list[dict[str, float]] = []
        self.dual_history: list[dict[str, float]] = []

    def fit(
        self,
        preferences: PreferenceData,
        reward: Callable[..., Any] | None = None,
        dual: Mapping[str, Any] | None = None,
        per_response: Sequence[str] = (),
        **options: Any,
    ) -> ThinkThenScore:
        """Cold start, and with a reward the second stage; return self.

        Parameters
        ----------
        preferences : PreferenceData
            `with_thoughts` gives the thoughts of the cold start; a response without one is scored without.
        reward, per_response : as in `refine`
        dual : options of `DualOptions`
        options : as of `FitOptions`, defaults `COLD_START`
            With a checkpoint both stages resume; the second writes to ``<checkpoint>.dual``.
        """
        settings = {**COLD_START, **options}
        checkpoint = settings.get("checkpoint")
        keeps = bool(settings.get("keep_checkpoint", False))
        if reward is not None and checkpoint is not None:
            settings["keep_checkpoint"] = True
            dual = {"checkpoint": f"{checkpoint}.dual", **(dual or {})}
        self.cold_start(preferences, **settings)
        if reward is not None:
            self.refine(preferences, reward, per_response, **(dual or {}))
            if checkpoint is not None and not keeps:
                Path(checkpoint).unlink(missing_ok=True)
        return self

    def cold_start(self, preferences: PreferenceData, **options: Any) -> ThinkThenScore:
        """First stage: Bradley-Terry after given thoughts; `options` as of `FitOptions`."""
        encoder = ThoughtEncoder(self.network, self.codec, self.dropout)
        model = PreferenceModel(encoder, self._head(), self.likelihood)
        self.history = model.fit(preferences, **{**COLD_START, **options}).history
        self.network.eval()
        return self

    def refine(
        self, preferences: PreferenceData, reward: Callable[..., Any], per_response: Sequence[str] = (), **options: Any
    ) -> ThinkThenScore:
        """Second stage, on comparisons of two; given thoughts are not read.

        Parameters
        ----------
        preferences : PreferenceData
        reward : ``reward(prompts, completions, **columns) -> list of N numbers or None``
            Completions are the thoughts; the columns are those of the data and ``response``.
        per_response : names of columns that list one entry a response
        options : as of `DualOptions`
        """
        settings = DualOptions.of(options)
        if not len(preferences) or (preferences.sizes != 2).any():
            raise InvalidInputError(f"{preferences.source}: the second stage needs comparisons of two responses each")
        samples, _ = parted(preferences.responses)
        prompts = list(preferences.of_responses(preferences.prompts))
        for name in per_response:
            if name not in preferences.columns:
                raise MissingColumnError(
                    f"{preferences.source} has no column {name!r}{nearest(name, preferences.columns)}"
                )

        def of_rows(rows: np.ndarray, cots: Tensor) -> Sequence[float | None]:
            picked: dict[str, Any] = {"response": [samples[row] for row in rows]}
            for name, values in preferences.columns.items():
                picked[name] = [
                    values[row // 2][row % 2] if name in per_response else values[row // 2] for row in rows.tolist()
                ]
            found: Sequence[float | None] = reward(
                prompts=[prompts[row] for row in rows], completions=self.codec.read(cots), **picked
            )
            return found

        contexts = self.codec.contexts(prompts, samples)
        self.dual_history = train_dual(self.network, contexts, _labels(preferences), of_rows, settings)
        return self

    def score(self, prompts: Column, completions: Column, **columns: Any) -> Tensor:
        """What each completion is worth after the model's own thought, float32 (N,), on the CPU.

        A completion that is a `Thought` is scored after the thought that it holds.
        """
        return self.explain(prompts, completions)[0]

    @torch.no_grad()
    def explain(
        self, prompts: Column, completions: Column, generator: torch.Generator | None = None
    ) -> tuple[Tensor, list[Any]]:
        """Scores float32 (N,), and the thoughts they came after (None where a `Thought` held none)."""
        if len(prompts) != len(completions):
            raise InvalidInputError(f"{len(prompts)} prompts and {len(completions)} completions")
        self.network.eval()
        samples, thoughts = parted(completions)
        device, scores = self.network.query.device, torch.zeros(len(samples))
        written = [thought is OWN for thought in thoughts]
        for own in (True, False):
            rows = [row for row, writes in enumerate(written) if writes == own]
            for start in range(0, len(rows), self.batch_size):
                part = rows[start : start + self.batch_size]
                contexts = self.codec.contexts([prompts[i] for i in part], [samples[i] for i in part]).to(device)
                if own:
                    cots = self.network.generate_cot(contexts, self.temperature, generator=generator)
                    for row, said in zip(part, self.codec.read(cots), strict=True):
                        thoughts[row] = said
                else:
                    cots = self.codec.thoughts([thoughts[i] for i in part]).to(device)
                scores[torch.tensor(part)] = self.network.score(contexts, cots).float().cpu()
        return scores, thoughts

    def evaluate(self, preferences: PreferenceData, own_thoughts: bool = True) -> dict[str, float]:
        """``loss`` of Bradley-Terry and ``accuracy`` over the pairs, after the model's own or the given thoughts."""
        responses: Any = preferences.responses
        if own_thoughts:
            responses = parted(responses)[0]
        prompts = list(preferences.of_responses(preferences.prompts))
        table = ComparisonTable(preferences)
        batch = table.batch(np.arange(len(preferences)), torch.device("cpu"))
        loss, metrics = BradleyTerry().loss(Scores(self.score(prompts, responses)), batch)
        return {"loss": float(loss), "accuracy": float(metrics["accuracy"])}

    def as_reward(self, name: str = "think_then_score") -> ModelReward:
        """As a reward of TRL's and polyreward's trainers."""
        return as_reward(self, name)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json``, head and query as ``model.safetensors``, backbone and tokenizer as transformers do.

        The weights of a backbone that is no model of transformers go into ``model.safetensors``.
        """
        folder, network = Path(folder), self.network
        state = {"head.weight": network.head.weight, "query": network.query}
        backbone: Any = network.backbone
        if hasattr(backbone, "save_pretrained"):
            backbone.save_pretrained(str(folder / "backbone"))
        else:
            state |= {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
        codec: dict[str, Any] | None = None
        if isinstance(self.codec, TextCodec):
            self.codec.tokenizer.save_pretrained(str(folder / "tokenizer"))
            codec = {"template": self.codec.template, "chat": self.codec.chat}
        save: Any = require("safetensors.torch", "text")
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
        write_atomically(folder / "model.safetensors", lambda path: save.save_file(tensors, str(path)))
        config = {
            "format": 1,
            "polyreward": polyreward.__version__,
            "model": "polyreward.reward_models.think_then_score:ThinkThenScore",
            "network": {name: getattr(network, name) for name in ("query_token_id", "eos_token_id", "max_cot_tokens")},
            "codec": codec,
            "dropout": {"p": self.dropout.p, "paired": self.dropout.paired},
            "temperature": self.temperature,
            "batch_size": self.batch_size,
            "history": self.history,
            "dual_history": self.dual_history,
        }
        write_json(folder / "config.json", config)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, backbone: Any = None, codec: Codec | None = None, likelihood: Any = None
    ) -> ThinkThenScore:
        """Read a model back.

        Parameters
        ----------
        folder : where it was saved
        backbone : module, optional
            Needed where it is no model of transformers, and for one under an adapter.
        codec : Codec, optional
            Needed where it is no `TextCodec`.

        Raises
        ------
        MissingFileError, InvalidInputError
            No such model in the folder; a part that must be passed; weights of another architecture.
        """
        folder = Path(folder)
        config = read_config(folder)
        if "network" not in config:
            raise InvalidInputError(f"{folder} holds another reward model than ThinkThenScore")
        load: Any = require("safetensors.torch", "text")
        if not (folder / "model.safetensors").exists():
            raise MissingFileError(f"{folder / 'model.safetensors'} does not exist")
        state = load.load_file(str(folder / "model.safetensors"))
        own = {name.removeprefix("backbone."): v for name, v in state.items() if name.startswith("backbone.")}
        if backbone is None:
            if own or not (folder / "backbone" / "config.json").exists():
                raise InvalidInputError(f"{folder} does not say how to make its backbone; pass backbone=...")
            transformers: Any = require("transformers", "text")
            backbone = transformers.AutoModelForCausalLM.from_pretrained(str(folder / "backbone"))
        elif own:
            load_state(backbone, own, folder)
        if codec is None:
            if config["codec"] is None:
                raise InvalidInputError(f"{folder} does not say how to make its codec; pass codec=...")
            transformers = require("transformers", "text")
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder / "tokenizer"))
            codec = TextCodec(tokenizer, **config["codec"])
        network = QueryTokenRewardModel(backbone, **config["network"]).eval()
        with torch.no_grad():
            for name, tensor in (("head.weight", network.head.weight), ("query", network.query)):
                if state[name].shape != tensor.shape:
                    raise InvalidInputError(
                        f"{folder} holds another architecture: {name} has shape {tuple(state[name].shape)}, expected "
                        f"{tuple(tensor.shape)}"
                    )
                tensor.copy_(state[name])
        dropout = RationaleDropout(**config["dropout"])
        model = cls(network, codec, dropout, likelihood, config["temperature"], config["batch_size"])
        model.history, model.dual_history = config["history"], config["dual_history"]
        return model

    def _head(self) -> LinearHead:
        head = LinearHead(self.network.head.in_features)
        head.linear = self.network.head
        return head


def _labels(data: PreferenceData) -> Tensor:
    """0 or 1 is the preferred one of each pair, -1 a tie, -2 not judged."""
    first, second = data.order()[0].reshape(-1, 2).T
    found = np.where(first < second, 0, np.where(second < first, 1, TIE))
    return torch.from_numpy(np.where(np.isnan(first) | np.isnan(second), UNLABELLED, found))
