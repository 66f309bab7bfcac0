"""The training loops: language models on TRL, and the main job that `polyreward train` runs."""
