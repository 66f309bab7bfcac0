"""A run of a likelihood reward in processes of its own: ``FOLDER``, under torch.distributed.run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from test_likelihood_training import CUT, history, likelihood_objective, one_token, rloo, rows, trainer

from polyreward.rewards.reference_likelihood import ReferenceLikelihood

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    run = trainer(
        folder,
        reward_funcs=[ReferenceLikelihood("log-prob", **CUT)],
        args={"per_device_train_batch_size": 8 // int(os.environ["WORLD_SIZE"])},
        advantage=rloo(),
        objective=likelihood_objective(),
        train_dataset=rows(),
        rollout_func=one_token,
    )
    run.train()
    if run.accelerator.is_main_process:
        (folder / "history.json").write_text(json.dumps(history(run)))
