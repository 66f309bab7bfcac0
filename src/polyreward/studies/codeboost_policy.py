"""The policy of the CodeBoost study: a small network over programs of the mini language, its warm-up and its GRPO."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from polyreward.advantages.presets import grpo
from polyreward.advantages.transform import compute_advantages
from polyreward.batch import RewardBatch
from polyreward.objectives.presets import ema_grpo_objective
from polyreward.rewards.execution_prediction import ExecutionReward, execute_programs
from polyreward.tasks.mini_python import (
    CLASSES,
    INTEGERS,
    IS_OPERATOR,
    OPERANDS,
    SLOTS,
    TOKENS,
    MiniPython,
    programs_of,
    tokens_of,
)

WARM_STEPS, WARM_RATE = 120, 3e-3
HIDDEN, BATCH, GROUP, KL = 192, 64, 5, 0.02
REWARD = ExecutionReward()
GRPO, OBJECTIVE = grpo(epsilon=1e-6, ddof=1), ema_grpo_objective(kl=KL)


@cache
def language() -> MiniPython:
    """The language with what this process has executed of it."""
    return MiniPython(execute_programs)


class Policy(nn.Module):
    """One hidden layer over the tokens of a program, which may be masked, and what it printed; two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(SLOTS * (TOKENS + 1) + CLASSES, HIDDEN), nn.ReLU())
        self.outcome, self.token = nn.Linear(HIDDEN, CLASSES), nn.Linear(HIDDEN, TOKENS)

    def logp(self, view: View) -> Tensor:
        """Log-probabilities (N, 30) of the outcomes; in masked rows of the tokens that fit the slot, others -inf."""
        hidden = self.trunk(view.inputs)
        token = nn.functional.pad(self.token(hidden), (0, CLASSES - TOKENS), value=-torch.inf)
        token = token.masked_fill(~view.fitting, -torch.inf)
        return torch.where(view.masked[:, None], token, self.outcome(hidden)).log_softmax(dim=1)


class View(NamedTuple):
    """What the policy sees of N programs.

    Attributes
    ----------
    inputs : float (N, 186)
    masked : bool (N,)
        Whether a token is masked and the outcome shown.
    fitting : bool (N, 30)
        Tokens that fit the masked slot.
    """

    inputs: Tensor
    masked: Tensor
    fitting: Tensor

    @classmethod
    def of(cls, programs: np.ndarray, slots: np.ndarray, device: str = "cpu") -> View:
        """Programs (N,), each with the masked slot, or -1 for none."""
        tokens, rows = tokens_of(programs), np.arange(len(programs))
        masked = slots >= 0
        tokens[rows[masked], slots[masked]] = TOKENS
        onehot = np.zeros((len(programs), SLOTS, TOKENS + 1), dtype=np.float32)
        at, slot = np.nonzero(tokens >= 0)
        onehot[at, slot, tokens[at, slot]] = 1
        shown = np.zeros((len(programs), CLASSES), dtype=np.float32)
        shown[rows[masked], language().classes(programs[masked])] = 1
        operator = IS_OPERATOR[slots][:, None]
        fitting = np.where(operator, np.arange(CLASSES) >= OPERANDS, np.arange(CLASSES) < OPERANDS)
        inputs = np.concatenate([onehot.reshape(len(programs), -1), shown], axis=1)
        return cls(*(torch.from_numpy(part).to(device) for part in (inputs, masked, fitting)))

    def rows(self, start: int, stop: int) -> View:
        """Some of the programs."""
        return View(*(part[start:stop] for part in self))


