"""Whom a node reaches, and how far its clock is off. The parts that need no Ray."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import dataclass

CONNECT_S = 3.0


@dataclass(frozen=True)
class Port:
    """`owner`: the node that listens there; `what`: who listens."""

    owner: str
    what: str
    host: str
    port: int


@dataclass(frozen=True)
class Closed:
    """A port that could not be reached, and why."""

    owner: str
    what: str
    where: str
    why: str


@dataclass(frozen=True)
class ClockOffset:
    """Seconds by which a node's clock is ahead of the driver's: within `offset_s` +- `error_s`."""

    offset_s: float
    error_s: float


def closed_ports(ports: Iterable[Port], connect_s: float = CONNECT_S) -> tuple[Closed, ...]:
    """Those that accept no TCP connection from this process within `connect_s`."""
    found: list[Closed] = []
    for port in ports:
        try:
            socket.create_connection((port.host, port.port), timeout=connect_s).close()
        except OSError as error:
            why = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
            found.append(Closed(port.owner, port.what, f"{port.host}:{port.port}", why))
    return tuple(found)


def neighbours(count: int, mine: int, at_most: int) -> list[int]:
    """Whom node `mine` of `count` tries: all others, or the `at_most` that follow it in a ring, so that each is tried by as many.

    Example: neighbours(5, 3, at_most=2) == [4, 0].
    """
    return [(mine + step) % count for step in range(1, min(at_most, count - 1) + 1)]


def clock_offset(rounds: Iterable[tuple[float, float, float]]) -> ClockOffset:
    """From (asked, told, answered): the driver's clock, the node's in between, the driver's again. As NTP does (RFC 5905, section 8) with a
    node that answers at once: half the round trip is the most by which the middle can be wrong, so the shortest round trip tells best.

    Example: asked at 100.0, told 107.1, answered at 100.2: the node is 7.0 s ahead, +- 0.1.
    """
    asked, told, answered = min(rounds, key=lambda each: each[2] - each[0])
    return ClockOffset(told - (asked + answered) / 2, (answered - asked) / 2)
