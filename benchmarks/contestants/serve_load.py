"""Many who ask a server at once, each with one question after the other.

    python -m benchmarks.contestants.serve_load RECORD QUESTIONS ASKED COMMAND...

ASKED is JSON: what every request has beside its question. COMMAND starts a server in OpenAI's form
at the port that stands for `{port}`.
"""

import contextlib
import json
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.prepare import SMOLLM2
from benchmarks.record import Record, peak_memory
from datamodules.tokenizer import Tokenizer
from pipeline.weights.reading import tokenizer_of

N_CLIENTS, N_NEW = 16, 64
PATIENCE_S = 300
LOADING = 503  # as llama.cpp's server answers; others do not answer yet, or know no such route


@contextlib.contextmanager
def server(command: list[str], log: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Address and process of a server that answers; it is stopped afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [word.replace("{port}", str(port)) for word in command]
    with log.open("wb") as output:
        process = psutil.Popen(words, stdout=output, stderr=output)
    try:
        url, end = f"http://127.0.0.1:{port}/v1", time.monotonic() + PATIENCE_S
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{' '.join(words)} does not answer:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield url, process
    finally:
        for started in (*process.children(recursive=True), process):  # some start others
            with contextlib.suppress(psutil.NoSuchProcess):
                started.kill()
        process.wait()


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        reply = httpx.get(url.replace("/v1", "/health"), timeout=5)
        return reply.status_code != LOADING
    return False


def ask(client: httpx.Client, url: str, asked: dict[str, Any], question: str) -> str:
    message = {"role": "user", "content": question}
    body = {**asked, "messages": [message], "max_tokens": N_NEW, "temperature": 0}
    reply = client.post(f"{url}/chat/completions", json=body)
    reply.raise_for_status()
    text: str = reply.json()["choices"][0]["message"]["content"]
    return text


def main(record_path: str, questions_path: str, asked_text: str, *command: str) -> None:
    questions = json.loads(Path(questions_path).read_text())
    record = Record(record_path)
    asked = json.loads(asked_text)
    tokenizer = Tokenizer.load(tokenizer_of(SMOLLM2))
    log = record.path.with_suffix(".log")
    with (
        server(list(command), log) as (url, process),
        httpx.Client(timeout=PATIENCE_S) as client,  # one: to make one costs 30 ms
        ThreadPoolExecutor(N_CLIENTS) as pool,
    ):
        ask(client, url, asked, questions[0])  # warms up
        record.start()
        answers = list(pool.map(lambda question: ask(client, url, asked, question), questions))
        # counted here, as some count the token that ends a text and others do not
        record.step(sum(len(tokenizer.encode(text)) for text in answers), None)
        record.facts["outputs"] = answers
        record.facts["rss"] = peak_memory(process.pid)
    record.save()


if __name__ == "__main__":
    main(*sys.argv[1:])
