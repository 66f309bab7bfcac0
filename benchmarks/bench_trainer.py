"""Time of a training step of `PolyrewardGRPOTrainer` beside TRL's `GRPOTrainer`: same policy, data, seed and rewards.

Short runs of both alternate in one process. A step generates 64 completions of 24 tokens with a decoder of 0.8 million
parameters and updates on them once; policies this small are where an overhead shows most. Each ratio is the median over
pairs of steps with the same number, which do the same work.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.utils.logging import set_verbosity_error
from trl import GRPOConfig, GRPOTrainer

from polyreward.advantages.presets import grpo_trl
from polyreward.curricula import AdvantageBandit
from polyreward.objectives import grpo_objective
from polyreward.training.text import PolyrewardGRPOTrainer

TASKS = ("first", "second", "third", "fourth")
TARGET = 1.03


class Timer(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def even(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [sum(word.endswith(tuple("02468")) for word in text.split()) / 24 for text in completions]


def variety(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


def first_letter(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
    pairs = zip(prompts, completions, strict=True)
    return [None if "w1" in prompt else float(text.startswith("w7")) for prompt, text in pairs]


def make(kind: type, folder: Path, steps: int, **parts: Any) -> tuple[Any, Timer]:
    words = ["<pad>", "<end>", "<unk>", *(f"w{i}" for i in range(253))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", padding_side="left"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    rows = [{"prompt": " ".join(f"w{(i * k) % 250}" for k in range(1, 9)), "task": TASKS[i % 4]} for i in range(256)]
    args = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=64, num_generations=8, max_completion_length=24,
        generation_kwargs={"min_new_tokens": 24}, max_steps=steps, learning_rate=1e-3, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
        dataloader_pin_memory=False, scale_rewards="group", log_level="error",
    )  # fmt: skip
    timer = Timer()
    run = kind(
        model=LlamaForCausalLM(config), reward_funcs=[even, variety, first_letter], args=args,
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[timer], **parts,
    )  # fmt: skip
    return run, timer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4, help="of a run; the first is not counted")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        arms: dict[str, tuple[type, Any]] = {
            "trl": (GRPOTrainer, dict),
            "advantage, rollout log": (
                PolyrewardGRPOTrainer, lambda: {"advantage": grpo_trl(), "rollout_log": folder / "rollouts"},
            ),
            "advantage, rollout log, objective, curriculum": (
                PolyrewardGRPOTrainer,
                lambda: {
                    "advantage": grpo_trl(), "rollout_log": folder / "rollouts", "objective": grpo_objective(),
                    "curriculum": AdvantageBandit(TASKS),
                },
            ),
        }  # fmt: skip
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        losses: dict[str, list[float]] = {}
        for turn in range(options.rounds):
            for name, (kind, parts) in list(arms.items())[:: 1 if turn % 2 else -1]:
                run, timer = make(kind, folder, options.steps, **parts())
                for printer in run.callback_handler.callbacks[:]:
                    if type(printer).__name__ == "PrinterCallback":
                        run.remove_callback(printer)
                run.train()
                seconds[name] += timer.seconds[1:]
                losses[name] = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    ours = losses["advantage, rollout log"]
    if any(abs(a - b) > 1e-4 for a, b in zip(losses["trl"], ours, strict=True)):
        print(f"the losses differ: {losses['trl']} and {ours}", file=sys.stderr)
        return 1
    print("## Training step: PolyrewardGRPOTrainer beside TRL's GRPOTrainer\n")
    print(f"64 completions of 24 tokens, 0.8 M parameters, {len(seconds['trl'])} steps each, one thread.\n")
    print("| trainer | step, ms (median) | ratio to TRL (median of pairs) | target |")
    print("|---|---|---|---|")
    print(f"| TRL's GRPOTrainer | {1000 * statistics.median(seconds['trl']):.1f} | 1.000 | |")
    for name in list(arms)[1:]:
        pairs = [own / peer for own, peer in zip(seconds[name], seconds["trl"], strict=True)]
        milliseconds = 1000 * statistics.median(seconds[name])
        print(f"| ours: {name} | {milliseconds:.1f} | {statistics.median(pairs):.3f} | {TARGET:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
