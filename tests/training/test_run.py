from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from polyreward.data.rollouts import read_rollouts
from polyreward.errors import InvalidInputError, MissingColumnError, MissingFileError, PolyrewardError
from polyreward.rewards import RewardExecutor, RewardFailureWarning
from polyreward.tasks.tools import TOOLS, ToolBox
from polyreward.training import run
from polyreward.training.journal import read_lines
from polyreward.training.parts import make_reward
from polyreward.training.policy import make_model, make_tokenizer
from polyreward.training.prompts import load_prompts, read_prompts
from polyreward.training.recipe import ColumnsSection, RewardSection, load_recipe
from polyreward.training.run import Stopped, newest_checkpoint, train_seed
from polyreward.training.seeds import run_recipe, summarise
from polyreward.training.trajectories import sample_trajectories

FIGURES = ("metrics.jsonl", "held_out.jsonl", "result.json")


def figures(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in FIGURES}


class Kill(Exception):
    """Stands for the process dying at that moment."""


def kill_at(step: int):
    def report(phase: str, done: int, total: int, note: str) -> None:
        if phase == "training" and done == step:
            raise Kill

    return report


def test_a_run_writes_its_folder_and_the_log_holds_what_was_trained_on(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    result = train_seed(load_recipe(tiny), 0, folder)
    assert json.loads((folder / "result.json").read_text()) == result
    assert load_recipe(folder / "recipe.toml").training.steps == 6
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in read_lines(folder / "held_out.jsonl")] == [0, 3, 6]
    shares = read_lines(folder / "metrics.jsonl")[-1]["curriculum"]
    assert set(shares) == {"chain_sum", "spell_backward"}
    timing = read_lines(folder / "timing.jsonl")
    assert [line["step"] for line in timing] == [1, 2, 3, 4, 5, 6]
    assert {"reward_seconds/task_score", "reward_seconds/brevity", "executor/brevity/sample_seconds_max"} <= set(
        timing[0]
    )
    assert sum(shares.values()) == pytest.approx(1)
    batch = read_rollouts(folder)
    assert batch.names == ("task_score", "answer_format", "brevity")
    assert len(batch) == 6 * 2 * 4
    assert set(batch.segments("group").sizes.tolist()) == {4}
    assert {"task", "stratum", "step", "advantage", "tool_calls"} <= set(batch.columns)
    advantage = batch.column("advantage")
    expected = (batch.rewards - batch.segments().spread(batch.segments().mean(batch.rewards))) @ torch.tensor(
        [1.0, 0.5, 1.0], dtype=torch.float64
    )
    torch.testing.assert_close(advantage.double(), expected.double(), atol=1e-5, rtol=1e-5)
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / "final")
    again = train_seed(load_recipe(tiny), 0, folder)  # complete: nothing is run again
    assert again == result


