"""Tokens per second, absolute: the numbers that a ratio hides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specdec.bench.statistics.sample import Sample


def throughput(samples: Sequence[Sample]) -> dict[str, Any]:
    """Tokens, seconds and tokens per second of all rows together; decoding counts what follows each first token."""
    tokens, seconds = sum(sample.tokens for sample in samples), sum(sample.time for sample in samples)
    timed = [(sample.later_tokens, time) for sample in samples if (time := sample.decode_time) is not None]
    later, decode = sum(count for count, _ in timed), sum(time for _, time in timed)
    return {
        "requests": len(samples),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
        "decode_tokens_per_second": later / decode if decode and len(timed) == len(samples) else None,
    }


def peak_memory(samples: Sequence[Sample]) -> int | None:
    """Largest peak of any record, in bytes."""
    return max((peak for sample in samples if (peak := sample.record["peak_memory_bytes"]) is not None), default=None)
