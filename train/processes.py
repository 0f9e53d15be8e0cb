"""Several processes: each one's Accelerator, and starting them all from one command.

`accelerate launch --cpu` starts a single process whatever it is told, so torch.distributed.run is called. It is kept in
a session of its own: Ctrl-C in a terminal would otherwise reach the workers twice, from the terminal and from their
agent, and the second one ends a worker without saving. Workers speak to the command by JSON lines on stdout.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from specdec.errors import BadRecipe, SpecdecError

PROCESS, ERROR = "process", "error"
"""Events that workers send beside what they report: {"event": "process", "pid"}, {"event": "error", "message"}."""

_UNREACHABLE = re.compile(r"gloo|nccl|\bpeer\b|process group", re.IGNORECASE)

Hear = Callable[[dict[str, Any]], None]


def accelerator_for(
    *, bf16: bool = False, cpu: bool = False, trackers: Sequence[str] = (), folder: Path | None = None
) -> Accelerator:
    """This process's Accelerator.

    accelerate keeps one state for the life of a process and refuses another precision; a second training in the
    same process may well want one, so the state of an earlier Accelerator is forgotten then. On a machine without a
    GPU accelerate 1.15 lets every process of torchrun be the only one, unless it is told to use the CPU.
    """
    cpu = cpu or (int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available())
    precision = "bf16" if bf16 else "no"
    state = AcceleratorState._shared_state
    if state and state.get("_mixed_precision") != precision:
        AcceleratorState._reset_state()
    return Accelerator(mixed_precision=precision, cpu=cpu, log_with=list(trackers) or None, project_dir=folder)


def launch(command: Sequence[str], processes: int, hear: Hear, *, threads: int | None = None) -> None:
    """Run `python -m COMMAND` in several processes and hear what they report, until all have ended.

    SIGINT and SIGTERM are passed on once, which lets the workers finish their step and save; the second one ends them.

    Args:
        command: module and arguments.
        processes: how many, 2 or more.
        hear: called with every JSON object that the workers print, but for PROCESS and ERROR.
        threads: of each process on a CPU; None shares the cores.

    Raises:
        SpecdecError: a worker failed; the message is that of the first one that said why.
        KeyboardInterrupt: ended by a second signal.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads or max(1, (os.cpu_count() or 1) // processes))}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with tempfile.TemporaryFile("w+") as noise:
        agent = subprocess.Popen(
            [*launcher, "-m", *command],
            stdout=subprocess.PIPE, stderr=noise, text=True, env=environment, start_new_session=True,
        )  # fmt: skip
        workers = _Workers(agent)
        with workers.signals():
            errors = _listen(agent, workers, hear)
            status = agent.wait()
        if workers.signals_heard > 1:
            raise KeyboardInterrupt
        if status and not (workers.signals_heard and not errors):
            raise SpecdecError(_why(errors, noise))


def tell(event: dict[str, Any]) -> None:
    """Report to the command that launched this process."""
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


class _Workers:
    """Processes that were started, and the signals that reached us meanwhile."""

    def __init__(self, agent: subprocess.Popen[str]) -> None:
        self.agent = agent
        self.pids: list[int] = []
        self.signals_heard = 0

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Pass SIGINT and SIGTERM on while the block runs; whatever ends it, no worker outlives it."""
        try:
            before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread
            before = {}
        try:
            yield
        finally:
            if self.agent.poll() is None:
                self._end()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self.signals_heard += 1
        if self.signals_heard > 1 or not self.pids:
            self._end()
        else:
            self._send(signal.SIGTERM)

    def _send(self, number: signal.Signals) -> None:
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _end(self) -> None:
        self._send(signal.SIGKILL)
        with suppress(ProcessLookupError):
            self.agent.terminate()  # it ends workers that have not told their ids yet


def _listen(agent: subprocess.Popen[str], workers: _Workers, hear: Hear) -> list[str]:
    """Hand reports on; returns the errors, those that a user can cause first."""
    known: list[str] = []
    unexpected: list[str] = []
    assert agent.stdout is not None
    for line in agent.stdout:
        event = _parsed(line)
        if event is None:
            continue
        if event["event"] == PROCESS:
            workers.pids.append(int(event["pid"]))
        elif event["event"] == ERROR:
            (unexpected if event.get("unexpected") else known).append(str(event["message"]))
        else:
            hear(event)
    return known + unexpected


def _why(errors: list[str], noise: IO[str]) -> str:
    """The error that came first. Of a process that has died, the others only see that they cannot reach it."""
    causes = [error for error in errors if not _UNREACHABLE.search(error)]
    return causes[0] if causes else _died(noise)


def _parsed(line: str) -> dict[str, Any] | None:
    with suppress(ValueError):
        event = json.loads(line)
        if isinstance(event, dict) and "event" in event:
            return event
    return None


def _died(noise: IO[str]) -> str:
    """One line for a worker that ended without a word; the agent's report says how."""
    noise.seek(0)
    text = noise.read()
    codes = [int(code) for code in re.findall(r"exitcode\s*:\s*(-?\d+)", text)]
    found = next((code for code in codes if code < 0 and code != -signal.SIGTERM), codes[0] if codes else None)
    how = "before it had begun" if found is None else f"with exit code {found}"
    if found is not None and found < 0:
        how = f"by signal {-found} (9 often means that memory ran out)"
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip(" =-")), "")
    shown = f": {last[:200]}" if found is None else ""
    return f"a training process ended {how}{shown}; checkpoints are whole, the same command goes on from the last one"


def check_processes(processes: int, device: str, gpus: int) -> None:
    """Refuse more processes than GPUs.

    Raises:
        BadRecipe: says how many there are.
    """
    if device.startswith("cuda") and processes > gpus:
        raise BadRecipe(f"{processes} processes need as many GPUs, there are {gpus}; choose fewer, or --device cpu")
