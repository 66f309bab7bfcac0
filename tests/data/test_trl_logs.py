"""What TRL itself writes with ``log_completions=True``, from real runs of a tiny policy."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from polyreward.data.rollouts import read_rollouts

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("conversational", [False, True], ids=["text", "messages"])
def test_trl_logs_of_a_real_run(tmp_path, conversational):
    import text_runs
    from trl import GRPOTrainer

    def words(prompts, completions, **columns):
        counts = [len(text_runs._text(completion).split()) for completion in completions]
        columns["log_extra"]("ratio", [0.25 * count for count in counts])
        columns["log_extra"]("note", ["n"] * len(counts))
        return [0.1 * count for count in counts]

    args = {"log_completions": True, "num_completions_to_print": 1, "num_iterations": 2, "max_steps": 4}
    run = text_runs.trainer(
        tmp_path,
        GRPOTrainer,
        args=args,
        reward_funcs=[text_runs.letters, words],
        train_dataset=text_runs.prompts(conversational),
    )
    run.train()
    assert len(list((tmp_path / "run" / "completions").iterdir())) == 4
    batch = read_rollouts(tmp_path / "run")
    assert batch.names == ("letters", "words"), "the extra column of numbers is no reward"
    # two optimiser steps use one generation, which TRL logs twice
    assert batch.column("step").tolist() == [1] * 8 + [3] * 8
    sizes = batch.segments("group").sizes
    assert sizes[sizes > 0].tolist() == [4, 4, 4, 4]
    measured = read_rollouts(tmp_path / "run", columns=("completion_hash", "length"), measure_texts=True)
    assert set(measured.columns) == {"completion_hash", "length"}
    np.testing.assert_array_equal(measured.rewards.numpy(), batch.rewards.numpy())