@pytest.mark.slow
def test_a_reward_that_loops_for_ever_costs_its_limit_and_its_samples(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(
        "def odd(prompts, completions, **columns):\n"
        "    while len(completions[0]) % 2:\n"
        "        pass\n"
        "    return [1.0]\n"
    )
    overrides = [f"rewards.brevity.use={tmp_path / 'stuck.py'}:odd", "executor.time_limit=0.2", "training.steps=2"]
    with pytest.warns(RewardFailureWarning, match="reward 'brevity' failed on .* over the time limit of 0.2 s"):
        train_seed(load_recipe(tiny, overrides), 0, tmp_path / "out")
    values = read_rollouts(tmp_path / "out").reward("brevity")
    assert torch.isnan(values).any()
    assert set(values[~torch.isnan(values)].tolist()) <= {1.0}


OWN = {
    "needs": "def needs(prompts, completions, gold, **columns):\n    return [0.0] * len(completions)\n",
    "raises": "def raises(prompts, completions, **columns):\n    raise KeyError('x')\n",
    "nothing": "def nothing(prompts, completions, **columns):\n    return [None] * len(completions)\n",
}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rewards.brevity.use=FOLDER/needs.py:needs"], "reward 'brevity' reads the column 'gold'"),
        (
            ["rewards.brevity.use=FOLDER/raises.py:raises", "executor.workers=0", "evaluation.score=brevity"],
            "reward 'brevity' failed: KeyError: 'x'",
        ),
        (
            ["rewards.brevity.use=FOLDER/nothing.py:nothing", "executor.workers=0", "evaluation.score=brevity"],
            "the reward 'brevity' scored none of the 6 held-out prompts",
        ),
        (["advantage.chain=[{part='WeightedSum'},{part='Center',by='tsk'}]"], "no column 'tsk' to group by.*'task'"),
        (["training.prompts_per_step=200"], "24 prompts to train on, fewer than training.prompts_per_step=200"),
        (["training.device=cuda"], "torch finds no CUDA device"),
        (["training.report_to=['foo']"], "training.report_to: .*foo"),
    ],
)
def test_what_cannot_work_stops_before_training(tiny: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    if "cuda" in message.lower() and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    for name, code in OWN.items():
        (tmp_path / f"{name}.py").write_text(code)
    recipe = load_recipe(tiny, [override.replace("FOLDER", str(tmp_path)) for override in overrides])
    with pytest.raises(PolyrewardError, match=message):
        run_recipe(recipe, tmp_path / "out")
    run_recipe(load_recipe(tiny, ["training.steps=1"]), tmp_path / "out")  # nothing is in the way of the mended recipe


def test_a_set_reward_of_ones_own_sees_the_whole_batch(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "whole.py").write_text(
        "async def share(prompts, completions, **columns):\n    return [1 / len(completions)] * len(completions)\n"
    )
    section = RewardSection(name="share", use=f"{tmp_path / 'whole.py'}:share", per_sample=False)
    with RewardExecutor(workers=1) as executor:
        assert make_reward(section, executor)(["p"] * 4, ["c"] * 4) == [0.25] * 4
        alone = make_reward(section.model_copy(update={"per_sample": True}), executor)
        assert alone(["p"] * 4, ["c"] * 4) == [1.0] * 4
    assert make_reward(section)(["p"] * 4, ["c"] * 4) == [0.25] * 4


def test_a_killed_run_goes_on_and_ends_with_the_same_figures(tiny: Path, tmp_path: Path) -> None:
    recipe = load_recipe(tiny)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_seed(recipe, 3, whole)
    with pytest.raises(Kill):
        train_seed(recipe, 3, killed, kill_at(6))
    assert newest_checkpoint(killed).name == "checkpoint-4"
    # The process also died in the middle of a later checkpoint and of a line of metrics.
    shutil.copytree(killed / "checkpoints" / "checkpoint-4", killed / "checkpoints" / "checkpoint-5")
    (killed / "checkpoints" / "checkpoint-5" / "polyreward.json").unlink()
    with (killed / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "loss"')
    train_seed(recipe, 3, killed)
    assert figures(killed) == figures(whole)
    ours, theirs = read_rollouts(killed), read_rollouts(whole)
    assert ours.column("step").tolist() == theirs.column("step").tolist()
    torch.testing.assert_close(ours.rewards, theirs.rewards, atol=0, rtol=0)
    torch.testing.assert_close(ours.column("advantage"), theirs.column("advantage"), atol=0, rtol=0)


def test_interrupt_saves_a_checkpoint_and_the_run_goes_on(tiny: Path, tmp_path: Path) -> None:
    import os
    import signal

    recipe = load_recipe(tiny)
    folder = tmp_path / "stopped"

    def interrupt(phase: str, done: int, total: int, note: str) -> None:
        if phase == "training" and done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped):
        train_seed(recipe, 0, folder, interrupt)
    assert newest_checkpoint(folder) is not None
    assert not (folder / "result.json").exists()
    assert train_seed(recipe, 0, folder)["steps"] == 6


def test_another_seed_gives_another_run(tiny: Path, tmp_path: Path) -> None:
    recipe = load_recipe(tiny, ["training.steps=1"])
    first, second = (train_seed(recipe, seed, tmp_path / str(seed)) for seed in (0, 1))
    assert first["held_out_before"]["samples"] != second["held_out_before"]["samples"]


def test_a_model_folder_and_a_prompts_file_of_ones_own(tiny: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(["ask"])
    make_model(tokenizer, width=16, layers=1, heads=2, seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"question": f"{i}+1=", "gold": str(i + 1)}) + "\n" for i in range(8)))
    overrides = [
        f'policy.model="{tmp_path / "model"}"',
        f'data.path="{prompts}"',
        "data.columns.prompt=question",
        "data.columns.answer=gold",
        "data.held_out=0.25",
        "curriculum.name=uniform",
        "training.steps=2",
    ]
    result = train_seed(load_recipe(tiny, overrides), 0, tmp_path / "own")
    assert set(result["held_out_after"]["tasks"]) == {"all"}
    assert len(read_rollouts(tmp_path / "own")) == 2 * 2 * 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.jsonl", "\n\n", "a.jsonl has no rows"),
        (
            "a.jsonl",
            '{"prompt": "x"}\n{"prompt": "y", "extra": 1}\n',
            "line 2: its keys differ from the first line's in extra",
        ),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt"\n', "line 2: not valid JSON"),
        ("a.jsonl", "[1]\n", "line 1: expected a JSON object, found list"),
        ("a.jsonl", '{"prompt": ""}\n', "row 1: the column 'prompt' is empty"),
        ("a.jsonl", '{"promt": "x"}\n', "no column 'prompt' for the prompt; did you mean 'promt'"),
        ("a.csv", "prompt,answer\nx,1\ny\n", "line 3: 1 fields, the header has 2"),
        ("a.csv", "prompt,answer\n", "a.csv has no rows"),
        ("a.parquet", "nonsense", "not a readable Parquet file"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(PolyrewardError, match=message):
        read_prompts(path, ColumnsSection())


def test_excel_files_and_held_out_rows_of_every_task(tiny: Path, tmp_path: Path) -> None:
    rows = [f"q{i},{task}" for task in "abc" for i in range(10)]
    (tmp_path / "p.csv").write_bytes(b"\xef\xbb\xbf" + "\n".join(["q,task", *rows]).encode())
    recipe = load_recipe(tiny, [f"data.path={tmp_path / 'p.csv'}", "data.columns.prompt=q", "policy.model=m"])
    prompts = load_prompts(recipe, 0)
    assert {row["task"] for row in prompts.held_out} == set("abc")
    assert len(prompts.held_out) == 3
    (tmp_path / "twice.csv").write_text("q,q\n1,2\n")
    with pytest.raises(InvalidInputError, match="has the column 'q' 2 times"):
        read_prompts(tmp_path / "twice.csv", ColumnsSection(prompt="q"))
    (tmp_path / "latin.csv").write_bytes(b"prompt\ncaf\xe9\n")
    with pytest.raises(InvalidInputError, match=r"latin\.csv.*not UTF-8"):
        read_prompts(tmp_path / "latin.csv", ColumnsSection())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 5}, "row 1: the column 'prompt' is 5, expected a text or a list of chat messages"),
        ({"prompt": [{"rolle": "user", "content": "x"}]}, "expected messages with 'role' and 'content'"),
        ({"prompt": "x", "completions": "y"}, "has a column 'completions', which is what rewards get"),
    ],
)
def test_prompts_that_are_none(tmp_path: Path, row: dict, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InvalidInputError, match=message):
        read_prompts(tmp_path / "p.jsonl", ColumnsSection())