def masked_slots(programs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random slot (N,) of each program."""
    present = tokens_of(programs) >= 0
    return np.asarray((rng.random(present.shape) * present).argmax(axis=1))


def warmed_up(labelled: np.ndarray, seed: int, device: str) -> Policy:
    """A policy after supervised steps on the outcomes and on every slot of the labelled programs."""
    torch.manual_seed(seed)
    policy, rng = Policy().to(device), np.random.default_rng([seed, 4])
    optimiser = torch.optim.Adam(policy.parameters(), lr=WARM_RATE)
    none, classes = np.full(len(labelled), -1), language().classes(labelled)
    rows = np.arange(len(labelled))
    for _ in range(WARM_STEPS):
        slots = masked_slots(labelled, rng)
        view = View.of(np.tile(labelled, 2), np.concatenate([none, slots]), device)
        target = np.concatenate([classes, tokens_of(labelled)[rows, slots]])
        loss = nn.functional.nll_loss(policy.logp(view), torch.from_numpy(target).to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return policy


@cache
def reward_of(program: int, answer: int, backward: bool) -> float:
    """Reward of an answer: a class for the program, or the program that a filled-in token makes of it."""
    stdout, stderr = language().printed(program)
    printed = language().printed(answer) if backward else language().rendered(program, answer)
    truth, blocks = {"stdout": stdout, "stderr": stderr}, dict(zip(("stdout", "stderr"), printed, strict=True))
    return REWARD(truth, blocks, format=1.0)["overall"]


def train(
    start: Policy, forward: float, stream: np.ndarray, rate: float, seed: int, device: str
) -> tuple[Policy, float]:
    """GRPO from the warmed-up policy; the policy and the mean reward of the last tenth of the steps."""
    torch.manual_seed(seed)
    policy, rng = Policy().to(device), np.random.default_rng([seed, 5])
    policy.load_state_dict(start.state_dict())
    optimiser = torch.optim.AdamW(policy.parameters(), lr=rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    slots = np.where(rng.random(stream.size) < forward, -1, masked_slots(stream, rng))
    view, made = View.of(stream, slots, device), fillings(stream, slots)
    with torch.no_grad():
        reference = start.logp(view)
    groups = torch.arange(BATCH, device=device).repeat_interleave(GROUP)
    kept = torch.ones(BATCH * GROUP, 1, device=device)
    history = []
    for at in range(0, stream.size, BATCH):
        now = slice(at, at + BATCH)
        logp = policy.logp(view.rows(at, at + BATCH))
        with torch.no_grad():
            answers = torch.multinomial(logp.exp().cpu(), GROUP, replacement=True, generator=generator).to(device)
        rewards = rewards_of(stream[now], slots[now], made[now], answers.cpu().numpy())
        history.append(rewards.mean())
        batch = RewardBatch(torch.from_numpy(rewards.reshape(-1, 1)).to(device), ("execution",), groups)
        advantages = compute_advantages(GRPO, batch).to(logp.dtype)
        taken, base = (values.gather(1, answers).reshape(-1, 1) for values in (logp, reference[now]))
        result = OBJECTIVE(taken, taken.detach(), advantages, kept, reference_logp=base)
        optimiser.zero_grad()
        result.loss.backward()
        optimiser.step()
    return policy, float(np.mean(history[-max(len(history) // 10, 1) :]))


def fillings(programs: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """The program that each token makes of each masked one (N, 11), -1 where it does not fit; all are run."""
    made = np.full((len(programs), TOKENS), -1)
    for token in range(TOKENS):
        rows = np.flatnonzero((slots >= 0) & (IS_OPERATOR[slots] == (token >= OPERANDS)))
        tokens = tokens_of(programs[rows])
        tokens[np.arange(len(rows)), slots[rows]] = token
        made[rows, token] = programs_of(tokens)
    language().classes(np.unique(made[made >= 0]))
    return made


def rewards_of(programs: np.ndarray, slots: np.ndarray, made: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Rewards (P, G) of answers (P, G): classes, or tokens where a slot is masked."""
    masked = slots >= 0
    chosen = np.where(masked[:, None], np.take_along_axis(made, answers % TOKENS, axis=1), answers)
    rows = zip(programs.tolist(), chosen.tolist(), masked.tolist(), strict=True)
    return np.array([[reward_of(program, answer, back) for answer in answered] for program, answered, back in rows])


class HeldOut:
    """Fresh programs, each with a masked slot."""

    def __init__(self, programs: np.ndarray, rng: np.random.Generator) -> None:
        self.programs, self.slots = programs, masked_slots(programs, rng)
        self.classes, self.made = language().classes(programs), fillings(programs, self.slots)

    def measure(self, policy: Policy) -> dict[str, float]:
        """Greedy accuracies of the policy."""
        device = str(next(policy.parameters()).device)
        with torch.no_grad():
            outcome = policy.logp(View.of(self.programs, np.full(len(self.programs), -1), device)).argmax(dim=1)
            token = policy.logp(View.of(self.programs, self.slots, device)).argmax(dim=1)
        right = outcome.cpu().numpy() == self.classes
        clean = self.classes < INTEGERS
        made = self.made[np.arange(len(self.programs)), token.cpu().numpy()]
        pairs = zip(made.tolist(), self.programs.tolist(), strict=True)
        same = [language().printed(answer) == language().printed(program) for answer, program in pairs]
        figures = {
            "clean": float(right[clean].mean()),
            "error": float(right[~clean].mean()),
            "infill": float(np.mean(same)),
        }
        return figures | {"sum": sum(figures.values())}
