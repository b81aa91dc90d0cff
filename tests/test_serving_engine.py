"""The serving engine: who waits, who is batched together, and what clients hear when it fails."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipeline.decoding.generate import Batch, generate
from pipeline.decoding.sampling import Sampling
from pipeline.gpt import GPT
from pipeline.serving import engine as engine_module
from pipeline.serving.engine import Busy, Engine, EngineError, Limits, Piece
from pipeline.workers import Workers

MakeGPT = Callable[..., GPT]
SETTINGS = Sampling(max_new_tokens=20)
PROMPTS = [[5, 6, 7], [11], list(range(20, 33)), [50, 3], [2, 2]]


class Asked:
    """A text that was asked for, and the pieces of it that came."""

    def __init__(self, engine: Engine, prompt: list[int], settings: Sampling = SETTINGS) -> None:
        self.pieces: queue.Queue[Piece] = queue.Queue()
        self.request = engine.submit(prompt, settings, self.pieces.put)

    def whole(self) -> list[int]:
        tokens = []
        while True:
            piece = self.pieces.get(timeout=30)
            if isinstance(piece.ended, EngineError):
                raise piece.ended
            if piece.token is not None:
                tokens.append(piece.token)
            if piece.ended:
                return tokens


class Gate:
    """A text in the engine's hands that holds it between two steps until it is opened."""

    def __init__(self, engine: Engine, n_new: int = 20) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self.pieces: list[Piece] = []
        engine.submit([9], Sampling(max_new_tokens=n_new), self.deliver)
        assert self.reached.wait(30)

    def deliver(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.reached.set()
        assert self.open.wait(30)


@pytest.fixture
def model(tiny_gpt: MakeGPT) -> GPT:
    return tiny_gpt("llama")


@pytest.fixture
def start(model: GPT) -> Iterator[Callable[..., Engine]]:
    engines = []

    def make(**limits: int) -> Engine:
        given = Limits(**{"max_rows": 4, "max_tokens": 4096, **limits})
        engines.append(Engine(Workers("model"), model, given))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every step to come."""
    seen: list[int] = []
    step = Batch.step

    def counted(self: Batch) -> Any:
        seen.append(len(self.rows))
        return step(self)

    monkeypatch.setattr(Batch, "step", counted)
    return seen


def test_texts_are_what_they_are_alone(start: Callable[..., Engine], model: GPT) -> None:
    engine = start()
    asked = [Asked(engine, prompt) for prompt in PROMPTS]
    assert [a.whole() for a in asked] == [generate(model, [p], SETTINGS)[0] for p in PROMPTS]


@pytest.mark.parametrize(
    ("limits", "most"),
    [({}, 4), ({"max_rows": 2}, 2), ({"max_tokens": 3 * 33}, 3), ({"max_tokens": 33}, 1)],
)
def test_no_more_than_the_limits_at_a_time(
    start: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
    limits: dict[str, int],
    most: int,
) -> None:
    engine, seen = start(**limits), sizes(monkeypatch)
    gate = Gate(engine)
    longest = [Asked(engine, list(range(13))) for _ in range(6)]  # 13 + 20 tokens
    gate.open.set()
    for asked in longest:
        assert len(asked.whole()) == 20
    assert max(seen) == most


def test_the_context_is_the_most_that_a_text_can_hold(start: Callable[..., Engine]) -> None:
    engine = start(max_tokens=64)
    assert len(Asked(engine, [3], Sampling(max_new_tokens=10**9)).whole()) == 63
    with pytest.raises(ValueError, match="there is room for 20; ask for fewer"):
        start(max_tokens=20).submit([3], SETTINGS, print)
    with pytest.raises(ValueError, match="prompt has 64 tokens"):
        engine.submit([3] * 64, SETTINGS, print)


def test_too_many_are_turned_away(start: Callable[..., Engine]) -> None:
    engine = start(max_waiting=2)
    gate = Gate(engine)
    waiting = [Asked(engine, [3]), Asked(engine, [4])]
    with pytest.raises(Busy, match="2 texts are waiting"):
        engine.submit([5], SETTINGS, print)
    engine.cancel(waiting.pop().request)
    waiting.append(Asked(engine, [4]))
    gate.open.set()
    assert [len(asked.whole()) for asked in waiting] == [20, 20]
    assert len(Asked(engine, [5]).whole()) == 20


def test_who_is_cancelled_gets_no_more(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, seen = start(max_rows=2), sizes(monkeypatch)
    gate = Gate(engine)
    running, waiting, last = Asked(engine, [3]), Asked(engine, [4]), Asked(engine, [5])
    engine.cancel(waiting.request)
    gate.open.set()
    running.pieces.get(timeout=30)
    engine.cancel(running.request)
    assert len(last.whole()) == 20
    assert waiting.pieces.empty()
    assert running.pieces.qsize() < 19
    assert max(seen) == 2


def test_what_was_read_is_kept_within_the_limits(
    start: Callable[..., Engine], model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many texts as rows, of those that have ended; they give way to what is written."""
    prompt = list(range(13))
    texts = [[*prompt[:12], 40 + n] for n in range(5)]
    expected = generate(model, texts, SETTINGS)
    held: list[tuple[int, int]] = []
    join = Batch.join

    def noting(batch: Batch, prompts: Any, settings: Any) -> Any:
        held.append((batch.prefixes.n_tokens, len(batch.rows) + len(prompts)))
        return join(batch, prompts, settings)

    monkeypatch.setattr(Batch, "join", noting)
    for n_tokens, most in ((10 * 33, 2 * 32), (2 * 33, 32)):
        engine = start(max_rows=2, max_tokens=n_tokens)
        assert [Asked(engine, text).whole() for text in texts] == expected
        assert [n for n, _ in held] == [0, 32, *[most] * 3]
        held.clear()
    engine = start(max_rows=2, max_tokens=3 * 33)
    for text in texts:
        Asked(engine, text).whole()
    gate = Gate(engine, n_new=30)
    last = [Asked(engine, prompt) for _ in range(2)]
    gate.open.set()
    for asked in last:
        asked.whole()
    # beside the gate and one of the two, 33 tokens of room for each, one text of 32 can be kept
    assert held[-3:] == [(64, 1), (32, 2), (32, 2)]


def test_memory_that_is_held_for_rows_counts(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Places of rows that are gone are given up by halves; no text is kept beside them before."""
    held: list[tuple[int, int]] = []
    join, step = Batch.join, Batch.step

    def joining(batch: Batch, prompts: Any, settings: Any) -> Any:
        n_rows = len(batch.rows) + len(prompts)
        held.append((n_rows, n_rows * 64 + batch.prefixes.n_tokens))
        return join(batch, prompts, settings)

    def stepping(batch: Batch) -> Any:
        held.append((len(batch.rows), batch.n_tokens + batch.prefixes.n_tokens))
        return step(batch)

    monkeypatch.setattr(Batch, "join", joining)
    monkeypatch.setattr(Batch, "step", stepping)
    engine = start(max_rows=8, max_tokens=8 * 64)
    for n in (0, 8):  # the second time there are texts to be given up
        gate = Gate(engine, n_new=2)
        texts = [[40 + n + i] * 40 for i in range(8)]
        asked = [Asked(engine, text, Sampling(4)) for text in texts[:3]]
        asked += [Asked(engine, text, Sampling(24)) for text in texts[3:]]
        gate.open.set()
        for one in asked:
            one.whole()
    assert {n_rows for n_rows, _ in held} >= {8, 5}
    assert max(n_tokens for _, n_tokens in held) == 8 * 64


def test_what_is_wanted_next_is_given_up_last(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(max_rows=2, max_tokens=100)
    texts = [[5] * 30, [6] * 30]
    for text in texts:
        Asked(engine, text, Sampling(2)).whole()
    asked = Asked(engine, [*texts[0], 7], Sampling(20))  # there is room for one beside it
    assert asked.pieces.get(timeout=30).n_cached == 30
    asked.whole()


def test_all_who_are_cancelled_leave_at_whatever_time(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one leaves the batch, another one is cancelled."""
    engine = start()
    gate = Gate(engine, n_new=2)
    first, second = Asked(engine, [3]), Asked(engine, [4])
    leave = Batch.leave

    def leaving(batch: Batch, row: Any) -> None:
        engine.cancel(first.request)
        leave(batch, row)

    monkeypatch.setattr(Batch, "leave", leaving)
    gate.open.set()
    second.pieces.get(timeout=30)
    engine.cancel(second.request)
    seen = sizes(monkeypatch)
    assert len(Asked(engine, [5]).whole()) == 20
    assert seen[-15:] == [1] * 15, "a row that nobody waits for is written"


def test_what_was_not_computed_is_told(start: Callable[..., Engine]) -> None:
    engine = start()
    for n_cached in (0, 12, 12):
        asked = Asked(engine, list(range(13)), Sampling(max_new_tokens=3))
        pieces = [asked.pieces.get(timeout=30) for _ in range(3)]
        assert [piece.n_cached for piece in pieces] == [n_cached, 0, 0]


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What the batch does: joins, by prompts; reads, by tokens; steps, by rows. Pieces are of 8."""
    seen: list[tuple[str, Any]] = []
    join, read, step = Batch.join, Batch.read, Batch.step

    def joining(self: Batch, prompts: Any, settings: Any) -> Any:
        seen.append(("join", [*map(len, prompts)]))
        return join(self, prompts, settings)

    def reading(self: Batch, prompt: Any, n_tokens: int) -> None:
        before = self.n_unread(prompt)
        read(self, prompt, n_tokens)
        seen.append(("read", before - self.n_unread(prompt)))

    def stepping(self: Batch) -> Any:
        seen.append(("step", len(self.rows)))
        return step(self)

    monkeypatch.setattr(Batch, "join", joining)
    monkeypatch.setattr(Batch, "read", reading)
    monkeypatch.setattr(Batch, "step", stepping)
    monkeypatch.setattr(engine_module, "READ_AT_A_TIME", 8)
    return seen


def long_beside_a_gate(
    engine: Engine, n_tokens: int, done: list[Any], settings: Sampling = SETTINGS
) -> Asked:
    gate = Gate(engine)
    done.clear()
    asked = Asked(engine, list(range(20, 20 + n_tokens)), settings)
    gate.open.set()
    return asked


def test_a_long_prompt_is_read_in_pieces_between_steps_of_others(
    start: Callable[..., Engine], model: GPT, done: list[tuple[str, Any]]
) -> None:
    asked = long_beside_a_gate(start(), 30, done)
    first = asked.pieces.get(timeout=30)
    tokens = [first.token, *asked.whole()]
    assert tokens == generate(model, [list(range(20, 50))], SETTINGS)[0]
    assert first.n_cached == 0, "it was read for this text alone"
    pieces = [("step", 1), ("read", 8)] * 3
    assert done[: len(pieces) + 3] == [*pieces, ("step", 1), ("join", [30]), ("step", 2)]


def test_what_others_have_read_counts_and_is_not_read_again(
    start: Callable[..., Engine], done: list[tuple[str, Any]]
) -> None:
    engine = start()
    Asked(engine, list(range(20, 35)), Sampling(1)).whole()  # keeps 15 tokens
    asked = long_beside_a_gate(engine, 40, done)
    assert asked.pieces.get(timeout=30).n_cached == 15
    asked.whole()
    assert [n for what, n in done if what == "read"] == [8, 8, 8]


def test_what_is_read_in_pieces_stays_until_it_joins(
    start: Callable[..., Engine], done: list[tuple[str, Any]]
) -> None:
    """Or else it is read whole at once: there is room for it now, but not beside its own row."""
    for n_tokens, expected in ((2 * 33 + 30, [8, 8, 8]), (2 * 33 + 29, [])):
        asked = long_beside_a_gate(start(max_tokens=n_tokens), 30, done, Sampling(3))
        asked.whole()
        assert [n for what, n in done if what == "read"] == expected


def test_many_prompts_join_a_few_at_a_time(
    start: Callable[..., Engine], model: GPT, done: list[tuple[str, Any]]
) -> None:
    engine = start(max_rows=8)
    gate = Gate(engine)
    done.clear()
    prompts = [[20 + i] * n for i, n in enumerate((3, 4, 2, 7, 8))]
    asked = [Asked(engine, prompt) for prompt in prompts]
    gate.open.set()
    written, joined = [one.whole() for one in asked], [f for f in done if f[0] == "join"]
    assert written == generate(model, prompts, SETTINGS)
    assert joined == [("join", [3, 4]), ("join", [2]), ("join", [7]), ("join", [8])]
    assert all(done[done.index(found) + 1][0] == "step" for found in joined)


def test_alone_nothing_is_read_in_pieces(
    start: Callable[..., Engine], done: list[tuple[str, Any]]
) -> None:
    Asked(start(), list(range(20, 50))).whole()
    assert [found for found in done if found[0] != "step"] == [("join", [30])]


@pytest.mark.parametrize("why", ["its prompt is told", "there is no room to keep it"])
def test_what_cannot_be_in_pieces_is_read_whole(
    start: Callable[..., Engine], model: GPT, done: list[tuple[str, Any]], why: str
) -> None:
    is_told = "told" in why
    settings = Sampling(3, n_likeliest=0, echo=True) if is_told else Sampling(3)
    engine = start() if is_told else start(max_tokens=2 * 33)
    asked = long_beside_a_gate(engine, 30, done, settings)
    written, others = asked.whole(), [found for found in done if found[0] != "step"]
    assert written == generate(model, [list(range(20, 50))], Sampling(3))[0]
    assert others == [("join", [30])]


def broken_after(n: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th step from now fails, once."""
    step, count = Batch.step, iter(range(n, -(10**6), -1))

    def breaking(self: Batch) -> Any:
        if next(count) == 0:
            raise error
        return step(self)

    monkeypatch.setattr(Batch, "step", breaking)


def test_out_of_memory_is_told_and_the_next_are_served(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    broken_after(3, RuntimeError("DefaultCPUAllocator: can't allocate memory"), monkeypatch)
    with pytest.raises(EngineError, match="out of memory; ask for less"):
        Asked(engine, [3]).whole()
    seen = sizes(monkeypatch)
    assert len(Asked(engine, [3]).whole()) == 20
    assert seen == [1] * 19, "rows that were given up take part"
    assert not engine.ended.done()


def test_out_of_memory_while_a_prompt_is_read_in_pieces_is_told(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, done: list[tuple[str, Any]]
) -> None:
    """It is not read again and again, with everybody behind it."""

    def full(self: Batch, prompt: Any, n_tokens: int) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Batch, "read", full)
    engine = start()
    asked = long_beside_a_gate(engine, 30, done)
    behind = Asked(engine, [3])
    with pytest.raises(EngineError, match="out of memory; ask for less"):
        asked.whole()
    assert len(behind.whole()) == 20


def test_any_other_error_ends_it_and_everybody_is_told(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = KeyError("a bug")
    engine = start(max_rows=1)
    gate = Gate(engine)
    waiting = Asked(engine, [4])
    broken_after(1, error, monkeypatch)
    gate.open.set()
    with pytest.raises(EngineError, match="the server has ended"):
        waiting.whole()
    assert engine.ended.exception(30) is error
    assert isinstance(gate.pieces[-1].ended, EngineError)
    with pytest.raises(EngineError, match="the server has ended"):
        engine.submit([4], SETTINGS, print)


def test_closing_tells_who_is_not_done(start: Callable[..., Engine]) -> None:
    engine = start(max_rows=1)
    gate, waiting = Gate(engine), Asked(engine, [4])
    closing = threading.Thread(target=engine.close)
    closing.start()
    gate.open.set()
    closing.join(30)
    with pytest.raises(EngineError, match="the server has ended"):
        waiting.whole()
    assert engine.ended.exception(30) is None
