"""`serve`: serves a checkpoint over HTTP until it is stopped."""

import asyncio
import json
import logging
import shlex
import socket
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from pipeline.api_keys import key_from_environment
from pipeline.classifier import GPTClassifier
from pipeline.console import say, warn
from pipeline.decoding.sampling import Sampling
from pipeline.inference import label_texts, load_for_use
from pipeline.models import Loaded
from pipeline.ports import LOOPBACK, listen
from pipeline.precision import Precision
from pipeline.serving.app import Labels, make_app
from pipeline.serving.engine import Engine, Limits
from pipeline.serving.writer import Writer
from pipeline.workers import Workers

PATIENCE_S = 30  # for requests in progress when the server is stopped
TO_BE_TOLD_S = 5  # after that, for the remaining ones to receive an error


def serve(
    ckpt: str,
    *,
    name: str,
    address: tuple[str, int],
    api_key_env: str,
    precision: Precision,
    limits: Limits,
    defaults: Sampling,
) -> None:
    """Serves until SIGINT or SIGTERM; requests in progress then have PATIENCE_S to finish.

    ValueError if the port is taken, the key is missing, ckpt holds no model, or a classifier is to
    answer in a precision other than 32-true.
    """
    key = key_from_environment(api_key_env, "api_key_env")
    listener = listen(*address)
    app_of = partial(make_app, key=key, local=address[0] in LOOPBACK)
    if address[0] not in LOOPBACK and not key:
        warn(f"whoever reaches {address[0]} can use it; --api_key_env asks for a key.")
    # a single worker computes: OpenMP starts threads for every thread that does, and where those
    # outnumber the cores, they sleep between operations, and decoding takes 1.3 times as long
    worker = Workers("model")
    loaded = worker.run(load_for_use, ckpt, precision)
    name = name or loaded.title
    if isinstance(loaded.model, GPTClassifier):
        if precision not in ("auto", "32-true"):
            raise ValueError(f"precision is {precision}; a classifier answers only in 32-true.")
        of = partial(worker.submit, label_texts, loaded)
        server = _Server(app_of(name, Labels(loaded.meta["label_names"], of)))
        _greet(loaded, name, listener, api_key_env)
        server.run([listener])
        return

    engine = Engine(worker, loaded.gpt, limits)
    server = _Server(app_of(name, Writer(loaded, engine, defaults)), engine.close)
    engine.ended.add_done_callback(lambda _: setattr(server, "should_exit", True))
    try:
        _greet(loaded, name, listener, api_key_env)
        server.run([listener])
    finally:
        engine.close()
    engine.ended.result()


class _Server(uvicorn.Server):
    """uvicorn's, which since Python 3.12 would wait for connections even after a second Ctrl-C.

    `give_up` is called PATIENCE_S after the first signal, to end the requests still in progress.
    """

    def __init__(self, app: FastAPI, give_up: Callable[[], None] | None = None) -> None:
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=PATIENCE_S + TO_BE_TOLD_S,
        )
        super().__init__(config)
        self._give_up = give_up
        # a second Ctrl-C cancels requests in progress, which is no error to log
        logging.getLogger("uvicorn.error").addFilter(_is_error)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handles a signal; the second interrupt closes all connections."""
        if self._give_up and not self.should_exit:
            patience = threading.Timer(PATIENCE_S, self._give_up)
            patience.daemon = True
            patience.start()
        super().handle_exit(sig, frame)
        if self.force_exit:
            loop = asyncio.get_running_loop()
            for connection in [*self.server_state.connections]:
                loop.call_soon_threadsafe(connection.transport.abort)


def _is_error(record: logging.LogRecord) -> bool:
    kind = record.exc_info[0] if record.exc_info else None
    return kind is not asyncio.CancelledError


def _greet(loaded: Loaded, name: str, listener: socket.socket, key_variable: str) -> None:
    """Prints the address to stdout, and a command to try to stderr."""
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    asked: dict[str, Any] = {"model": name}
    if isinstance(loaded.model, GPTClassifier):
        route, asked["input"] = "/classify", "Some text."
    elif "prompt_style" in loaded.meta:
        said = {"role": "user", "content": "What is the capital of France?"}
        route, asked["messages"] = "/v1/chat/completions", [said]
    else:
        route, asked["prompt"] = "/v1/completions", "Every effort moves you"
    print(url, flush=True)
    words = ["curl", url + route, "-H", "Content-Type: application/json", "-d", json.dumps(asked)]
    bearer = f' -H "Authorization: Bearer ${key_variable}"' if key_variable else ""
    say(f"{name} answers at this address until Ctrl-C; try\n  {shlex.join(words)}{bearer}")