def test_prompt_files_are_mapped_alike_in_every_format(tmp_path: Path) -> None:
    import datasets
    import polars as pl

    frame = pl.DataFrame({"q": ["1+1", "2+2"], "a": ["2", "4"], "kind": ["x", "y"]})
    frame.write_csv(tmp_path / "p.csv")
    frame.write_parquet(tmp_path / "p.parquet")
    frame.write_ndjson(tmp_path / "p.jsonl")
    columns = ColumnsSection(prompt="q", answer="a", task="kind")
    found = [read_prompts(tmp_path / f"p.{kind}", columns) for kind in ("csv", "parquet", "jsonl")]
    assert found[0] == found[1] == found[2]
    assert found[0][1] == {
        "points": 1.0,
        "q": "2+2",
        "a": "4",
        "kind": "y",
        "prompt": "2+2",
        "task": "y",
        "answer": "4",
    }
    data = datasets.Dataset.from_pandas(frame.to_pandas())
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "several")
    for folder in ("one", "several"):
        assert read_prompts(tmp_path / folder, columns) == found[0]
    with pytest.raises(MissingFileError, match=r"split 'test'"):
        read_prompts(tmp_path / "several", columns, split="test")
    with pytest.raises(MissingFileError, match="no such file"):
        read_prompts(tmp_path / "gone.csv", columns)
    with pytest.raises(MissingColumnError, match="for the answer"):
        read_prompts(tmp_path / "p.csv", ColumnsSection(prompt="q", answer="b"))


