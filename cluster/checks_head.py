"""Whether a cluster's head answers this client at all. Ray's own client tries for 20 s, and then says neither that nobody listens nor that
the token is wrong."""

from __future__ import annotations

import socket

from cluster.errors import ClusterError

ANSWER_S = 5.0


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
