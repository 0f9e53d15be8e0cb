"""Spec-Bench style evaluation: several drafters and the baselines on the same prompts, in one process."""
