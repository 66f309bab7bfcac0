"""Reward-model heads on a million pairs of cached features, and fine-tuning beside TRL's RewardTrainer.

Targets: one epoch over 1,000,000 pairs of 384 features in less than 10 s on 2 cores with less than 4 GB of memory; at
least TRL's throughput on the same small model, after both have the same loss on the same batch.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

WIDTH, SECONDS, GIGABYTES = 384, 10.0, 4.0


def feature_file(folder: Path, rows: int, dtype: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    path = folder / f"features-{dtype}.npy"
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(rows, WIDTH))
    for start in range(0, rows, 100_000):
        count = min(100_000, rows - start)
        array[start : start + count] = rng.standard_normal((count, WIDTH), dtype=np.float32)
    array.flush()
    del array
    return np.load(path, mmap_mode="r")


def one_head(name: str, path: str, pairs: int) -> None:
    """In a process of its own: an epoch; prints seconds, accuracy, and gigabytes in all and without mapped files."""
    from functools import partial

    from polyreward.preferences import PreferenceData
    from polyreward.reward_models.encoders import Features
    from polyreward.reward_models.heads import LinearHead, TwoLayerHead
    from polyreward.reward_models.model import PreferenceModel

    torch.set_num_threads(1)
    features = np.load(path, mmap_mode="r")
    choice = np.load(Path(path).parent / "choice.npy")
    data = PreferenceData(np.arange(pairs), np.arange(2 * pairs), choice=choice, source="benchmark")
    head = {"linear": LinearHead, "two layers, 64": partial(TwoLayerHead, hidden=64)}[name]
    model = PreferenceModel(Features(features), head)
    # torch's optimisers load their compiler at the first step, which is no part of an epoch
    model.fit(data.select(np.arange(1000)), epochs=1, validation=None)
    begin = time.perf_counter()
    model.fit(data, epochs=1, batch_size=4096, learning_rate=1e-2, validation=None, shuffle_block=16)
    seconds = time.perf_counter() - begin
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    # not getrusage: its peak is that of the process which started this one, where that was larger
    peak, own = (int(status[name].split()[0]) / 2**20 for name in ("VmHWM", "RssAnon"))
    print(seconds, model.history[0]["accuracy"], peak, own)


def heads(pairs: int) -> bool:
    print(
        f"`PreferenceModel.fit` on {pairs:,} pairs of {WIDTH} features mapped from disk, batches of 4096, one thread."
    )
    print("Memory with the mapped pages, which the system takes back when it needs them, and without.\n")
    print("| head | features | seconds an epoch | target | GB | without mapped files | target | accuracy |")
    print("|---|---|---|---|---|---|---|---|")
    good = True
    for dtype in ("float16", "float32"):
        with tempfile.TemporaryDirectory() as folder:
            features = feature_file(Path(folder), 2 * pairs, dtype)
            direction = np.random.default_rng(1).normal(size=WIDTH).astype(np.float32) / 8
            worth = np.concatenate([features[i : i + 100_000] @ direction for i in range(0, 2 * pairs, 100_000)])
            np.save(Path(folder) / "choice.npy", worth.reshape(-1, 2).argmax(1))
            for name in ("linear", "two layers, 64"):
                command = [sys.executable, __file__, "--head", name, "--pairs", str(pairs)]
                run = subprocess.run(
                    [*command, "--features", f"{folder}/features-{dtype}.npy"],
                    capture_output=True, text=True, check=True,
                )  # fmt: skip
                seconds, accuracy, peak, own = map(float, run.stdout.split())
                good &= seconds < SECONDS and peak < GIGABYTES
                print(
                    f"| {name} | {dtype} | {seconds:.1f} | {SECONDS:.0f} | {peak:.1f} | {own:.1f} | {GIGABYTES:.0f} "
                    f"| {accuracy:.3f} |"
                )
    print()
    return good


def trl(pairs: int) -> bool:
    """Tokens a second of one epoch, the same model, texts, batch size and optimiser."""
    import datasets
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
    from trl import RewardConfig, RewardTrainer

    from polyreward.data.preferences import read_preferences
    from polyreward.reward_models.fine_tuning import FineTunedEncoder
    from polyreward.reward_models.heads import LinearHead
    from polyreward.reward_models.model import PreferenceModel

    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    words = [f"w{i}" for i in range(500)]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")

    def network() -> LlamaForSequenceClassification:
        torch.manual_seed(0)
        return LlamaForSequenceClassification(
            LlamaConfig(
                vocab_size=512, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256,
                num_labels=1, pad_token_id=0,
            )
        )  # fmt: skip

    rng = np.random.default_rng(0)

    def text() -> str:
        return " ".join(rng.choice(words, size=int(np.exp(rng.uniform(np.log(8), np.log(200))))))

    rows = [{"prompt": f"{text()} ", "chosen": text(), "rejected": text()} for _ in range(pairs)]
    seconds: dict[str, float] = {}
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for batch in (len(rows), 16):
            config = RewardConfig(
                output_dir=folder, report_to=[], use_cpu=True, bf16=False, max_length=None, num_train_epochs=1,
                per_device_train_batch_size=batch, disable_dropout=True, save_strategy="no", logging_steps=1000,
                learning_rate=1e-4, lr_scheduler_type="constant", weight_decay=0.01, gradient_checkpointing=False,
                disable_tqdm=True,
            )  # fmt: skip
            rows_here = rows[:32] if batch == len(rows) else rows
            trainer = RewardTrainer(
                network(), config, train_dataset=Dataset.from_list(rows_here), processing_class=tokenizer
            )
            trainer.log = lambda *_, **__: None  # type: ignore[method-assign]
            begin = time.perf_counter()
            found = trainer.train()
            seconds["TRL"], losses[f"TRL {batch}"] = time.perf_counter() - begin, found.training_loss
            peer = network()
            head = LinearHead(64)
            head.linear.weight = peer.score.weight
            data = read_preferences([{**r, **{s: f"{r[s]}<eos>" for s in ("chosen", "rejected")}} for r in rows_here])
            model = PreferenceModel(FineTunedEncoder(peer.model, tokenizer, name="tiny"), head)
            begin = time.perf_counter()
            model.fit(data, epochs=1, batch_size=batch, learning_rate=1e-4, encoder_learning_rate=1e-4, validation=None)
            seconds["ours"], losses[f"ours {batch}"] = time.perf_counter() - begin, model.history[0]["loss"]
    first = [losses[f"{who} {len(rows)}"] for who in ("TRL", "ours")]
    if abs(first[0] - first[1]) > 1e-4:
        print(f"TRL's first loss is {first[0]}, ours {first[1]}", file=sys.stderr)
        return False
    ratio = seconds["TRL"] / seconds["ours"]
    print(
        f"Fine-tuning a Llama of 4 layers and width 64 on {pairs} pairs of texts of 8 to 200 words, batches of 16, one "
        f"epoch, one thread; both begin at loss {first[0]:.4f}.\n"
    )
    print("| | seconds | pairs a second |\n|---|---|---|")
    for who in ("TRL", "ours"):
        print(f"| {who} | {seconds[who]:.1f} | {pairs / seconds[who]:.0f} |")
    print(f"\nThroughput ours / TRL: {ratio:.2f} (target at least 1).\n")
    return ratio >= 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--trl-pairs", type=int, default=192)
    parser.add_argument("--only", choices=("heads", "trl"))
    parser.add_argument("--head", help=argparse.SUPPRESS)
    parser.add_argument("--features", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.head:
        one_head(options.head, options.features, options.pairs)
        return 0
    print("## reward models\n")
    good = True
    if options.only != "trl":
        good &= heads(options.pairs)
    if options.only != "heads":
        good &= trl(options.trl_pairs)
    if not good:
        print("A target was missed on this machine.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
