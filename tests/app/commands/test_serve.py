"""`serve` as a user starts it: what it says, refuses, and how it ends."""

import http.client
import json
import os
import re
import signal
import socket
import threading
from pathlib import Path

import pytest

from app.__main__ import main
from tests.app.helpers import Program, wait_for


def serving(program: Program, number: int, talk=lambda port: None):
    """Return what waits until the server serves, talks with it, and sends it a signal."""

    def meanwhile(pid: int) -> None:
        wait_for(lambda: "serving" in program.output())
        found = re.search(r"http://\S+:(\d+)/v1", program.output())
        assert found, program.output()
        talk(int(found[1]))
        os.kill(pid, number)

    return meanwhile


def post(port: int, **body) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_once_answers_are_written(program: Program, models: dict[str, Path], number: int) -> None:
    answers = []

    def talk(port: int) -> None:
        assert post(port, prompt="def", max_tokens=3, model=str(models["first"]))[0] == 200
        asked = {"prompt": [5], "max_tokens": 1500, "temperature": 0}
        thread = threading.Thread(target=lambda: answers.append(post(port, **asked)))
        thread.start()
        threads.append(thread)

        def running() -> bool:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("GET", "/health")
            return json.loads(connection.getresponse().read())["running"] == 1

        wait_for(running)

    threads: list[threading.Thread] = []
    result = program.run("serve", models["first"], "--port", "0", meanwhile=serving(program, number, talk))
    threads[0].join()
    assert result.code == 0, result.output
    assert "Traceback" not in result.output
    assert "warning" not in result.output
    ((status, answer),) = answers
    assert (status, answer["usage"]["completion_tokens"]) == (200, 1500)


def test_an_address_that_others_reach_is_warned_of(program: Program, models: dict[str, Path]) -> None:
    args = ("serve", models["first"], "--port", "0", "--host", "0.0.0.0", "--name", "tiny")
    result = program.run(*args, meanwhile=serving(program, signal.SIGTERM))
    assert result.code == 0
    assert "warning: 0.0.0.0 is no address of this machine alone" in result.unfolded
    assert "serving tiny at" in result.output


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--port", "70000"], "--port"),
        (["--port", "-1"], "--port"),
        (["--host", "nowhere.invalid"], "--host"),
        (["--batch_size", "0"], "--batch_size"),
        (["--max_context", "1"], "--max_context"),
        (["--max_body", "0"], "--max_body"),
        (["--timeout", "nan"], "--timeout"),
        (["--api_key", ""], "--api_key"),
        (["--api_key", "kéy"], "--api_key"),
    ],
)
def test_mistakes(models: dict[str, Path], capsys, options: list[str], named: str) -> None:
    assert main(["serve", str(models["first"]), *options]) == 2
    assert named in capsys.readouterr().err


def test_a_port_that_is_taken(models: dict[str, Path], capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(models["first"]), "--port", str(port)]) == 2
    assert f"--port: cannot listen at 127.0.0.1:{port}" in capsys.readouterr().err
