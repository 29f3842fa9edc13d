"""A head that does not answer is told as gone, once the patience with it is over."""

from __future__ import annotations

import socket

import pytest

from cluster.errors import HeadLostError
from cluster.head import HeadWatch


def test_a_head_is_gone_when_nothing_answers_any_more():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        impatient, patient = (HeadWatch(address, patience_s, every_s=0) for patience_s in (0, 1000))
        impatient.look()
    patient.look()
    with pytest.raises(HeadLostError, match=f"{address}.*Run the same command"):
        impatient.look()
