"""Whether the cluster's head can be reached: before Ray connects, and while a driver runs.

Ray's own client tries for 20 s, and then says neither that nobody listens nor that the token is wrong. Once connected it ends its process
in the middle, without a word to the program, after 60 s in which it reached no head; until then calls wait. So we look for ourselves.
"""

from __future__ import annotations

import re
import socket
import time
from contextlib import suppress

from cluster.errors import ClusterError, HeadLostError

PATIENCE_S = 45.0  # a head that is started again within it (Ray can keep its state in Redis) is the same head; Ray gives up at 60
LOOK_EVERY_S = 5.0
CONNECT_S = 2.0
ANSWER_S = 5.0  # before Ray connects
HEAD_PORT = 6379  # where `ray start --head` names none


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
    """Raises ClusterError where `address` is no HOST:PORT of a control service (GCS), where nothing or something else listens there, or
    where what listens refuses this process's token. "auto" and "local" are left to Ray."""
    if address in ("auto", "local"):
        return
    host, port = _host_and_port(address)
    try:
        socket.create_connection((host.strip("[]"), port), timeout=ANSWER_S).close()
    except (socket.gaierror, UnicodeError):
        raise ClusterError(f"no head answers at {address!r}: no machine is known here as {host!r}. {_ADDRESS_HINT}") from None
    except OSError as error:
        nearest = "Start one there (ray start --head)" if port == HEAD_PORT else f"Nearest: {host}:{HEAD_PORT}"
        raise ClusterError(f"no head answers at {address} ({error.strerror or error}). {nearest}. {_ADDRESS_HINT}") from None
    _require_control_service(address)


_ADDRESS_HINT = (
    f"Give HOST:PORT of a head that lives (--address or RAY_ADDRESS); the port is what `ray start --head --port` named, else {HEAD_PORT}."
)
_OTHERS = {"ray": "Ray Client's, whose driver is no part of the cluster", "http": "the dashboard's", "https": "the dashboard's"}


def _host_and_port(address: str) -> tuple[str, int]:
    if "@" in address:
        raise ClusterError(f"the head's address holds a user name or password. Leave them out. {_ADDRESS_HINT}")
    found = re.fullmatch(r"(?:(?P<scheme>[^:/]*)://)?(?P<host>[^/]*?)(?::(?P<port>[0-9]{1,9}))?(?P<path>/.*)?", address, re.DOTALL)
    assert found, "every text has this form"
    scheme, host, port, path = found.group("scheme", "host", "port", "path")
    known = host if host and (":" not in host or host.endswith("]")) else "HOST"
    nearest = f"Nearest: {known}:{HEAD_PORT}"
    if scheme is not None:
        dashboard = address if scheme in ("http", "https") else f"http://{known}:8265"
        raise ClusterError(
            f"{address!r} is an address with {scheme}:// ({_OTHERS.get(scheme, 'of no Ray')}), and a run connects to the head's control "
            f"service, HOST:PORT. {nearest}, on a machine of the cluster; from elsewhere send the job there: headrace submit JOB --address "
            f"{dashboard} --config FILE."
        )
    if not host or port is None or path is not None:
        raise ClusterError(f"{address!r} is no HOST:PORT. {nearest}. {_ADDRESS_HINT}")
    if not 1 <= int(port) <= 65535:
        raise ClusterError(f"{address!r} has port {port}, and ports are 1 to 65535. {nearest}. {_ADDRESS_HINT}")
    return host, int(port)


def _require_control_service(address: str) -> None:
    """Asks for the cluster's id, with the token of this process's environment; any other trouble will show when Ray connects."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel

    refused = ClusterError(
        f"the cluster at {address} refuses this client's token, or that there is none. Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or "
        "RAY_AUTH_TOKEN_PATH) to the cluster's token."
    )
    try:
        channel = init_grpc_channel(address)
    except Exception as error:  # token mode without a token: Ray's own words name the variables, in a page of text
        if "token" in str(error).lower():
            raise refused from None
        return
    try:
        channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=ANSWER_S)  # a request without fields is no bytes
    except grpc.RpcError as error:
        code, details = (error.code(), error.details() or "") if isinstance(error, grpc.Call) else (None, "")
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            raise refused from None
        if code == grpc.StatusCode.UNIMPLEMENTED or "Failed parsing HTTP/2" in details:
            raise ClusterError(
                f"what answers at {address} is not the control service of a Ray head (8265 is the dashboard's port, 10001 Ray Client's). "
                f"{_ADDRESS_HINT}"
            ) from None
    except Exception as error:
        if "token" in str(error).lower():
            raise refused from None
    finally:
        channel.close()
