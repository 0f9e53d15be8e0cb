"""Runs of the tests warm up three times, however unsteady this machine is."""

from __future__ import annotations

import pytest

from specdec.bench import warmup


@pytest.fixture(autouse=True)
def short_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "MOST_RUNS", 3)
