"""`PersonalJudge`: a generative judge as a reward model that knows its users, and like-minded ones.

    judge = PersonalJudge(ChatJudge(client), embed=encoder).fit(data)
    judge.score(prompts, responses, annotator=users)

A response is scored by m chains that the judge writes with some of the user's own earlier choices before it, and by one
chain with those of each of n neighbours, all about the same candidates in the same shuffled order. The first chain that
can be read says who the user is; its embedding finds the prototype and the neighbours (`UserPrototypes`), and
`UserScaler` makes one score of all. One judge writes every chain.

Paper: P-GenRM: Personalized Generative Reward Model with Test-time User-based Scaling (arXiv 2602.12116).
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import polyreward
from polyreward.errors import InvalidInputError, MissingFileError, require
from polyreward.preference_record import content_key
from polyreward.preferences import Column, PreferenceData
from polyreward.reward_models.contract import ModelReward, as_reward
from polyreward.reward_models.evaluation_chains import EvaluationChain, FormatError, GenerativeJudge, own_scores
from polyreward.reward_models.model import UnknownAnnotatorWarning
from polyreward.reward_models.saving import read_config
from polyreward.reward_models.texts import plain
from polyreward.reward_models.user_choices import Choice, choices_of, per_row, plain_user
from polyreward.reward_models.user_prototypes import Histories, UserPrototypes
from polyreward.reward_models.user_scaling import UserScaler
from polyreward.storage import write_atomically, write_json

Request = tuple[Any, Sequence[Choice], Sequence[Any], int, str | None]


@dataclass(frozen=True)
class Verdict:
    """What became of one set of candidates.

    Attributes
    ----------
    scores : float64 (b,)
        NaN where no chain scored a candidate.
    own, neighbours : float64 (m, b) and (n, b)
        Scores of every chain, NaN in rows that could not be read.
    persona : what the first chain that can be read says about the user
    members : int (n,)
        Rows of the prototypes' embeddings whose histories were used.
    """

    scores: np.ndarray
    own: np.ndarray
    neighbours: np.ndarray
    persona: str
    members: np.ndarray


class PersonalJudge:
    """A judge with users (arXiv 2602.12116).

    Parameters
    ----------
    judge : GenerativeJudge
        Where it has ``sample_each``, as `ChatJudge` has, all chains of a call are asked for at once.
    embed : function of N texts -> float (N, d), or an encoder with ``encode_prompts``; needed with ``scaler.n > 0``
    prototypes : UserPrototypes, optional
        Default: as many as fit, 50 at most.
    scaler : UserScaler
    history : int
        Earlier choices that a chain sees, h; 3 in the paper.
    seed : int
        Of the choices that are shown and of the order of the candidates, which depend on user and prompt too.

    Attributes
    ----------
    choices : mapping of user to their (query, chosen, rejected), and `rows`, where these stand in the data
    dropped : list of int
        Rows of the data whose chain had no readable first part; they are in no prototype.
    """

    def __init__(
        self,
        judge: GenerativeJudge,
        embed: Any = None,
        prototypes: UserPrototypes | None = None,
        scaler: UserScaler | None = None,
        history: int = 3,
        seed: int = 0,
    ) -> None:
        self.judge, self.embed, self.prototypes = judge, embed, prototypes
        self.scaler = UserScaler() if scaler is None else scaler
        if history < 0:
            raise InvalidInputError(f"history must be at least 0, got {history}")
        if self.scaler.n and embed is None:
            raise InvalidInputError("neighbours need embeddings of personas; pass embed, or a scaler with n=0")
        self.history, self.seed = history, seed
        self.choices: dict[Hashable, list[Choice]] = {}
        self.rows: dict[Hashable, list[int]] = {}
        self.member_choices: list[list[Choice]] = []
        self.dropped: list[int] = []

    def fit(self, preferences: PreferenceData, **options: Any) -> PersonalJudge:
        """Keep every user's choices, and with neighbours find the prototypes; return self.

        Parameters
        ----------
        preferences : PreferenceData with annotators
            Ties and comparisons without judgement are left out; of more than two responses the best and the worst
            count. Users whom the model will be tested on belong into no fit with neighbours but by choices of theirs
            that are not tested.
        options : none

        Raises
        ------
        InvalidInputError
            No annotators, no choices, no persona that can be read, an option.
        """
        if options:
            raise InvalidInputError(f"PersonalJudge.fit takes no options, got {', '.join(options)}")
        self.choices, self.rows = choices_of(preferences)
        self.member_choices, self.dropped = [], []
        if self.scaler.n:
            self._fit_prototypes(preferences.source)
        return self

    def remember(self, preferences: PreferenceData) -> PersonalJudge:
        """Keep the choices of users who come after the fit and are in no prototype; return self.

        They get neighbours among the users of the fit. `row` of `score` counts in the data that a user came with.

        Raises
        ------
        InvalidInputError
            No fit yet, no annotators or choices, someone whose choices the judge has.
        """
        self._require_fit()
        choices, rows = choices_of(preferences)
        known = [user for user in choices if user in self.choices]
        if known:
            raise InvalidInputError(f"{preferences.source}: the judge has choices of {known[0]!r} already; fit anew")
        self.choices.update(choices)
        self.rows.update(rows)
        return self

    def score(
        self,
        prompts: Column,
        completions: Column,
        annotator: Any = None,
        row: Sequence[int | None] | None = None,
        **columns: Any,
    ) -> Tensor:
        """What each completion is worth to whom, float32 (N,), on the CPU; NaN where no chain could be read.

        Parameters
        ----------
        prompts, completions : length N
            Completions of the same prompt for the same user are judged beside one another.
        annotator : length N, or one for all, optional
            Someone unknown gets the score of a judge who sees no choices, and an `UnknownAnnotatorWarning`.
        row : length N, optional
            Rows of the fitted data that the completions are part of; a user's own choice there is not shown, which
            would give the answer away. Other choices with the same text are shown.
        """
        count = len(completions)
        users = per_row(annotator, count, "annotator")
        left_out = per_row(row, count, "row")
        if len(prompts) != count:
            raise InvalidInputError(f"{len(prompts)} prompts and {count} completions")
        groups: dict[Hashable, list[int]] = {}
        for place in range(count):
            key = (content_key(prompts[place]), content_key(users[place]), left_out[place])
            groups.setdefault(key, []).append(place)
        items = [
            (prompts[at[0]], [completions[i] for i in at], users[at[0]], left_out[at[0]]) for at in groups.values()
        ]
        found = torch.full((count,), torch.nan)
        for at, verdict in zip(groups.values(), self.judge_each(items), strict=True):
            found[torch.tensor(at)] = torch.from_numpy(verdict.scores).float()
        return found

    def compare(
        self,
        query: Any,
        candidates: Sequence[Any],
        user: Any = None,
        row: int | None = None,
        criteria: str | None = None,
    ) -> Verdict:
        """Judge candidates beside one another; `criteria` is what the user says to want."""
        return self.judge_each([(query, candidates, user, row)], [criteria])[0]

    def judge_each(
        self, items: Sequence[tuple[Any, Sequence[Any], Any, int | None]], criteria: Sequence[str | None] | None = None
    ) -> list[Verdict]:
        """Verdicts of items (query, candidates, user, row): first all own chains, then all of the neighbours."""
        self._require_fit()
        self._warn([user for _, _, user, _ in items])
        wanted, orders, requests = criteria or [None] * len(items), [], []
        for (query, candidates, user, row), want in zip(items, wanted, strict=True):
            rng = self._generator(query, user)
            order = rng.permutation(len(candidates))
            orders.append(order)
            shown = self._shown(user, row, rng)
            requests.append((query, shown, [candidates[i] for i in order], max(self.scaler.m, 1), want))
        chains = self._sample(requests)
        personas = [
            next((c.persona for c in row if isinstance(c, EvaluationChain) and c.persona), "") for row in chains
        ]
        members = self._members(personas, [user for _, _, user, _ in items])
        asked = [
            (query, self.member_choices[member], candidates, 1, want)
            for (query, _, candidates, _, want), row in zip(requests, members, strict=True)
            for member in row
        ]
        replies = iter(self._sample(asked))
        verdicts = []
        for order, written, persona, found in zip(orders, chains, personas, members, strict=True):
            back = np.argsort(order)
            own = own_scores(written[: self.scaler.m], len(order))[:, back]
            near = own_scores([next(replies)[0] for _ in found], len(order))[:, back]
            verdicts.append(Verdict(self.scaler.combine(own, near), own, near, persona, found))
        return verdicts

    def knows(self, annotators: Sequence[Any]) -> np.ndarray:
        """Whose choices the judge has, bool (N,)."""
        return np.array([user in self.choices for user in annotators], bool)

    def as_reward(self, name: str = "personal_judge") -> ModelReward:
        """As a reward of TRL's and polyreward's trainers; the column ``annotator`` says for whom."""
        return as_reward(self, name)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` with the users' choices, and the prototypes as ``model.safetensors``; not the judge.

        Raises
        ------
        InvalidInputError
            No fit yet; choices or users that JSON cannot hold.
        """
        self._require_fit()
        folder = Path(folder)
        config = {
            "format": 1,
            "polyreward": polyreward.__version__,
            "model": "polyreward.reward_models.personal_judge:PersonalJudge",
            "scaler": asdict(self.scaler),
            "history": self.history,
            "seed": self.seed,
            "users": [[plain_user(user), self.rows[user], choices] for user, choices in self.choices.items()],
            "member_choices": self.member_choices,
            "member_users": None if self.prototypes is None else list(map(plain_user, self.prototypes.users or ())),
        }
        try:
            config = json.loads(json.dumps(config))
        except (TypeError, ValueError) as error:
            raise InvalidInputError(f"the users' choices cannot be stored as JSON: {error}") from error
        if self.prototypes is not None and self.prototypes.prototypes is not None:
            save: Any = require("safetensors.torch", "text")
            arrays = {
                name: torch.from_numpy(np.ascontiguousarray(getattr(self.prototypes, name)))
                for name in ("prototypes", "embeddings", "assignments")
            }
            write_atomically(folder / "model.safetensors", lambda path: save.save_file(arrays, str(path)))
        write_json(folder / "config.json", config)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, judge: GenerativeJudge | None = None, embed: Any = None
    ) -> PersonalJudge:
        """Read a judge's users back; the judge itself, and with neighbours what embeds, are passed.

        Raises
        ------
        MissingFileError, InvalidInputError
            No such model in the folder; no judge.
        """
        folder = Path(folder)
        config = read_config(folder)
        if "member_choices" not in config:
            raise InvalidInputError(f"{folder} holds another reward model than PersonalJudge")
        if judge is None:
            raise InvalidInputError(f"{folder} holds the users of a judge and not the judge; pass judge=...")
        scaler = UserScaler(**{**config["scaler"], "weights": tuple(config["scaler"]["weights"])})
        model = cls(judge, embed, None, scaler, config["history"], config["seed"])
        for user, rows, choices in config["users"]:
            model.rows[user], model.choices[user] = rows, [(q, yes, no) for q, yes, no in choices]
        model.member_choices = [[(q, yes, no) for q, yes, no in row] for row in config["member_choices"]]
        if scaler.n:
            path = folder / "model.safetensors"
            if not path.exists():
                raise MissingFileError(f"{path} does not exist")
            load: Any = require("safetensors.torch", "text")
            arrays = load.load_file(str(path))
            made = UserPrototypes(len(arrays["prototypes"]), refine=False)
            made.prototypes, made.embeddings = arrays["prototypes"].numpy(), arrays["embeddings"].numpy()
            made.assignments, made.users = arrays["assignments"].numpy(), config["member_users"]
            model.prototypes = made
        return model

    def _require_fit(self) -> None:
        if not self.choices:
            raise InvalidInputError("the judge has not been fitted; call fit(preferences) first")

    def _fit_prototypes(self, source: str) -> None:
        requests: list[Request] = []
        owners: list[tuple[Hashable, int]] = []
        for user, choices in self.choices.items():
            for place, (query, chosen, rejected) in enumerate(choices):
                rng = self._generator(query, (user, place))
                order = rng.permutation(2)
                shown = self._shown(user, self.rows[user][place], rng)
                requests.append((query, shown, [(chosen, rejected)[i] for i in order], 1, None))
                owners.append((user, place))
        personas, kept = [], []
        for number, (chain,) in enumerate(self._sample(requests)):
            if isinstance(chain, EvaluationChain) and chain.persona:
                personas.append(chain.persona)
                kept.append(number)
            else:
                user, place = owners[number]
                self.dropped.append(self.rows[user][place])
        if not kept:
            raise InvalidInputError(f"{source}: none of {len(requests)} chains has a first part that can be read")
        self.member_choices = [list(requests[number][1]) for number in kept]
        if self.prototypes is None:
            self.prototypes = UserPrototypes(min(50, len(kept)), refine=False, seed=self.seed)
        histories = None
        if self.prototypes.refine:
            histories = self._histories(
                [(self.choices[u][p], list(requests[k][1])) for k in kept for u, p in [owners[k]]]
            )
        self.prototypes.fit(self._embedded(personas), histories, [owners[k][0] for k in kept])

    def _histories(self, members: Sequence[tuple[Choice, Sequence[Choice]]]) -> Histories:
        every = [choice for current, past in members for choice in (current, *past)]
        vectors = iter(self._embedded([plain(part) for choice in every for part in choice]).reshape(len(every), 3, -1))
        return Histories.of([(*next(vectors), [tuple(next(vectors)) for _ in past]) for _, past in members])

    def _members(self, personas: Sequence[str], users: Sequence[Any]) -> list[np.ndarray]:
        """Rows of the neighbours of each item; none for users without persona or choices."""
        none = np.zeros(0, np.int64)
        found = [none] * len(personas)
        rows = [i for i, text in enumerate(personas) if text and users[i] in self.choices] if self.scaler.n else []
        if rows:
            assert self.prototypes is not None
            vectors = self._embedded([personas[i] for i in rows])
            indices, _ = self.prototypes.neighbours(vectors, self.scaler.n, [users[i] for i in rows])
            for i, near in zip(rows, indices, strict=True):
                found[i] = near[near >= 0]
        return found

    def _shown(self, user: Any, row: int | None, rng: np.random.Generator) -> list[Choice]:
        """Some of the user's choices, without the one that stands in `row` of the data."""
        places = [place for place, own in enumerate(self.rows.get(user, ())) if own != row]
        picked = rng.permutation(len(places))[: self.history]
        return [self.choices[user][places[i]] for i in picked]

    def _generator(self, query: Any, user: Any) -> np.random.Generator:
        key = json.dumps([content_key(query), user], default=str)
        return np.random.default_rng([self.seed, zlib.crc32(key.encode())])

    def _sample(self, requests: Sequence[Request]) -> list[list[EvaluationChain | FormatError]]:
        each: Callable[..., Any] | None = getattr(self.judge, "sample_each", None)
        found = [self.judge.sample(*r) for r in requests] if each is None else each(requests)
        for request, chains in zip(requests, found, strict=True):
            if len(chains) != request[3]:
                raise InvalidInputError(f"the judge gave {len(chains)} chains, asked for {request[3]}")
        return [list(chains) for chains in found]

    def _embedded(self, texts: list[str]) -> np.ndarray:
        encode = getattr(self.embed, "encode_prompts", self.embed)
        found = np.asarray(encode(texts), np.float32)
        if found.ndim != 2 or len(found) != len(texts):
            raise InvalidInputError(f"embed gave shape {found.shape} for {len(texts)} texts, expected (N, d)")
        return found

    def _warn(self, users: Sequence[Any]) -> None:
        unknown = {str(user) for user in users if user is not None and user not in self.choices}
        if unknown:
            shown = ", ".join(sorted(unknown)[:3])
            warnings.warn(
                UnknownAnnotatorWarning(f"{len(unknown)} unknown annotators ({shown}) get the population's score"),
                stacklevel=4,
            )
