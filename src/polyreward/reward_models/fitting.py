"""The fit that every composition of encoder, head, likelihood and penalties shares.

Minibatches with AdamW, or all data at once with LBFGS; early stopping on held-out prompts; a checkpoint from which an
interrupted fit goes on to the same result.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyreward.reward_models.checkpoints import read_checkpoint
from polyreward.reward_models.fit_options import FitOptions, FitProgress
from polyreward.reward_models.network import Network, Source, learned_state, restore
from polyreward.storage import write_atomically


def fit_network(
    network: Network,
    training: tuple[Source, np.ndarray],
    validation: tuple[Source, np.ndarray] | None,
    options: FitOptions,
) -> list[dict[str, float]]:
    """Fit in place; return ``epoch``, ``loss``, ``accuracy`` and those of the validation for every epoch."""
    fit = _Fit(network, training, validation, options)
    fit.resume()
    with contextlib.suppress(_Done):
        for epoch in range(fit.epoch, options.epochs):
            fit.run(epoch)
    fit.finish()
    return fit.history


@torch.no_grad()
def evaluate_network(
    network: Network, source: Source, index: np.ndarray, device: Any, batch_size: int = 1024
) -> dict[str, float]:
    """Mean loss and accuracy over some comparisons, without noise."""
    network.eval()
    total = [0.0, 0.0]
    for batch in _batches(index, batch_size):
        loss, metrics = network(source, batch, device)
        total[0] += float(loss.detach()) * len(batch) / len(index)
        total[1] += float(metrics.get("accuracy", 0.0)) * len(batch) / len(index)
    return {"loss": total[0], "accuracy": total[1]}


class _Done(Exception):
    """Early stopping."""


class _Fit:
    """State of a fit."""

    def __init__(
        self,
        network: Network,
        training: tuple[Source, np.ndarray],
        validation: tuple[Source, np.ndarray] | None,
        options: FitOptions,
    ) -> None:
        self.options, self.network, self.validation = options, network, validation
        self.source, self.index = training
        self.accelerator = options.accelerator
        self.device = self.accelerator.device if self.accelerator is not None else torch.device(options.device)
        network.to(self.device)
        self.each_epoch = 1 if options.optimizer == "lbfgs" else math.ceil(len(self.index) / options.batch_size)
        self.steps = self.each_epoch * options.epochs
        self.optimizer = self._optimizer()
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.wrapped: Any = network
        if self.accelerator is not None:
            self.wrapped, self.optimizer = self.accelerator.prepare(network, self.optimizer)
        self.epoch, self.step, self.waited = 0, 0, 0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] | None = None
        self.best_loss, self.seen, self.start = math.inf, [0.0, 0.0, 0.0], time.perf_counter()

    def _optimizer(self) -> torch.optim.Optimizer:
        options, network = self.options, self.network
        if options.optimizer == "lbfgs":
            learns = [p for p in network.parameters() if p.requires_grad]
            return torch.optim.LBFGS(learns, lr=1.0, max_iter=20, history_size=20, line_search_fn="strong_wolfe")
        own = getattr(network.head, "parameter_groups", None)
        groups = (
            list(own()) if own is not None else [{"params": [p for p in network.head.parameters() if p.requires_grad]}]
        )
        for part in network.learned:
            grouped = getattr(part, "parameter_groups", None)
            groups += (
                list(grouped())
                if grouped is not None
                else [{"params": [p for p in part.parameters() if p.requires_grad]}]
            )
        if network.encoder is not None:
            learns = [p for p in network.encoder.parameters() if p.requires_grad]
            groups.append({"params": learns, "lr": options.encoder_learning_rate})
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=options.learning_rate, weight_decay=options.weight_decay
        )

    def run(self, epoch: int) -> None:
        """One epoch, or what is left of it."""
        self.network.train()
        if self.options.optimizer == "lbfgs":
            self._full_batch(epoch)
        else:
            self._minibatches(epoch)
        loss, accuracy, count = self.seen
        record = {"epoch": epoch + 1, "loss": loss / max(count, 1), "accuracy": accuracy / max(count, 1)}
        self.seen, self.epoch = [0.0, 0.0, 0.0], epoch + 1
        if self.validation is not None:
            record |= {f"validation_{name}": value for name, value in self._validate().items()}
            if record["validation_loss"] < self.best_loss:
                self.best_loss, self.waited = record["validation_loss"], 0
                self.best = {name: value.detach().clone() for name, value in learned_state(self.network).items()}
            else:
                self.waited += 1
        self.history.append(record)
        self.save()
        if self.options.patience is not None and self.waited >= self.options.patience:
            raise _Done

    def _minibatches(self, epoch: int) -> None:
        order = _shuffled(self.index, self.options.shuffle_block, [self.options.seed, epoch])
        size = self.options.batch_size
        for number in range(self.step - epoch * self.each_epoch, self.each_epoch):
            batch = order[number * size : (number + 1) * size]
            self._set_rates()
            self.optimizer.zero_grad()
            done = torch.zeros(3, dtype=torch.float64)
            for part in self._parts(batch):
                loss, metrics = self.wrapped(self.source, part, self.device)
                share = len(part) / len(batch)
                if self.accelerator is not None:
                    share *= self.accelerator.num_processes
                    self.accelerator.backward(loss * share)
                else:
                    (loss * share).backward()
                done += torch.tensor([float(loss.detach()), float(metrics.get("accuracy", 0.0)), 1.0]).double() * len(
                    part
                )
            self._clip()
            self.optimizer.step()
            self._after(epoch, done.tolist())

    def _full_batch(self, epoch: int) -> None:
        learns = [p for p in self.network.parameters() if p.requires_grad]
        done = [0.0, 0.0, 0.0]

        def closure() -> float:
            self.optimizer.zero_grad()
            total, accuracy = 0.0, 0.0
            for batch in _batches(self.index, max(self.options.batch_size, 65_536)):
                loss, metrics = self.network(self.source, batch, self.device)
                share = len(batch) / len(self.index)
                (loss * share).backward()
                total += share * float(loss.detach())
                accuracy += share * float(metrics.get("accuracy", 0.0))
            done[:] = [total * len(self.index), accuracy * len(self.index), len(self.index)]
            if self.options.weight_decay:
                decay = 0.5 * self.options.weight_decay * sum(p.square().sum() for p in learns)
                assert isinstance(decay, Tensor)
                decay.backward()
                total += float(decay.detach())
            return total

        self._set_rates()
        self.optimizer.step(closure)  # type: ignore[arg-type]
        self._after(epoch, done)

    def _parts(self, batch: np.ndarray) -> list[np.ndarray]:
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            batch = batch[self.accelerator.process_index :: self.accelerator.num_processes]
        return [part for part in np.array_split(batch, self.options.accumulate) if len(part)]

    def _set_rates(self) -> None:
        share = self.step / self.steps
        warmup = self.options.warmup
        factor = min(1.0, (self.step + 1) / max(warmup * self.steps, 1)) if warmup else 1.0
        if self.options.schedule == "cosine":
            factor *= 0.5 * (1 + math.cos(math.pi * max(share - warmup, 0) / (1 - warmup)))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        for part in (self.network.head, *self.network.penalties):
            if hasattr(part, "step"):
                part.step(share)

    def _clip(self) -> None:
        if self.options.clip is not None:
            learns = [p for p in self.network.parameters() if p.requires_grad]
            if self.accelerator is not None:
                self.accelerator.clip_grad_norm_(learns, self.options.clip)
            else:
                nn.utils.clip_grad_norm_(learns, self.options.clip)

    def _after(self, epoch: int, done: Sequence[float]) -> None:
        self.step += 1
        self.seen = [a + b for a, b in zip(self.seen, done, strict=True)]
        every = self.options.checkpoint_steps
        if every is not None and self.step % every == 0 and self.step % self.each_epoch:
            self.save()
        if self.options.progress is not None:
            last = self.history[-1].get("validation_loss") if self.history else None
            seconds = time.perf_counter() - self.start
            loss = done[0] / max(done[2], 1)
            self.options.progress(
                FitProgress(epoch + 1, self.options.epochs, self.step, self.steps, loss, last, seconds)
            )

    def _validate(self) -> dict[str, float]:
        assert self.validation is not None
        size = max(self.options.batch_size // self.options.accumulate, 1)
        return evaluate_network(self.network, *self.validation, self.device, size)

    def finish(self) -> None:
        """Best weights back, checkpoint gone unless it is to be kept."""
        if self.best is not None:
            restore(self.network, self.best)
        self.network.eval()
        if self.options.checkpoint is not None and self._writes and not self.options.keep_checkpoint:
            Path(self.options.checkpoint).unlink(missing_ok=True)

    @property
    def _writes(self) -> bool:
        return self.accelerator is None or bool(self.accelerator.is_main_process)

    def save(self) -> None:
        """Write the checkpoint."""
        if self.options.checkpoint is None or not self._writes:
            return
        state = {
            "key": self._key(),
            "network": learned_state(self.network),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "counts": [self.epoch, self.step, self.waited],
            "best_loss": self.best_loss,
            "history": self.history,
            "seen": self.seen,
            "random": torch.get_rng_state(),
        }
        write_atomically(self.options.checkpoint, lambda path: torch.save(state, path))

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one.

        Raises
        ------
        InvalidInputError
            It is damaged, or of another fit: other data, options or parts.
        """
        if self.options.checkpoint is None:
            return  # the key takes a pass over the data
        state = read_checkpoint(
            self.options.checkpoint, self._key(), "a fit of other data, options or parts", self.device
        )
        if state is None:
            return
        restore(self.network, state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step, self.waited = state["counts"]
        self.best, self.best_loss, self.history = state["best"], state["best_loss"], state["history"]
        self.seen = state["seen"]
        torch.set_rng_state(state["random"].cpu())
        if self.options.patience is not None and self.waited >= self.options.patience:
            self.epoch = self.options.epochs

    def _key(self) -> str:
        table = self.source.table
        left_out = (
            "device", "checkpoint", "checkpoint_steps", "keep_checkpoint", "accelerator", "progress", "validation",
        )  # fmt: skip
        settings = {f.name: getattr(self.options, f.name) for f in fields(self.options) if f.name not in left_out}
        shapes = {name: tuple(value.shape) for name, value in learned_state(self.network).items()}
        digest = hashlib.sha256(repr((settings, shapes, repr(self.network.likelihood))).encode())
        for array in (table.offsets, table.ranks, table.ratings, table.target, table.margin, self.index):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def _shuffled(index: np.ndarray, block: int, seed: Sequence[int]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if block == 1:
        return np.asarray(rng.permutation(index))
    starts = rng.permutation(math.ceil(len(index) / block)) * block
    places = (starts[:, None] + np.arange(block)).reshape(-1)
    return np.asarray(index[places[places < len(index)]])


def _batches(index: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (index[start : start + size] for start in range(0, len(index), size))