def test_held_out_prompts_are_never_trained_on_and_the_same_for_every_seed(tiny: Path) -> None:
    recipe = load_recipe(tiny, ["tasks.prompts=100", "tasks.held_out=20"])  # of 200 sums there are
    first, second = load_prompts(recipe, 0), load_prompts(recipe, 1)
    assert first.held_out == second.held_out
    assert first.train != second.train
    assert not {row["prompt"] for row in first.held_out} & {row["prompt"] for row in first.train}


def test_a_folder_of_another_run_is_not_overwritten(tiny: Path, tmp_path: Path) -> None:
    run_recipe(load_recipe(tiny, ["training.steps=1"]), tmp_path / "r")
    before = (tmp_path / "r" / "result.json").read_bytes()
    other = load_recipe(tiny, ["training.steps=2"])
    with pytest.raises(InvalidInputError, match=r"differs in training\.steps"):
        run_recipe(other, tmp_path / "r")
    assert (tmp_path / "r" / "result.json").read_bytes() == before
    assert run_recipe(other, tmp_path / "r", fresh=True)["seeds"] == [0]
    with pytest.raises(InvalidInputError, match="holds no run"):
        run_recipe(other, tiny.parent)


def test_two_commands_cannot_write_one_run(tiny: Path, tmp_path: Path) -> None:
    from polyreward.training.seeds import _only_one

    with _only_one(tmp_path / "r"), pytest.raises(InvalidInputError, match="another process is running"):
        run_recipe(load_recipe(tiny), tmp_path / "r")
    assert not (tmp_path / "r").exists()
    assert [path.name for path in tmp_path.iterdir() if "lock" in path.name] == []


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    message = r"No space left on device.*goes on from the last complete checkpoint"
    with pytest.raises(PolyrewardError, match=message), run._clear_disk_errors(tmp_path):
        raise OSError(28, "No space left on device")


def test_summary_holds_means_and_student_intervals() -> None:
    def result(seed: int, before: float, after: float) -> dict:
        return {
            "name": "x",
            "seed": seed,
            "held_out_before": {"score": before, "tasks": {"t": before}},
            "held_out_after": {"score": after, "tasks": {"t": after}},
        }

    found = summarise([result(0, 0.1, 0.4), result(1, 0.2, 0.6), result(2, 0.3, 0.8)])
    assert found["change"]["mean"] == pytest.approx(0.4)
    # Student's t with two degrees of freedom: 4.3027 * 0.1 / sqrt(3)
    assert found["change"]["high"] - 0.4 == pytest.approx(0.24842, abs=1e-4)
    assert found["seeds"] == [0, 1, 2]
    assert summarise([result(0, 0.1, 0.4)])["after"] == {"mean": 0.4, "low": 0.4, "high": 0.4, "per_seed": [0.4]}


