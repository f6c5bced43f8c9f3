"""A server in a thread of the tests, and ways to talk to it."""

import asyncio
import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.commands.serve import bind, listen, load
from app.serving.server import Limits, Server
from tests.app.helpers import wait_for

NAME = "tiny"


class Running:
    """A server of a model at a free port."""

    def __init__(
        self,
        model: Path,
        *,
        batch_size: int = 4,
        max_waiting: int = 64,
        max_context: int = 256,
        max_body: int = 2**16,
        seconds: float = 60,
        api_key: str | None = None,
        special_tokens_in_content: bool = False,
    ) -> None:
        self.served, self.worker = load(model, NAME, batch_size, max_waiting, special_tokens_in_content)
        limits = Limits(max_context=max_context, max_body=max_body, seconds=seconds)
        self.server = Server(self.served, self.worker, limits, api_key)
        self.listener = bind("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.worker.start()
        self.runner = asyncio.run_coroutine_threadsafe(listen(self.server, self.listener), self.loop).result(30)
        self.headers = {"Content-Type": "application/json"}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
        """Return status and JSON of an answer, its text if it is a stream."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {**self.headers, **headers})
        response = connection.getresponse()
        content = response.read()
        connection.close()
        stream = response.headers["Content-Type"] == "text/event-stream"
        return response.status, content.decode() if stream else json.loads(content)

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        return self.request("POST", f"/v1/{path}", json.dumps(body).encode())

    def complete(self, prompt: Any, **body: Any) -> dict[str, Any]:
        status, answer = self.post("completions", prompt=prompt, **body)
        assert status == 200, answer
        return answer

    def chat(self, messages: list[dict[str, Any]], **body: Any) -> dict[str, Any]:
        status, answer = self.post("chat/completions", messages=messages, **body)
        assert status == 200, answer
        return answer

    def stream(self, path: str, **body: Any) -> Iterator[dict[str, Any]]:
        """Yield the chunks of a stream, which must end as it should."""
        status, answer = self.post(path, stream=True, **body)
        assert status == 200, answer
        *chunks, last, rest = answer.split("\n\n")
        assert (last, rest) == ("data: [DONE]", "")
        for chunk in chunks:
            yield json.loads(chunk.removeprefix("data: "))

    def health(self) -> dict[str, Any]:
        status, answer = self.request("GET", "/health")
        assert status == 200
        return answer

    def wait_until_idle(self) -> None:
        idle = {"status": "ok", "running": 0, "waiting": 0}
        wait_for(lambda: self.health() == idle, 20)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result(30)
        self.worker.close()
        self.worker.join(30)
        self.served.prompts.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(30)
        self.loop.close()
        assert not self.worker.is_alive()
