"""One thread, no network, a cache folder of the test run's own, and Ctrl-C as in a terminal."""

from __future__ import annotations

import os
import signal
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["SPECDEC_CACHE"] = tempfile.mkdtemp(prefix="specdec-tests-")

import torch

torch.set_num_threads(1)

# A shell lets what it starts in the background ignore Ctrl-C, and so would the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
