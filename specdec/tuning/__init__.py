"""Chooses how much to propose: acceptance on the user's questions against costs, measured here or described."""
