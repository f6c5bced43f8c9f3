"""A model behind an OpenAI-compatible HTTP server."""

import asyncio
import ipaddress
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

from app.options import Device, Dtype, Model
from modules.errors import UserError

if TYPE_CHECKING:
    from aiohttp import web

    from app.serving.server import Served, Server
    from app.serving.worker import Worker

GRACE_SECONDS = 10
"""How long answers that are being written may go on once the server is to stop."""


def serve(
    model: Model,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    api_key: str | None = None,
    batch_size: int = 16,
    max_waiting: int = 256,
    max_context: int = 8192,
    max_body: int = 4,
    timeout: float = 600,
    special_tokens_in_content: bool = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Answer OpenAI's completions and chats over HTTP: openai's and lm-eval's clients can use the model.

    Requests that come together are decoded together: rows join the running batch and leave it. Prompts are text (names
    of special tokens in them and in messages are text, too) or token ids. GET /health says how many completions are
    being written and are waiting. Ctrl-C or SIGTERM ends: answers that are being written get ten seconds more.

    Args:
        model: Folder that `fit` wrote (a checkpoint or a run), or Hugging Face folder.
        host: Address to listen at; 127.0.0.1: only programs of this machine reach it, 0.0.0.0: every machine that
            reaches this one.
        port: Port to listen at; 0: any that is free.
        name: The model's name in requests; null: MODEL as it is given here.
        api_key: What clients must send as their API key; null: nothing.
        batch_size: Completions that are written together at most.
        max_waiting: Completions that may wait for a place; requests beyond are told to come again (429).
        max_context: Tokens of prompt and completion together at most; longer requests are refused.
        max_body: MiB of a request at most.
        timeout: Seconds from a request to the end of its answer at most.
        special_tokens_in_content: Whether names of special tokens in messages and prompts are those tokens, as in
            transformers: who writes a message can then end its turn and write the next one.
        dtype: Format of the matrix products: the checkpoint's own (auto; a quantised model runs as it is served, its
            inputs quantised too), fp32 or bf16 (quantised weights are then dequantised).
        device: Where to compute; auto takes the GPU if there is one.

    Example:
        python -m app serve runs/pretrain
    """
    for option, value, least in (
        ("batch_size", batch_size, 1),
        ("max_waiting", max_waiting, 1),
        ("max_context", max_context, 2),
        ("max_body", max_body, 1),
    ):
        if value < least:
            raise UserError(f"--{option}: {value} must be at least {least}")
    if not 0 < timeout < float("inf"):
        raise UserError(f"--timeout: {timeout} must be a positive number of seconds")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise UserError("--api_key: must be printable ASCII without blanks at its ends; give another one")
    with bind(host, port) as listener:
        from app.serving.server import Limits, Server

        served, worker = load(model, name, batch_size, max_waiting, special_tokens_in_content, dtype, device)
        limits = Limits(max_context=max_context, max_body=max_body * 2**20, seconds=timeout)
        worker.start()
        try:
            asyncio.run(run(Server(served, worker, limits, api_key), listener, served.name))
        finally:
            worker.close()
            served.prompts.close()
            worker.join()


def load(
    model: Model,
    name: str | None = None,
    batch_size: int = 16,
    max_waiting: int = 256,
    special_tokens_in_content: bool = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> "tuple[Served, Worker]":
    """Load a model to be served; for the arguments see `serve`.

    Raises:
        UserError: it is no MODEL, or brings no tokenizer.
    """
    from app.models import choose_device, load_network, note_decoding, open_source, open_tokenizer
    from app.serving.answers import TokenTexts
    from app.serving.prompts import Prompts
    from app.serving.server import Served
    from app.serving.worker import Worker
    from app.talk import template_variables
    from datamodules.conversations.template import ChatTemplate

    where, source = choose_device(device), open_source(model)
    tokenizer, decode = open_tokenizer(source), open_tokenizer(source).decode  # one for each thread, see `Prompts`
    ends = frozenset(source.generation.eos_token_ids)
    try:
        template = ChatTemplate(tokenizer, special_tokens_in_content)
        turn_end = template.turn_end()
    except UserError as error:
        template = turn_end = None
        print(f"note: completions only, no chats: {error}", file=sys.stderr)
    network = load_network(source, dtype, where)
    note_decoding(network)
    served = Served(
        name=str(model) if name is None else name,
        created=int(time.time()),
        prompts=Prompts(
            tokenizer,
            template,
            template_variables(source, None, False, None),
            source.config.vocab_size,
            special_tokens_in_content,
        ),
        texts=TokenTexts(tokenizer, source.config.vocab_size),
        decode=decode,
        ends=ends,
        chat_ends=ends if turn_end is None else ends | {turn_end},
    )
    return served, Worker(network, decode, batch_size, max_waiting)


def bind(host: str, port: int) -> socket.socket:
    """Take a port before minutes go into loading a model; nobody can connect yet.

    Raises:
        UserError: there is no such address, or the port is taken.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"--port: {port} must be from 0 (any that is free) to {2**16 - 1}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host: {host} is no address of this machine ({error}); give 127.0.0.1 or 0.0.0.0") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if isinstance(error, PermissionError):
            raise UserError(f"--port: {port} needs rights of the administrator; give one from 1024 on") from None
        key = "--host" if error.errno == 99 else "--port"
        raise UserError(f"{key}: cannot listen at {host}:{port} ({error.strerror}); give another one") from None
    return listener


async def run(server: "Server", listener: socket.socket, name: str) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        server: the server.
        listener: a bound socket.
        name: the model's name.
    """
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = await listen(server, listener)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    if not ipaddress.ip_address(host).is_loopback:
        print(
            f"warning: {host} is no address of this machine alone: whoever reaches it can use the model (there is no "
            "encryption, and no authentication but --api_key)",
            file=sys.stderr,
        )
    print(f"serving {name} at http://{shown}:{port}/v1 (Ctrl-C ends)", file=sys.stderr, flush=True)
    await stop.wait()
    print("stopping: answers that are being written may end", file=sys.stderr, flush=True)
    await runner.cleanup()


async def listen(server: "Server", listener: socket.socket) -> "web.AppRunner":
    """Answer who connects to a bound socket, until `cleanup` of what is returned."""
    from aiohttp import web

    runner = web.AppRunner(
        server.application(), handler_cancellation=True, access_log=None, shutdown_timeout=GRACE_SECONDS
    )
    await runner.setup()
    await web.SockSite(runner, listener).start()
    return runner
