"""The evaluation stage: responses in; scores, a summary and a report out."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from datamodules.files import write_atomically
from pipeline.evaluation import metrics
from pipeline.evaluation.judge import judge_responses
from pipeline.evaluation.judge_config import JudgeConfig
from pipeline.evaluation.responses import Response, write_lines
from pipeline.evaluation.rubric import RUBRIC_DIGEST
from pipeline.evaluation.summary import Score, Scored, Summary, summarize


def evaluate(
    after: Sequence[Response],
    *,
    before: Sequence[Response] | None,
    judge: JudgeConfig | None,
    directory: Path,
    verdicts: Path,
    lineage: Mapping[str, str],
) -> Summary:
    """Scores a model's responses, or two models' to the same items, and writes the results.

    The responses are written first, so that they are not lost if the judge fails. ValueError if the
    judge cannot be asked.

    Args:
        after: responses of the model to evaluate.
        before: responses to the same items, in the same order, to compare with.
        judge: an LLM judge to ask as well.
        directory: folder for `responses.jsonl` and `scores.jsonl`, `responses-before.jsonl` and
            `scores-before.jsonl` of `before`, `summary.json` and `report.html`.
        verdicts: JSONL file of earlier verdicts, the cache of `judge_responses`.
        lineage: origin of the numbers, for the report: checkpoint, data, settings, ...
    """
    from pipeline.evaluation.report import render_report

    sides = {"": after} if before is None else {"": after, "-before": before}
    for side, responses in sides.items():
        write_lines(directory / f"responses{side}.jsonl", map(asdict, responses))
    scored = {
        side: Scored(responses, score_responses(responses, judge=judge, cache=verdicts))
        for side, responses in sides.items()
    }
    for side, result in scored.items():
        rows = (score.as_row() for column in result.scores.values() for score in column)
        write_lines(directory / f"scores{side}.jsonl", rows)
    summary = summarize(scored[""], before=scored.get("-before"))
    text = json.dumps(summary.as_dict(), indent=2) + "\n"
    write_atomically(directory / "summary.json", text.encode())
    if judge:
        asked = f"{judge.model} at {judge.base_url}, rubric {RUBRIC_DIGEST[:12]}"
        lineage = {**lineage, "judge": asked}
    write_atomically(directory / "report.html", render_report(summary, lineage=lineage).encode())
    return summary


def score_responses(
    responses: Sequence[Response], *, judge: JudgeConfig | None, cache: Path
) -> dict[str, list[Score]]:
    """Every scorer's scores, in the order of the responses, including a judge's if one is given.

    `cache` keeps verdicts, see `judge_responses`. ValueError if the judge cannot be asked.
    """
    scores = {}
    if judge:
        judgements = judge_responses(responses, judge, cache=cache)
        scores["judge"] = [
            Score(r.id, "judge", j.score, j.rationale, j.raw)
            for r, j in zip(responses, judgements, strict=True)
        ]
    texts, references = [r.response for r in responses], [r.reference for r in responses]
    values = {
        "chrf": metrics.chrf(metrics.chrf_counts(texts, references)).tolist(),
        "rouge_l": list(map(metrics.rouge_l, texts, references)),
        "exact_match": list(map(metrics.exact_match, texts, references)),
    }
    for scorer, column in values.items():
        scores[scorer] = [Score(r.id, scorer, v) for r, v in zip(responses, column, strict=True)]
    return scores
