"""Whether the cluster's head can be reached: before Ray connects, and while a driver runs.

Ray's own client tries for 20 s, and then says neither that nobody listens nor that the token is wrong. Once connected it ends its process
in the middle, without a word to the program, after 60 s in which it reached no head; until then calls wait. So we look for ourselves.
"""

from __future__ import annotations

import socket
import time
from contextlib import suppress

from cluster.errors import ClusterError, HeadLostError

PATIENCE_S = 45.0  # a head that is started again within it (Ray can keep its state in Redis) is the same head; Ray gives up at 60
LOOK_EVERY_S = 5.0
CONNECT_S = 2.0
ANSWER_S = 5.0  # before Ray connects


class HeadWatch:
    """Looks when asked, at most every `LOOK_EVERY_S`. `address`: host:port of Ray's control service (GCS)."""

    def __init__(self, address: str, patience_s: float = PATIENCE_S, every_s: float = LOOK_EVERY_S) -> None:
        host, _, port = address.rpartition(":")
        self._host, self._port, self._patience_s, self._every_s = host.strip("[]"), int(port), patience_s, every_s
        self._seen_s = self._looked_s = time.monotonic()

    def look(self) -> None:
        """Raises HeadLostError where nothing has answered at the head's address for `patience_s`."""
        if time.monotonic() - self._looked_s < self._every_s:
            return
        answers = self._answers()
        self._looked_s = time.monotonic()
        if answers:
            self._seen_s = self._looked_s
        elif (silent_s := self._looked_s - self._seen_s) >= self._patience_s:
            raise HeadLostError(
                f"the head of the Ray cluster ({self._host}:{self._port}) has not answered for {silent_s:.0f} s: it is gone, and the run "
                "ends with it. Run the same command on a cluster that lives (RAY_ADDRESS): it goes on from the last checkpoint."
            )

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection((self._host, self._port), timeout=CONNECT_S):
            return True
        return False


def require_head(address: str) -> None:
    """Raises ClusterError where nothing listens at `address` (host:port), or what listens refuses this process's token. Other addresses
    that Ray knows ("auto") are left to Ray."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
    except OSError as error:
        raise ClusterError(
            f"no head answers at {address} ({error.strerror or error}). Start one (ray start --head --port={port}), or give the address of "
            "one that lives: --address or RAY_ADDRESS."
        ) from None
    if _refuses_token(address):
        raise ClusterError(
            f"the cluster at {address} refuses this client's token, or that there is none. Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or "
            "RAY_AUTH_TOKEN_PATH) to the cluster's token."
        )


def _refuses_token(address: str) -> bool:
    """Asks for the cluster's id, with the token of this process's environment; any other trouble will show when Ray connects."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel

    try:
        channel = init_grpc_channel(address)
    except Exception as error:  # token mode without a token: Ray's own words name the variables, in a page of text
        return "token" in str(error).lower()
    try:
        channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=ANSWER_S)  # a request without fields is no bytes
    except grpc.RpcError as error:
        return isinstance(error, grpc.Call) and error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
    except Exception as error:
        return "token" in str(error).lower()
    finally:
        channel.close()
    return False
