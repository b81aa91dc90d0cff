"""A `serve` process to send requests to."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import openai

from tests.journey import ROOT

IMPATIENT = """
import sys
import pipeline.serving.serve as server
from pipeline.__main__ import main
server.PATIENCE_S = {}
sys.exit(main(sys.argv[1:]))
"""


class Served:
    """A server's process, with less patience where `patience_s` says so."""

    def __init__(
        self, folder: Path, *words: str, patience_s: float | None = None, **environment: str
    ) -> None:
        self.log = folder / "stderr"
        command = [sys.executable, "-m", "pipeline", "serve", "--port=0", *words]
        if patience_s is not None:
            command[1:3] = ["-c", IMPATIENT.format(patience_s)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                text=True,
            )
        assert self.process.stdout
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:"), self.log.read_text()

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def notes(self) -> list[int]:
        """Tokens written for every request that is done."""
        return [int(n) for n in re.findall(r"(\d+) written", self.log.read_text())]

    def stop(self, how: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(how)
        return self.process.wait(60)
