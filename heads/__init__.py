"""Draft heads: modules that read the target's hidden states, one file per architecture."""
