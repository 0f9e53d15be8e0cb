"""What a stream was worth by topic: at first and in the end, with the drafter that learned and as it was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from specdec.train.stream import Request
from specdec.train.topics import Accepted


@dataclass(frozen=True)
class Share:
    """One drafter on a topic, in the first and in the last third of its requests."""

    first: Accepted
    last: Accepted

    @staticmethod
    def of(requests: Sequence[Request]) -> Share:
        """Of one topic, in order; of fewer than three, each third is one request."""
        third = max(len(requests) // 3, 1)
        return Share(accepted(requests[:third]), accepted(requests[-third:]))

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {"first_third": self.first.summary(), "last_third": self.last.summary()}


@dataclass(frozen=True)
class TopicShares:
    """One topic.

    Attributes:
        topic: None for requests without one.
        requests: that were decoded.
        learning: the drafter that learned.
        static: the drafter as it was, on the same requests; None where it was not asked for all of them.
    """

    topic: str | None
    requests: int
    learning: Share
    static: Share | None

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        static = None if self.static is None else self.static.summary()
        return {"topic": self.topic, "requests": self.requests, "learning": self.learning.summary(), "static": static}


def by_topic(learning: Sequence[Request], static: Sequence[Request]) -> list[TopicShares]:
    """One entry for each topic, in the order in which they were met.

    Args:
        learning: all requests, in order.
        static: the same ones with the drafter as it was; fewer, or none, where it was not asked.
    """
    shares = []
    for topic in dict.fromkeys(request.topic for request in learning):
        ours = [request for request in learning if request.topic == topic]
        theirs = [request for request in static[: len(learning)] if request.topic == topic]
        compared = Share.of(theirs) if len(theirs) == len(ours) else None
        shares.append(TopicShares(topic, len(ours), Share.of(ours), compared))
    return shares


def accepted(requests: Iterable[Request]) -> Accepted:
    """Sums over requests."""
    total = Accepted()
    for request in requests:
        total = Accepted(
            total.steps + request.steps,
            total.emitted + request.emitted,
            total.accepted + request.accepted,
            total.tried + request.tried,
        )
    return total
