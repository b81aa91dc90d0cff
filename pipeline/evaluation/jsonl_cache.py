"""Results that take long to get, kept on disk as they come, so that a killed command can resume."""

import json
from pathlib import Path
from typing import Any

from datamodules.files import MALFORMED
from pipeline.console import warn


class JsonlCache:
    """Rows by key in a JSON Lines file; a line that a crash cut short is skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}  # `key` and facts; the last row of a key wins
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        for line in content.splitlines():
            try:
                row = json.loads(line)
                self.rows[row["key"]] = row
            except MALFORMED:
                self.pass_over()
        if content and not content.endswith(b"\n"):
            self._write(b"\n")

    def append(self, key: str, **facts: Any) -> None:
        """Appends a row in a single write, so that the lines of two processes do not mix."""
        row = {"key": key, **facts}
        self._write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.rows[key] = row

    def pass_over(self) -> None:
        """Warns that a line cannot be used."""
        warn(f"{self.path}: passing over a damaged line; its item is asked for again.")

    def _write(self, line: bytes) -> None:
        with self.path.open("ab", buffering=0) as file:
            n_bytes = file.write(line)
        if n_bytes != len(line):
            raise OSError(
                f"{self.path} could not be written ({n_bytes} of {len(line)} bytes); make room, "
                "then repeat the command to resume."
            )
