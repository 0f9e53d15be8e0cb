"""One process of a training run: in the command itself, or `python -m specdec.cli.train_process JOB` of several."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from specdec.cli.console import explain, quiet_libraries
from specdec.cli.model import dtype_of, load_model, load_tokenizer
from specdec.train.job import Hear, Job, run_job
from specdec.train.processes import ERROR, PROCESS, accelerator_for, check_processes, tell
from specdec.train.staged_job import is_staged, run_stages


def run_here(job: Job, hear: Hear) -> None:
    """Load the target and train.

    Raises:
        SpecdecError, OSError: one clear line.
    """
    if job.threads:
        torch.set_num_threads(job.threads)
    accelerator = accelerator_for(
        bf16=job.recipe.loop.bf16, cpu=runs_on_cpu(job.device), trackers=job.report_to, folder=job.out
    )
    device = str(accelerator.device) if accelerator.num_processes > 1 or job.device == "auto" else job.device
    model = load_model(job.target, dtype_of(job.target, job.dtype), device)
    run = run_stages if is_staged(job.recipe) else run_job
    run(job, model, load_tokenizer(job.target), accelerator, hear)


def runs_on_cpu(device: str) -> bool:
    """Whether a run on this device uses no GPU."""
    return device.startswith("cpu") or not torch.cuda.is_available()


def main() -> None:
    """Run the job in the file that the only argument names; reports and errors are JSON lines on stdout."""
    tell({"event": PROCESS, "pid": os.getpid()})
    try:
        with quiet_libraries():
            job = Job.of_json(Path(sys.argv[1]).read_text())
            check_processes(int(os.environ["WORLD_SIZE"]), job.device, torch.cuda.device_count())
            run_here(job, tell)
    except BrokenPipeError:  # the command that launched us is gone
        os._exit(1)
    except Exception as error:
        if os.environ.get("SPECDEC_DEBUG", "0") not in ("", "0"):
            raise
        tell({"event": ERROR, "message": explain(error), "unexpected": not isinstance(error, ValueError | OSError)})
        sys.stdout.flush()
        os._exit(1)  # without waiting for processes that wait for us


if __name__ == "__main__":
    main()
