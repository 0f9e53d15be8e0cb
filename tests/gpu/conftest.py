"""Every test of this folder runs on a CUDA device (marked gpu) and, marked slow, on the CPU.

The second is there so that the body of a test is known to work where there is no GPU: `make test-all` on such a machine
runs it, and neither looks for a GPU nor reports one as missing.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device under test, in full fp32: TF32 would round products to 10 bits."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield torch.device(request.param)
    torch.set_float32_matmul_precision(before)
