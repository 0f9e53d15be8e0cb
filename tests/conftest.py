"""One thread, no network, and a cache folder of the test run's own."""

from __future__ import annotations

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["SPECDEC_CACHE"] = tempfile.mkdtemp(prefix="specdec-tests-")

import torch

torch.set_num_threads(1)