class Script:
    """A causal language model that writes one given text, so that a trajectory is known in advance."""

    def __init__(self, tokenizer, texts: list[str], starts: list[int]) -> None:
        self.plan = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
        self.size, self.weight, self.starts = len(tokenizer), torch.nn.Parameter(torch.zeros(1)), starts
        self.seen: list[list[int]] = [[] for _ in texts]
        self.first = True

    def parameters(self):
        return iter([self.weight])

    def __call__(self, input_ids, attention_mask, position_ids, past_key_values, use_cache):
        from types import SimpleNamespace

        logits = torch.full((len(self.plan), 1, self.size), -50.0)
        for row, plan in enumerate(self.plan):
            kept = attention_mask[row, -input_ids.shape[1] :].bool()
            self.seen[row] += input_ids[row][kept].tolist()
            assert position_ids[row, -1] == attention_mask[row].sum() - 1
            at = len(self.seen[row]) - self.starts[row]
            logits[row, 0, plan[min(at, len(plan) - 1)]] = 50.0
        return SimpleNamespace(logits=logits, past_key_values=None)


def test_tools_answer_inside_the_text_and_their_tokens_are_masked() -> None:
    tokenizer = make_tokenizer(["ask"])
    prompts = [tokenizer.encode("ask 2+3:"), tokenizer.encode("ask:")]
    texts = ["<calc>2+3</calc><result>5</result><answer>5</answer>", "<answer>no</answer>"]
    model = Script(tokenizer, texts, [len(p) for p in prompts])
    found = sample_trajectories(model, tokenizer, prompts, ToolBox(TOOLS), max_tokens=40, temperature=0)
    assert tokenizer.batch_decode(found.completion_ids, skip_special_tokens=True) == texts
    assert found.calls == [1, 0]
    given = [t for t, own in zip(found.completion_ids[0], found.masks[0], strict=True) if not own]
    assert tokenizer.decode(given) == "<result>5</result>"
    assert found.masks[1] == [1] * len(found.completion_ids[1])
    assert [ids[-1] for ids in found.completion_ids] == [tokenizer.eos_token_id] * 2
    short = sample_trajectories(
        Script(tokenizer, texts, [len(p) for p in prompts]),
        tokenizer,
        prompts,
        ToolBox(TOOLS),
        max_tokens=4,
        temperature=0,
    )
    assert [len(ids) for ids in short.completion_ids] == [4, 4]


def test_cached_sampling_of_a_padded_batch_agrees_with_one_prompt_at_a_time() -> None:
    tokenizer = make_tokenizer(["ask"])
    model = make_model(tokenizer, width=32, layers=2, heads=2, seed=1).eval()
    prompts = [tokenizer.encode(text) for text in ("ask 2+3:", "ask a longer question, of many letters:", "x")]
    together = sample_trajectories(model, tokenizer, prompts, ToolBox({}), max_tokens=10, temperature=0)
    for prompt, ids in zip(prompts, together.completion_ids, strict=True):
        expected = list(prompt)
        while len(expected) < len(prompt) + len(ids):
            with torch.no_grad():
                expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
        assert ids == expected[len(prompt) :]


def test_tokenizer_gives_every_text_back_exactly() -> None:
    tokenizer = make_tokenizer(["chain_sum"])
    for text in (
        "chain_sum 12+7-3:",
        "<calc>2*3</calc><result>error</result>",
        "2 Praying Mantis,1 Cat cat\n",
        "<answer>-7</answer>",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("<search>Praying Mantis</search>")) == 3


def test_sampling_is_repeatable_from_its_generator() -> None:
    tokenizer = make_tokenizer(["ask"])
    model = make_model(tokenizer, width=16, layers=1, heads=2, seed=1).eval()
    prompts = [tokenizer.encode("ask 1:")] * 4

    def draw(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return sample_trajectories(
            model, tokenizer, prompts, ToolBox(TOOLS), max_tokens=8, generator=generator
        ).completion_ids

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert np.unique([str(ids) for ids in draw(5)]).size > 1
