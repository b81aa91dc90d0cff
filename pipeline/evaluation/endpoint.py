"""An OpenAI-compatible chat endpoint, with limits on attempts, waiting times and reply sizes.

Whatever comes back is kept as text; the key appears in the request's header and nowhere else.
"""

from __future__ import annotations

import json
import random
import re
import ssl
import threading
from typing import Any
from urllib.parse import urlsplit

import httpx
import tenacity

from datamodules.downloads import deadline
from datamodules.files import MALFORMED
from pipeline.console import say, warn
from pipeline.evaluation.judge_config import JudgeConfig
from pipeline.evaluation.rubric import Message
from pipeline.ports import LOOPBACK

MAX_REPLY_BYTES = 2**20
KEPT_CHARACTERS = 20_000  # of an unusable reply, for the record
FORM_REFUSED = (400, 422)  # 400: OpenAI, llama.cpp, Ollama; 422: FastAPI servers such as vLLM
REMEDIES = dict.fromkeys((301, 302, 307, 308), "give the final address as judge.base_url.") | {
    401: "export the right key under the name that judge.api_key_env gives.",
    403: "export a key with access under the name that judge.api_key_env gives.",
    404: "correct judge.base_url (it usually ends in /v1) or judge.model.",
}
UNREACHABLE = (httpx.ConnectError, httpx.ConnectTimeout)
PROBE_S = 5.0


class EndpointError(Exception):
    """No usable reply; `raw` is what came instead, `is_fatal` if other requests would fail too."""

    def __init__(self, problem: str, raw: str = "", *, is_fatal: bool = False) -> None:
        super().__init__(problem)
        self.raw, self.is_fatal = raw[:KEPT_CHARACTERS], is_fatal


class TransientError(EndpointError):
    """An error worth a retry, after `retry_after_s` if the server stated seconds."""

    retry_after_s: float | None = None


