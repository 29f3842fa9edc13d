"""A job server that answers as it is told, in a thread of its own: for what a real one does only when something breaks."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Fake:
    """`cuts`: of the log, after how many characters each connection to it breaks; the last one tells the rest. `more`: of the job `a`, what
    it tells beside or instead."""

    log: str = ""
    cuts: Sequence[int] = ()
    ray_version: str = ""
    status: int = 200  # of every answer
    jobs: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = 0
    more: dict[str, Any] = field(default_factory=dict)
    no_tail: bool = False  # as behind a proxy that lets no websocket through
    answer: str = "no"  # where `status` is not 200
    connections: int = 0
    submitted: list[dict[str, Any]] = field(default_factory=list)
    packages: list[str] = field(default_factory=list)
    address: str = ""

    def details(self) -> dict[str, Any]:
        ended = self.connections > len(self.cuts)
        status = "RUNNING" if not ended else "SUCCEEDED" if self.exit_code == 0 else "FAILED"
        return {"submission_id": "a", "status": status, "driver_exit_code": self.exit_code if ended else None, **self.more}


@contextmanager
def fake_job_server(fake: Fake) -> Iterator[Fake]:
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(_app(fake))
    loop.run_until_complete(runner.setup())
    site = web.TCPSite(runner, "127.0.0.1", 0)
    loop.run_until_complete(site.start())
    host, port = runner.addresses[0][:2]
    fake.address = f"http://{host}:{port}"
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def answering(words: bytes) -> Iterator[str]:
    """host:port of a server that answers everybody with `words`, and closes."""

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection, suppress(OSError):
                    connection.settimeout(5)
                    connection.recv(1 << 16)
                    connection.sendall(words)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(30)


def _app(fake: Fake) -> web.Application:
    async def tail(request: web.Request) -> web.StreamResponse:
        if fake.no_tail:
            return web.Response(status=400)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        number, fake.connections = fake.connections, fake.connections + 1
        text = fake.log if number >= len(fake.cuts) else fake.log[: fake.cuts[number]]
        for at in range(0, len(text), 7):
            await socket.send_str(text[at : at + 7])
        if number < len(fake.cuts) and request.transport is not None:
            request.transport.abort()
        return socket

    async def submit(request: web.Request) -> web.Response:
        fake.submitted.append(await request.json())
        return web.json_response({"submission_id": fake.submitted[-1]["submission_id"]})

    async def upload(request: web.Request) -> web.Response:
        fake.packages.append(request.match_info["name"])
        await request.read()
        return web.Response()

    async def has(request: web.Request) -> web.Response:
        return web.Response(status=200 if request.match_info["name"] in fake.packages else 404)

    @web.middleware
    async def refuse(request: web.Request, handler: Any) -> web.StreamResponse:
        return await handler(request) if fake.status == 200 else web.Response(status=fake.status, text=fake.answer)

    async def version(request: web.Request) -> web.Response:
        return web.json_response({"ray_version": fake.ray_version})

    async def jobs(request: web.Request) -> web.Response:
        return web.json_response(fake.jobs)

    async def job(request: web.Request) -> web.Response:
        return web.json_response(fake.details())

    async def log(request: web.Request) -> web.Response:
        return web.json_response({"logs": fake.log})

    app = web.Application(middlewares=[refuse], client_max_size=100 << 20)
    app.add_routes(
        [
            web.get("/api/version", version),
            web.get("/api/jobs/", jobs),
            web.get("/api/jobs/a", job),
            web.get("/api/jobs/a/logs", log),
            web.get("/api/jobs/a/logs/tail", tail),
            web.post("/api/jobs/", submit),
            web.get("/api/packages/gcs/{name}", has),
            web.put("/api/packages/gcs/{name}", upload),
        ]
    )
    return app
