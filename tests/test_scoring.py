"""From responses to scores, summary and report; the judge answers over real HTTP."""

import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path

import pytest

from pipeline.evaluation.judge_config import JudgeConfig
from pipeline.evaluation.report import (
    _best_and_worst,
    before_and_after,
    render_report,
    score_histogram,
)
from pipeline.evaluation.responses import Response, read_responses, write_lines
from pipeline.evaluation.score import evaluate, score_responses
from pipeline.evaluation.summary import Score, Scored, Summary, summarize

GOOD = {"id": 1, "instruction": "Name it.", "reference": "an owl", "response": "an owl"}


class Judge(BaseHTTPRequestHandler):
    """Gives 100 to what is equal to the reference, no verdict on what says "odd", else 20."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        item = json.loads(body["messages"][1]["content"])
        is_right = item["response"] == item["reference_answer"]
        verdict = json.dumps({"rationale": "As I see it.", "score": 100 if is_right else 20})
        content = "Hm <b>four</b>?" if "odd" in item["response"] else verdict
        reply = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def judge() -> Iterator[JudgeConfig]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield JudgeConfig(base_url=f"http://127.0.0.1:{server.server_port}/v1", model="judge-1")
    server.shutdown()
    server.server_close()
    thread.join()


def responses(*texts: str, **fields: object) -> list[Response]:
    return [
        Response(id=n, instruction=f"Do {n}.", reference=f"answer {n}", response=text, **fields)
        for n, text in enumerate(texts)
    ]


def jsonl(*rows: dict[str, object] | str) -> str:
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)


def test_responses_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "new" / "responses.jsonl"
    items = [
        Response(id=1, instruction="Übersetze.", reference="猫头鹰", response='a\u2028b\n"c"\x00'),
        Response(
            id="x",
            instruction="",
            input="in",
            reference="r",
            response="",
            settings={"temperature": 0.0, "checkpoint": None},
            reference_nats=3.5,
            reference_tokens=2,
        ),
    ]
    write_lines(path, map(asdict, items))
    assert read_responses(path) == items
    assert "猫头鹰" in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["responses.jsonl"]


def test_any_models_responses_can_be_read(write: Callable[[str, str | bytes], Path]) -> None:
    content = "\ufeff" + jsonl(GOOD | {"gpt4_score": 3}, "", GOOD | {"id": "1", "input": "x"})
    first, second = read_responses(write("r.jsonl", content.replace("\n", "\r\n")))
    assert (first.id, first.input, second.id, second.input) == (1, "", "1", "x")
    optional = ("input", "settings", "reference_nats", "reference_tokens")
    (third,) = read_responses(write("null.jsonl", jsonl(GOOD | dict.fromkeys(optional))))
    assert third == first


@pytest.mark.parametrize(
    ("second_line", "message"),
    [
        ('{"id": 2, "instruction"', r"r\.jsonl:2: "),
        ("[1, 2]", r"r\.jsonl:2: a list, not a JSON object"),
        ({"id": 2}, r"r\.jsonl:2: missing 'instruction', 'reference', 'response'"),
        (GOOD | {"response": None}, r"r\.jsonl:2: 'response' is None; it must be a string"),
        (GOOD | {"id": True}, r"r\.jsonl:2: 'id' is True"),
        (GOOD | {"id": 2.5}, r"r\.jsonl:2: 'id' is 2\.5"),
        (GOOD, r"r\.jsonl:2: id 1 was already on line 1"),
        (GOOD | {"reference": " "}, r"r\.jsonl:2: 'reference' is empty"),
        (GOOD | {"response": "\ud800"}, r"r\.jsonl:2: \\ud800 is half a character"),
        (GOOD | {"settings": []}, r"r\.jsonl:2: 'settings' is \[\]"),
        (GOOD | {"reference_nats": 1.0}, r"r\.jsonl:2: 'reference_nats' is 1\.0 over None"),
        (GOOD | {"reference_nats": math.nan, "reference_tokens": 1}, r"'reference_nats' is nan"),
        (GOOD | {"reference_nats": math.inf, "reference_tokens": 1}, r"'reference_nats' is inf"),
        (GOOD | {"reference_nats": -1.0, "reference_tokens": 1}, r"'reference_nats' is -1\.0"),
        (GOOD | {"reference_nats": 1.0, "reference_tokens": 0}, r"over 0 'reference_tokens'"),
        (GOOD | {"reference_nats": 10**400, "reference_tokens": 1}, r"it takes a finite sum"),
        (GOOD | {"reference_nats": 1.0, "reference_tokens": 10**400}, r"it takes a finite sum"),
        ("[" * 100_000, r"r\.jsonl:2: "),
    ],
)
def test_a_bad_line_is_named(
    write: Callable[[str, str | bytes], Path], second_line: dict[str, object] | str, message: str
) -> None:
    path = write("r.jsonl", jsonl(GOOD, second_line))
    with pytest.raises(ValueError, match=message):
        read_responses(path)


def test_files_that_are_none(write: Callable[[str, str | bytes], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"latin\.jsonl: byte 20 \(0xe9\) is not UTF-8"):
        read_responses(write("latin.jsonl", '{"id": 1, "input": "é"}\n'.encode("latin-1")))
    with pytest.raises(ValueError, match="holds no responses"):
        read_responses(write("empty.jsonl", "\n\n"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_responses(tmp_path / "nowhere.jsonl")


def test_scores_of_every_scorer(judge: JudgeConfig, tmp_path: Path) -> None:
    items = responses("answer 0", "", "odd", "answer 4")
    scores = score_responses(items, judge=judge, cache=tmp_path / "cache.jsonl")
    table = {(name, score.id): score for name, column in scores.items() for score in column}
    assert [score.scorer for score in table.values()] == [name for name, _ in table]
    assert len(table) == 4 * 4
    assert [table["judge", n].score for n in range(4)] == [100.0, 0.0, None, 20.0]
    assert [table["exact_match", n].score for n in range(4)] == [100.0, 0.0, 0.0, 0.0]
    assert [table["chrf", n].score for n in range(3)] == [100.0, 0.0, 0.0]
    assert table["rouge_l", 3].score == pytest.approx(50.0)
    assert table["judge", 2].as_row() == {
        "id": 2,
        "scorer": "judge",
        "score": None,
        "status": "unscored",
        "rationale": "unreadable, also when asked again: it is not one JSON object alone",
        "raw": "Hm <b>four</b>?\n\n[asked again]\n\nHm <b>four</b>?",
    }
    assert table["chrf", 0].as_row()["status"] == "scored"


def test_a_response_is_held_against_its_reference_and_not_the_other_way_round(
    tmp_path: Path,
) -> None:
    """An answer that is right and too short: chrF weighs what is missing, BLEU its brevity."""
    from sacrebleu import corpus_bleu, corpus_chrf

    said, wanted = "the owl sleeps in the barn", "the owl sleeps in the barn all day, and hunts"
    items = [replace(r, reference=wanted) for r in responses(said)]
    scores = score_responses(items, judge=None, cache=tmp_path / "cache.jsonl")
    rows = {
        row.measure: row.after.estimate
        for row in summarize(Scored(items, scores), before=None).rows
    }
    values = {name: estimate.value for name, estimate in rows.items() if estimate}
    chrf = corpus_chrf([said], [[wanted]]).score
    assert values["chrf"] == values["corpus_chrf"] == pytest.approx(chrf)
    assert values["corpus_bleu"] == pytest.approx(corpus_bleu([said], [[wanted]]).score)


def judged(items: list[Response], scores: list[float | None]) -> Scored:
    column = [Score(i.id, "judge", s) for i, s in zip(items, scores, strict=True)]
    return Scored(items, {"judge": column})


def test_unscored_items_are_counted_and_in_no_mean() -> None:
    before = judged(responses("a", "b", "", "d"), [10, None, 0, 30])
    after = judged(responses("a", "b", "c", "d"), [40, 50, None, 60])
    summary = summarize(after, before=before)
    row = summary.rows[0]
    assert row.measure == "judge"
    assert row.before
    assert row.before.estimate
    assert row.after.estimate
    assert row.difference
    assert (row.before.n_scored, row.before.n_unscored, row.before.estimate.value) == (3, 1, 40 / 3)
    assert (row.after.n_scored, row.after.n_unscored, row.after.estimate.value) == (3, 1, 50.0)
    assert (row.n_paired, row.difference.value) == (2, 30.0)  # items 0 and 3
    values = summary.metrics()
    assert (values["before/empty"], values["after/empty"]) == (1, 0)
    assert (values["before/judge_unscored"], values["difference/judge"]) == (1, 30.0)


def test_a_judge_that_scored_nothing() -> None:
    items = responses("a", "b")
    chrf = [Score(item.id, "chrf", 10.0) for item in items]
    scored = judged(items, [None, None])
    summary = summarize(Scored(items, {**scored.scores, "chrf": chrf}), before=scored)
    row = summary.rows[0]
    assert (row.after.estimate, row.difference, row.verdict) == (None, None, "unclear")
    assert summary.headline == "chrf"
    assert "2 unscored" in render_report(summarize(scored, before=None), lineage={})


def test_perplexity_is_over_all_tokens_and_lower_is_better() -> None:
    before = responses(*"abcdef", reference_nats=8.0, reference_tokens=2)
    after = [replace(r, reference_nats=float(1 + r.id), reference_tokens=2) for r in before]
    summary = summarize(Scored(after, {}), before=Scored(before, {}))
    row = next(row for row in summary.rows if row.measure == "perplexity")
    assert row.before
    assert row.before.estimate
    assert row.after.estimate
    assert row.difference
    assert row.before.estimate.value == pytest.approx(math.exp(4))
    assert row.after.estimate.value == pytest.approx(math.exp(21 / 12))
    assert row.difference.value == pytest.approx(math.exp(21 / 12) - math.exp(4))
    assert row.verdict == "better"


def test_nothing_is_better_or_worse_than_what_no_number_says() -> None:
    """Two infinite perplexities: their difference is NaN, and so is its interval."""
    texts = [replace(r, reference_nats=1e6, reference_tokens=1) for r in responses(*"abcdef")]
    rows = summarize(Scored(texts, {}), before=Scored(texts, {})).rows
    (row,) = (row for row in rows if row.measure == "perplexity")
    assert row.difference
    assert math.isnan(row.difference.low)
    assert row.verdict == "unclear"


def test_what_is_not_finite_is_null_in_a_file_and_no_metric() -> None:
    texts = [replace(r, reference_nats=1e6, reference_tokens=1) for r in responses(*"abcdef")]
    summary = summarize(Scored(texts, {}), before=None)
    text = json.dumps(summary.as_dict())
    measures = json.loads(text, parse_constant=pytest.fail)["measures"]
    assert measures["perplexity"]["after"]["estimate"]["value"] is None
    assert measures["corpus_chrf"]["after"]["estimate"]["value"] is not None
    assert "after/corpus_chrf" in summary.metrics()
    assert "after/perplexity" not in summary.metrics()


def test_perplexity_is_of_the_items_that_have_one() -> None:
    first, *others = responses("a", "b", "c", reference_nats=8.0, reference_tokens=2)
    mixed = [replace(first, reference_nats=None, reference_tokens=None), *others]
    rows = summarize(Scored(mixed, {}), before=None).rows
    (row,) = (row for row in rows if row.measure == "perplexity")
    assert row.after.estimate
    assert row.after.estimate.value == pytest.approx(math.exp(4))
    assert (row.after.n_scored, row.after.n_unscored) == (2, 1)


@pytest.mark.parametrize(
    ("n_pairs", "n_questions", "verdict"),
    [(1, 1, "unclear"), (5, 5, "unclear"), (6, 6, "better"), (20, 5, "unclear")],
)
def test_few_questions_tell_nothing(n_pairs: int, n_questions: int, verdict: str) -> None:
    """All of these answers are better, so that an interval never holds 0."""
    before, after = responses(*["no"] * n_pairs), responses(*["answer"] * n_pairs)
    asked = [
        Scored([replace(r, instruction=f"Do {r.id % n_questions}.") for r in side], {})
        for side in (before, after)
    ]
    rows = summarize(asked[1], before=asked[0]).rows
    assert {row.verdict for row in rows if row.measure == "corpus_chrf"} == {verdict}


def test_no_difference_at_all_is_told_from_an_unclear_one() -> None:
    before, after = (Scored(responses(*texts), {}) for texts in ("abcdef", "abcdef"))
    rows = summarize(after, before=before).rows
    assert {row.verdict for row in rows if row.difference} == {"equal"}
    turned = [judged(responses(*"abcdef"), scores * 3) for scores in ([0, 100], [100, 0])]
    (row, *_) = summarize(turned[1], before=turned[0]).rows
    assert row.difference
    assert (row.difference.value, row.verdict) == (0.0, "unclear")


def test_no_exact_match_among_few_is_no_proof_that_there_never_is_one() -> None:
    items = [replace(r, instruction=f"Do {r.id // 2}.") for r in responses("a", "b", "c", "d")]
    scores = {"exact_match": [Score(item.id, "exact_match", 0.0) for item in items]}
    (exact, _, bleu) = summarize(Scored(items, scores), before=None).rows
    assert exact.after.estimate
    assert exact.after.estimate.low == 0.0
    assert exact.after.estimate.high == pytest.approx(100 * (1 - 0.025**0.5))  # of two questions
    assert bleu.after.estimate
    assert bleu.after.estimate.high == 0.0  # it is no mean of items
    (exact, _, bleu) = summarize(Scored(items, scores), before=Scored(items, scores)).rows
    assert exact.difference
    bound = 100 * (1 - 0.025**0.5)
    assert (exact.difference.low, exact.difference.high) == pytest.approx((-bound, bound))
    assert bleu.difference
    assert bleu.difference.low == bleu.difference.high == 0.0


def test_equal_questions_are_one_observation() -> None:
    texts = ["answer 0", "no"] * 10
    alike = [replace(r, instruction="Do it.", reference="answer 0") for r in responses(*texts)]
    for items, is_one in (
        (alike, True),
        ([replace(r, instruction=f"Do {r.id}.") for r in alike], False),
        ([replace(r, input=f"{r.id}") for r in alike], False),
    ):
        before = Scored([replace(r, response="no") for r in items], {})
        rows = summarize(Scored(items, {}), before=before).rows
        (row,) = (r for r in rows if r.measure == "corpus_chrf")
        for estimate in (row.after.estimate, row.difference):
            assert estimate
            assert (estimate.value - estimate.low > 1.0) != is_one
            assert (estimate.value == estimate.low) == is_one, "drawn together"


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_an_evaluation_leaves_its_files(judge: JudgeConfig, tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>{{ 7 * 7 }}<img src=x onerror=alert(1)>"
    before = responses("", "odd\x07", attack, "answer 3", "x" * 5000)
    after = responses("answer 0", "answer 1", attack + "!", "odd one", "answer 4")
    summary = evaluate(
        after,
        before=before,
        judge=judge,
        directory=tmp_path,
        verdicts=tmp_path / "verdicts.jsonl",
        lineage={"checkpoint": "runs/a & b (sha256 1234)", "data": "<none>"},
    )
    files = {path.name for path in tmp_path.iterdir()}
    sides = {f"{kind}{side}.jsonl" for kind in ("responses", "scores") for side in ("", "-before")}
    assert files == sides | {"verdicts.jsonl", "summary.json", "report.html"}
    assert read_responses(tmp_path / "responses.jsonl") == after
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_bytes().splitlines()]
    assert rows == [score.as_row() for score in chain(*summary.after.scores.values())]
    stored = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert stored["measures"]["judge"]["after"]["n_unscored"] == 1
    assert stored["measures"]["judge"]["after"]["estimate"]["value"] == (100 + 100 + 20 + 100) / 4
    assert (stored["n_empty_before"], stored["n_empty_after"]) == (1, 0)
    earlier = (tmp_path / "scores-before.jsonl").read_bytes().splitlines()
    assert summary.before
    written = [score.as_row() for score in chain(*summary.before.scores.values())]
    assert [json.loads(row) for row in earlier] == written

    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert page.tags.count("svg") == 2
    assert all(link.startswith("#") for link in page.links)
    assert "url(http" not in html
    assert "@media screen and (prefers-color-scheme: dark)" in html, "paper is white"
    for shown in (attack, "runs/a & b (sha256 1234)", "<none>", "Hm <b>four</b>?", "␇"):
        assert shown in page.text
    assert f"judge-1 at {judge.base_url}" in page.text
    assert re.search(r"▲ better|unclear", page.text)
    assert page.text.index("Best items") < page.text.index("Worst items")
    assert "2 without a score" in page.text
    assert "x" * 2001 not in html


def evaluated(items: list[Response], folder: Path, judge: JudgeConfig | None = None) -> Summary:
    return evaluate(
        items,
        before=None,
        judge=judge,
        directory=folder,
        verdicts=folder / "verdicts.jsonl",
        lineage={},
    )


def test_an_id_is_a_text_of_others_too(tmp_path: Path) -> None:
    (item,) = responses("answer 0")
    evaluated([replace(item, id="\a" + "x" * 5000)], tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "␇x" in html
    assert "x" * 2001 not in html


def test_a_report_of_one_model(tmp_path: Path) -> None:
    items = responses("answer 0", "answer two", "no")
    evaluated(items, tmp_path)
    assert not list(tmp_path.glob("*-before*"))
    stored = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert {row["verdict"] for row in stored["measures"].values()} == {None}
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 1
    assert "before" not in page.text
    best, worst = page.text.split("Worst items")
    assert "answer 0" in best.split("Best items")[1]
    assert "Do 2." in worst


def test_the_responses_survive_a_missing_judge(tmp_path: Path) -> None:
    nobody = JudgeConfig(base_url="http://127.0.0.1:9/v1", model="m", max_attempts=1)
    with pytest.raises(ValueError, match=r"judge\.base_url"):
        evaluated(responses("a"), tmp_path, judge=nobody)
    assert len(read_responses(tmp_path / "responses.jsonl")) == 1


def test_figures_hold_every_scored_item() -> None:
    before = judged(responses(*"abcde"), [0, 10, None, 100, 40])
    after = judged(responses(*"abcde"), [100, 10, 50, 0, 60])
    summary = summarize(after, before=before)
    (axes,) = before_and_after(summary).axes
    assert axes.get_title() == "2 better, 1 worse, 1 equal"
    heights = [patch.get_height() for patch in score_histogram(summary).axes[0].patches]
    assert sum(heights) == 4 + 5
    few = score_histogram(summarize(judged(responses(*"ab"), [10, 60]), before=None))
    assert all(tick == round(tick) for tick in few.axes[0].get_yticks())


def test_the_best_and_the_worst_are_shown() -> None:
    """By the judge, of equals by chrF; what it did not score is neither."""
    items = responses("one", "two", "three", "four")
    chrf = [Score(r.id, "chrf", s) for r, s in zip(items, (2.0, 0.0, 1.0, 99.0), strict=True)]
    scored = Scored(items, {**judged(items, [50, 90, 50, None]).scores, "chrf": chrf})
    best, worst = _best_and_worst(summarize(scored, before=None))
    assert [example["response"].response for example in best] == ["two"]
    assert [example["response"].response for example in worst] == ["three", "one"]


def test_real_responses(real_data: Path, tmp_path: Path) -> None:
    """100 responses of another model, whose GPT-4 scores the text metrics ought to follow."""
    path = real_data / "judge" / "gpt4-scored-responses.jsonl"
    items = read_responses(path)
    assert len(items) == 100
    gpt4 = [json.loads(line)["gpt4_score"] for line in path.read_text("utf-8").splitlines()]
    summary = evaluated(items, tmp_path)
    chrf = [score.score or 0.0 for score in summary.after.scores["chrf"]]
    from scipy.stats import spearmanr

    assert spearmanr(chrf, gpt4).statistic > 0.5
    values = summary.metrics()
    for measure in ("chrf", "rouge_l", "exact_match", "corpus_chrf", "corpus_bleu"):
        low, value, high = (values[f"after/{measure}{end}"] for end in ("_low", "", "_high"))
        assert 0 < low < value < high < 100
        assert high - low < 40
