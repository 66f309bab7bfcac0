"""A tiny policy with its data and rewards, and runs of it in this or another process."""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig

from polyreward.advantages.presets import ema_grpo
from polyreward.curricula import AdvantageBandit
from polyreward.objectives import token_mean_objective
from polyreward.training.text import PolyrewardGRPOTrainer

WORDS = ["<pad>", "<end>", "<unk>", "user", "bot", *"abcdefgh", *"0123456789"]
TASKS = ("count", "spell", "sort")
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def policy() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def prompts(conversational: bool = False) -> Dataset:
    rows = []
    for i in range(24):
        text = " ".join("abcdefgh"[(i * k + k) % 8] for k in range(1, 4))
        prompt: Any = [{"role": "user", "content": text}] if conversational else text
        rows.append({"prompt": prompt, "task": TASKS[i % 3], "difficulty": i % 5})
    return Dataset.from_list(rows)


def letters(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
    """Share of letters, which does not apply to the task "sort"."""
    found = [_text(c) for c in completions]
    shares = [sum(word in "abcdefgh" for word in text.split()) / 8 for text in found]
    return [None if task == "sort" else s for s, task in zip(shares, columns["task"], strict=True)]


def brevity(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
    columns["log_extra"]("words", [len(_text(c).split()) for c in completions])
    return [-0.3 * len(_text(c).split()) + 0.1 * len(set(_text(c))) for c in completions]


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def settings(folder: Path, **options: Any) -> GRPOConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 3,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }
    return GRPOConfig(**{**defaults, **options})


def trainer(
    folder: Path, kind: type = PolyrewardGRPOTrainer, *, args: dict[str, Any] | None = None, **parts: Any
) -> Any:
    torch.set_num_threads(1)
    chosen: dict[str, Any] = {
        "model": parts.pop("model", None) or policy(),
        "reward_funcs": [letters, brevity],
        "args": settings(folder, **(args or {})),
        "train_dataset": prompts(),
        "processing_class": tokenizer(),
    }
    return kind(**{**chosen, **parts})


def history(run: Any) -> list[dict[str, float]]:
    """What the run logged at each step, without what the machine's speed decides."""
    timed = ("time", "per_second", "runtime", "profiling", "seconds")
    return [
        {k: v for k, v in entry.items() if not any(word in k for word in timed)}
        for entry in run.state.log_history
        if "loss" in entry
    ]


def fixed_rollout(asked: list[Any], trainer: Any) -> dict[str, Any]:
    """Completions that depend on the step and the sample's place in the whole batch alone."""
    words = trainer.processing_class(asked)["input_ids"]
    first = trainer.accelerator.process_index * len(asked)
    completions = []
    for i in range(len(asked)):
        generator = torch.Generator().manual_seed(1000 * trainer.state.global_step + first + i)
        length = int(torch.randint(1, 7, (1,), generator=generator))
        completions.append([*torch.randint(5, len(WORDS), (length,), generator=generator).tolist(), 1])
    return {
        "prompt_ids": words,
        "completion_ids": completions,
        "logprobs": None,
        "env_mask": [[int(k % 3 != 1) for k in range(len(tokens))] for tokens in completions],
        "calls": [i % 2 for i in range(len(asked))],
    }


def calls_as_stratum(*, inputs: list[dict[str, Any]], **_: Any) -> dict[str, list[Any]]:
    return {"stratum": [f"{row['calls']} calls" for row in inputs]}


class _Kill(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """A run of its own: ``FOLDER --processes N`` over N processes, or ``FOLDER --kill STEP`` to be killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--kill", type=int)
    options = parser.parse_args()
    if options.processes:
        run = distributed(options.folder, options.processes)
        run.train()
        if run.accelerator.is_main_process:
            (options.folder / "history.json").write_text(json.dumps(history(run)))
        return
    run = resumable(options.folder, callbacks=[_Kill(options.kill)])
    run.train()


def distributed(folder: Path, processes: int) -> Any:
    return trainer(
        folder,
        args={"per_device_train_batch_size": 8 // processes, "gradient_accumulation_steps": 2},
        advantage=ema_grpo(by="task", decay=0.5),
        objective=token_mean_objective(),
        curriculum=AdvantageBandit(TASKS, temperature=0.5),
        rollout_func=fixed_rollout,
        extra_columns=calls_as_stratum,
        batch_columns=("task", "difficulty", "words"),
        rollout_log=folder / "rollouts",
    )


def resumable(folder: Path, callbacks: list[TrainerCallback] | None = None, **options: Any) -> Any:
    return trainer(
        folder,
        args={"max_steps": 6, "save_strategy": "steps", "save_steps": 2, **options},
        advantage=ema_grpo(by="task", decay=0.5),
        curriculum=AdvantageBandit(TASKS, temperature=0.5),
        rollout_log=folder / "rollouts",
        callbacks=callbacks,
    )


if __name__ == "__main__":
    main()