class Endpoint:
    """A chat endpoint with the limits of its `JudgeConfig`; threads may share an instance.

    `schema` is the JSON schema of replies. Parameters that the server refuses are left out, until a
    request is answered; all later requests have the parameters of that one. The conversation must
    therefore state the format, too. ValueError if the key is not in the environment.
    """

    def __init__(self, config: JudgeConfig, *, schema: dict[str, Any]) -> None:
        self.config = config
        self.stop = threading.Event()
        self._key = config.api_key()
        self._settling, self._is_settled = threading.Lock(), False  # on the parameters below
        self._parameters: dict[str, Any] = {
            "temperature": 0,
            "max_tokens": config.max_tokens,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "reply", "strict": True, "schema": schema},
            },
        }
        self._key_as_text = _spellings(self._key)
        self._tls = httpx.create_ssl_context()  # shared: the slowest part of making a client

    def complete(self, messages: list[Message]) -> str:
        """The content of the reply to a conversation; EndpointError if no attempt succeeds."""
        attempts = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.config.max_attempts)
            | tenacity.stop_when_event_set(self.stop),
            wait=self._wait_s,
            retry=tenacity.retry_if_exception_type(TransientError),
            sleep=tenacity.sleep_using_event(self.stop),
            reraise=True,
        )
        return attempts(self._post, messages)

    def _wait_s(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        named_s = error.retry_after_s if isinstance(error, TransientError) else None
        backoff_s = random.uniform(0.5, 1.0) * 2.0 ** (state.attempt_number - 1)
        return min(backoff_s if named_s is None else named_s, self.config.max_wait_s)

    def _post(self, messages: list[Message], adapted: dict[str, Any] | None = None) -> str:
        parameters = adapted or self._parameters
        body = {"model": self.config.model, "messages": messages, **parameters}
        url = self.config.base_url.rstrip("/") + "/chat/completions"
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        # a client per request, so that closing one that is late interrupts no other request
        client = _client(self.config, headers, self._tls)
        with client, deadline(client, self.config.timeout_s) as is_over:
            try:
                with client.stream("POST", url, json=body) as response:
                    given = self._read(response)
            except httpx.TransportError as error:
                if isinstance(error, UNREACHABLE) and not is_over.is_set():
                    raise TransientError(_unreachable(self.config, error), is_fatal=True) from error
                if is_over.is_set() or isinstance(error, httpx.TimeoutException):
                    raise TransientError(
                        f"the reply did not end within judge.timeout_s = {self.config.timeout_s}."
                    ) from error
                what = self._clean(str(error)) or type(error).__name__  # it quotes what came
                raise TransientError(f"the connection broke off ({what}).") from error
        text = self._clean(given)
        if response.status_code in FORM_REFUSED:  # another thread may have settled it by now
            other = self._parameters if self._is_settled else _adapted(parameters, text)
            if other != parameters:
                return self._post(messages, other)
        self._check_status(response, text)
        # parsed with the key still in: a short one may occur in a number or a field's name
        reply = self._clean(_content(given, shown=text, max_tokens=self.config.max_tokens))
        self._settle(parameters)
        return reply

    def _settle(self, parameters: dict[str, Any]) -> None:
        """Fixes the parameters of all requests to those of the first answered one."""
        with self._settling:
            if self._is_settled:
                return
            self._parameters, self._is_settled = parameters, True
        if "response_format" not in parameters:
            warn("the judge takes no response_format; going on with instructions alone.")
        if "temperature" not in parameters:
            warn("the judge takes no temperature of 0; its verdicts may differ if repeated.")

    def _read(self, response: httpx.Response) -> str:
        """The body of a response; EndpointError if it is longer than MAX_REPLY_BYTES."""
        body = bytearray()
        for chunk in response.iter_raw():
            body += chunk
            if len(body) > MAX_REPLY_BYTES:
                begun = self._clean(body.decode(errors="replace"))
                raise EndpointError(f"the reply is longer than {MAX_REPLY_BYTES} bytes.", begun)
        return body.decode(errors="replace")

    def _check_status(self, response: httpx.Response, text: str) -> None:
        status = response.status_code
        if response.is_success:
            return
        problem = f"HTTP {status} from {self.config.base_url} ({' '.join(text.split())[:200]})"
        if status == httpx.codes.TOO_MANY_REQUESTS or response.is_server_error:
            error = TransientError(f"{problem}.", text)
            after = response.headers.get("Retry-After", "")
            error.retry_after_s = float(after) if re.fullmatch(r"[0-9]+", after) else None
            raise error
        if status in REMEDIES:
            raise EndpointError(f"{problem}; {REMEDIES[status]}", text, is_fatal=True)
        raise EndpointError(f"{problem}.", text)

    def _clean(self, text: str) -> str:
        """Valid UTF-8 (JSON can spell lone surrogates), with the key, if echoed, hidden."""
        text = text.encode(errors="replace").decode()
        return self._key_as_text.sub("[key]", text) if self._key else text


def connection_problem(config: JudgeConfig) -> str | None:
    """Why a connection to a judge fails, or None; sends no key and gives up after seconds."""
    try:
        with _client(config, {}, httpx.create_ssl_context()) as client:
            client.head(config.base_url, timeout=PROBE_S)
    except UNREACHABLE as error:
        return _unreachable(config, error)
    except httpx.TransportError as error:
        say(f"{config.base_url} takes connections, but not this one ({error}); it is asked anyway.")
    return None


def _adapted(sent: dict[str, Any], refusal: str) -> dict[str, Any]:
    """Parameters for a retry: without one that the refusal names, else without response_format."""
    named = (key for key in ("response_format", "temperature") if key in sent and key in refusal)
    parameters = dict(sent)
    if "max_tokens" in sent and "max_completion_tokens" in refusal:  # OpenAI's newer models
        parameters["max_completion_tokens"] = parameters.pop("max_tokens")
    else:
        parameters.pop(next(named, "response_format"), None)
    return parameters


def _client(config: JudgeConfig, headers: dict[str, str], tls: ssl.SSLContext) -> httpx.Client:
    return httpx.Client(
        headers={"Accept-Encoding": "identity", **headers},
        timeout=config.timeout_s,
        verify=tls,
        trust_env=urlsplit(config.base_url).hostname not in LOOPBACK,  # which needs no proxy
    )


def _unreachable(config: JudgeConfig, error: Exception) -> str:
    return (
        f"cannot connect to {config.base_url} ({error}); start the server or correct "
        "judge.base_url."
    )


def _spellings(key: str) -> re.Pattern[str]:
    """Matches the key as it is and as JSON may spell it, even in JSON within JSON within JSON.

    There any character may be escaped, and the backslash before it again.
    """
    escaped = (rf"(?:\\{{0,7}}{re.escape(c)}|\\{{1,7}}u(?i:{ord(c):04x}))" for c in key)
    return re.compile("".join(escaped))


def _content(body: str, *, shown: str, max_tokens: int) -> str:
    """Returns `choices[0].message.content`, null as ""; an EndpointError has `shown` as `raw`."""
    try:
        choice = json.loads(body)["choices"][0]
        content, end = choice["message"]["content"], choice.get("finish_reason")
        if isinstance(content, list):  # of parts; reasoning is not of type text
            content = "".join(part["text"] for part in content if part["type"] == "text")
    except MALFORMED as error:
        raise EndpointError("the reply is not a chat completion.", shown) from error
    if not isinstance(content, str | None):
        raise EndpointError("the reply's content is not text.", shown)
    if end == "length" and not (content or "").rstrip().endswith("}"):  # again it would be as long
        raise EndpointError(
            f"the reply is cut at judge.max_tokens = {max_tokens}; raise it, above all for a model "
            "that thinks first.",
            shown,
        )
    return content or ""
