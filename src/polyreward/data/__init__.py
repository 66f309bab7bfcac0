"""Data in and out: rollout logs of polyreward, TRL, verl and plain tables."""
