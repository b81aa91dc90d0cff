"""A judge's endpoint and the limits on requests to it, checked before anything is sent."""

import re
from dataclasses import dataclass

from pipeline.api_keys import key_from_environment


@dataclass(frozen=True)
class JudgeConfig:
    """The judge's endpoint, and the limits on requests to it.

    Args:
        base_url: URL of an OpenAI-compatible server, including /v1: Ollama, vLLM, llama.cpp, ...
        model: name of the model on that server.
        api_key_env: environment variable that holds the server's key; empty if it needs none.
        max_concurrency: maximum number of requests at a time.
        max_tokens: maximum length of a reply, in tokens.
        timeout_s: time limit of a request, in seconds, from connecting to the last byte.
        max_attempts: attempts per request; 429, 5xx, timeouts and lost connections are retried.
        max_wait_s: longest wait before a retry, in seconds, even if Retry-After asks for more.
    """

    base_url: str
    model: str
    api_key_env: str = ""
    max_concurrency: int = 4
    max_tokens: int = 1024
    timeout_s: float = 120.0
    max_attempts: int = 5
    max_wait_s: float = 30.0

    def check(self) -> None:
        """Raises ValueError for an invalid field or a missing key.

        Not done on construction: the command line would print the values beside the error.
        """
        _check_url(self.base_url)
        if not self.model:
            raise ValueError("judge.model is empty; give the name by which the server knows it.")
        for name in ("max_concurrency", "max_tokens", "max_attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"judge.{name} is {getattr(self, name)}; it must be at least 1.")
        if not (self.timeout_s > 0 and self.max_wait_s >= 0):
            raise ValueError(
                f"judge.timeout_s is {self.timeout_s} and judge.max_wait_s {self.max_wait_s}; "
                "a timeout must be positive and a wait not negative."
            )
        self.api_key()

    def api_key(self) -> str:
        """The key, empty if none is needed; ValueError, without showing it, if it is invalid."""
        return key_from_environment(self.api_key_env, "judge.api_key_env")


def _check_url(base_url: str) -> None:
    host = r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*)"
    url = re.fullmatch(rf"https?://{host}(:(?P<port>[0-9]{{1,5}}))?(/[!-~]*)?", base_url)
    may_hold_a_secret = any(mark in base_url for mark in "@?#")
    if not url or may_hold_a_secret or int(url["port"] or 80) not in range(1, 65536):
        shown = "[hidden: it may hold a password or a key]" if may_hold_a_secret else base_url
        raise ValueError(
            f"judge.base_url is {shown}; it takes http(s)://host[:port]/v1 and nothing more. "
            "A key goes into the environment variable that judge.api_key_env names."
        )
