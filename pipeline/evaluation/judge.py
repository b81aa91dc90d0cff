"""An LLM as judge, which is asked about every response once, loses no reply, and can resume."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import track

from datamodules.files import MALFORMED, digest
from pipeline.evaluation.endpoint import Endpoint, EndpointError
from pipeline.evaluation.jsonl_cache import JsonlCache
from pipeline.evaluation.judge_config import JudgeConfig
from pipeline.evaluation.responses import Response
from pipeline.evaluation.rubric import (
    RUBRIC_DIGEST,
    VERDICT_SCHEMA,
    again,
    conversation,
    parse_verdict,
)
from pipeline.workers import Workers

BETWEEN_REPLIES = "\n\n[asked again]\n\n"


@dataclass(frozen=True)
class Judgement:
    """Everything the judge said about one item; without a `score`, `rationale` says why."""

    replies: tuple[str, ...]
    score: float | None
    rationale: str
    error: EndpointError | None = field(default=None, compare=False)

    @property
    def raw(self) -> str:
        """The replies as they came."""
        return BETWEEN_REPLIES.join(self.replies)


def judge_responses(
    responses: Sequence[Response], config: JudgeConfig, *, cache: Path
) -> list[Judgement]:
    """Judges every response, in order; an empty one gets 0 without being sent.

    `cache` is a JSONL file of verdicts, read first and appended one by one, so that an interrupted
    evaluation resumes where it stopped; responses without a verdict are asked about again.
    ValueError if nothing could be asked: no connection, no key, or the first request refused.
    """
    config.check()
    keys = [_key(config, response) for response in responses]
    kept = JsonlCache(cache)
    judgements = _known(kept)
    asked = {
        key: response
        for key, response in zip(keys, responses, strict=True)
        if key not in judgements and not response.is_empty
    }
    if asked:
        judgements.update(_ask_all(Endpoint(config, schema=VERDICT_SCHEMA), asked, kept))
    silent = Judgement((), 0.0, "The response is empty; it was not sent to the judge.")
    sent = [judgements[k] for r, k in zip(responses, keys, strict=True) if not r.is_empty]
    if sent and all(judgement.score is None for judgement in sent):  # no mean of empty ones alone
        silent = Judgement((), None, "the response is empty, and no other has a verdict")
    return [silent if r.is_empty else judgements[k] for k, r in zip(keys, responses, strict=True)]


def _known(kept: JsonlCache) -> dict[str, Judgement]:
    """Judgements of earlier evaluations, by key."""
    known = {}
    for key, row in kept.rows.items():
        try:
            replies = tuple(row["replies"])
            known[key] = Judgement(replies, *parse_verdict(replies[-1]))
        except MALFORMED:
            kept.pass_over()
    return known


def _ask_all(
    endpoint: Endpoint, asked: Mapping[str, Response], kept: JsonlCache
) -> Iterator[tuple[str, Judgement]]:
    """Yields judgements as they come; the first item is sent alone, to see if the judge works."""
    (first_key, first), *others = asked.items()
    judgement = _ask_and_keep(endpoint, kept, first_key, first)
    if judgement.error and judgement.error.is_fatal and len(judgement.replies) == 1:
        raise ValueError(judgement.rationale) from judgement.error
    yield first_key, judgement
    workers = Workers("judge", min(endpoint.config.max_concurrency, len(others)))
    futures = {
        workers.submit(_ask_and_keep, endpoint, kept, key, response): key
        for key, response in others
    }
    try:
        console = Console(stderr=True)
        for future in track(as_completed(futures), "judging", len(futures), console=console):
            yield futures[future], future.result()
    finally:  # also after an interrupt: sends no new requests, and ends waits for retries
        endpoint.stop.set()
        for future in futures:
            future.cancel()
        workers.close()


def _ask_and_keep(endpoint: Endpoint, kept: JsonlCache, key: str, response: Response) -> Judgement:
    """Judges an item; a verdict is on disk before the thread goes on to the next item."""
    judgement = _ask(endpoint, response)
    if judgement.score is not None:
        kept.append(key, replies=judgement.replies)
    return judgement


def _ask(endpoint: Endpoint, response: Response) -> Judgement:
    """Asks about an item, and once more if the reply cannot be parsed."""
    messages, problem = conversation(response), ""
    replies: tuple[str, ...] = ()
    for _ in range(2):
        try:
            reply = endpoint.complete(messages)
        except EndpointError as error:
            return Judgement((*replies, error.raw), None, str(error), error)
        replies = (*replies, reply)
        try:
            return Judgement(replies, *parse_verdict(reply))
        except ValueError as error:
            problem = str(error)
        messages = [*messages, *again(reply, problem)]
    return Judgement(replies, None, f"unreadable, also when asked again: {problem}")


def _key(config: JudgeConfig, response: Response) -> str:
    """Digest of what a verdict depends on: judge, rubric and the item's content, but not its id."""
    judge = [config.base_url, config.model, config.max_tokens, RUBRIC_DIGEST]
    content = [response.instruction, response.input, response.reference, response.response]
    return digest([judge, content])
