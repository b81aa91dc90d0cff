"""A loopback server that answers each connection as the test says, byte by byte if need be."""

import contextlib
import socket
import socketserver
import struct
import threading
import tracemalloc
from collections.abc import Callable, Iterator

Answer = Callable[["Connection"], None]
HEAD = b"HTTP/1.1 200 OK\r\n"


class Server(socketserver.ThreadingTCPServer):
    """Its `answers` in their order, the last one again and again; what it was asked, and sent."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Connection)
        self.answers: list[Answer] = []
        self.requests: list[bytes] = []
        self.n_sent = 0
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of these tests."""


class Connection(socketserver.StreamRequestHandler):
    """One request; the connection is closed after its answer."""

    server: Server

    def handle(self) -> None:
        request = b""
        while line := self.rfile.readline():
            request += line
            if line == b"\r\n":
                break
        _, _, length = request.lower().partition(b"content-length: ")
        request += self.rfile.read(int(length.split()[0]) if length else 0)
        number = min(len(self.server.requests), len(self.server.answers) - 1)
        self.server.requests.append(request)
        self.body = request.partition(b"\r\n\r\n")[2]
        self.server.answers[number](self)

    def send(self, content: bytes) -> None:
        self.connection.sendall(content)
        self.server.n_sent += len(content)

    def send_for_ever(self, content: bytes, pause_s: float = 0.0) -> None:
        while not self.server.closing.wait(pause_s):
            self.send(content)


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:  # also when the test failed: this thread would keep the process
            server.closing.set()
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def little_memory(n_bytes: int = 8 << 20) -> Iterator[None]:
    """The block never holds more than that at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < n_bytes
    finally:
        tracemalloc.stop()


def whole(body: bytes, *headers: bytes) -> Answer:
    """What a well-behaved server sends."""
    lines = [b"Content-Length: %d" % len(body), b"Connection: close", *headers]
    return lambda to: to.send(HEAD + b"\r\n".join(lines) + b"\r\n\r\n" + body)


def status(code: int, body: bytes, *headers: bytes) -> Answer:
    lines = [b"HTTP/1.1 %d Said" % code, b"Content-Length: %d" % len(body), b"Connection: close"]
    return lambda to: to.send(b"\r\n".join([*lines, *headers]) + b"\r\n\r\n" + body)


def short(body: bytes) -> Answer:
    """A body that ends before the length that was announced."""
    return lambda to: to.send(HEAD + b"Content-Length: %d\r\n\r\n" % (2 * len(body)) + body)


def reset(body: bytes) -> Answer:
    """A connection that is reset in the middle of its body."""

    def answer(to: Connection) -> None:
        short(body)(to)
        to.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return answer


def silence(to: Connection) -> None:
    to.server.closing.wait()


def hang_up(to: Connection) -> None:
    """Not a byte."""


def endless_body(to: Connection) -> None:
    to.send(HEAD + b"Content-Type: application/octet-stream\r\n\r\n")
    to.send_for_ever(b"A" * 65536)


def endless_header(to: Connection) -> None:
    """Never late by the byte: no timeout of a single read ends it."""
    to.send(HEAD + b"X: ")
    to.send_for_ever(b"A", pause_s=0.05)


def endless_slow_body(to: Connection) -> None:
    to.send(HEAD + b"\r\n")
    to.send_for_ever(b"A", pause_s=0.05)


def endless_continue(to: Connection) -> None:
    """Interim answers, which a client may get any number of."""
    to.send_for_ever(b"HTTP/1.1 103 Early Hints\r\n\r\n", pause_s=0.02)


def no_http(to: Connection) -> None:
    to.send(b"SSH-2.0-OpenSSH_9.6\r\n")


def moved(target: bytes) -> Answer:
    return status(302, b"", b"Location: " + target)
