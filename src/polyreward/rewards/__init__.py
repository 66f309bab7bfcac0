"""Rewards: what a sample is worth by rule, verifier or format, and how rewards compose into rewards."""
