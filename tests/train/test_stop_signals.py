"""Signals that end a run, at awkward moments."""

from __future__ import annotations

import os
import signal

import pytest

from specdec.train import stop_signals
from specdec.train.stop_signals import on_stop


@pytest.fixture
def a_signal_ends_nothing():
    """Whatever goes wrong, the suite itself goes on."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("a_signal_ends_nothing")
def test_the_first_signal_asks_and_the_handlers_come_back():
    heard: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    with on_stop(lambda: heard.append(1)):
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is before
        os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [1]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("a_signal_ends_nothing")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_handlers_are_put_up_is_heard(monkeypatch: pytest.MonkeyPatch, number: signal.Signals):
    heard: list[int] = []
    put_up = signal.signal

    def interrupted(which: signal.Signals, handler: signal._HANDLER) -> signal._HANDLER:
        before = put_up(which, handler)
        if which == number and not heard:
            os.kill(os.getpid(), number)
        return before

    monkeypatch.setattr(stop_signals.signal, "signal", interrupted)
    with on_stop(lambda: heard.append(1)):
        assert heard == [1]
