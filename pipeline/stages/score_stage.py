"""`score`: a model answers held-out instructions, before and after tuning; both are scored."""

import json
import re
from pathlib import Path
from typing import Any

from datamodules.files import sha256
from pipeline.checkpoint import stem_of
from pipeline.console import say, warn
from pipeline.directories import path_digest
from pipeline.evaluation.endpoint import connection_problem
from pipeline.evaluation.jsonl_cache import JsonlCache
from pipeline.evaluation.judge_config import JudgeConfig
from pipeline.evaluation.report import before_and_after, score_histogram
from pipeline.evaluation.responses import Response, read_responses
from pipeline.evaluation.score import evaluate
from pipeline.evaluation.summary import MIN_QUESTIONS
from pipeline.runs.identity import decisive
from pipeline.runs.run_directory import Run, lines_of, read_outcome
from pipeline.runs.stage_run import mlruns_root, run_once
from pipeline.stages.answering import Answering, answer
from pipeline.weights.fetch import locate

ANSWERS = "answers.jsonl"  # in a run that is unfinished, or lacks verdicts
MEASURES = ("judge", "chrf", "rouge_l", "exact_match", "perplexity")  # in a chain's table
VERDICTS = "verdicts.jsonl"  # beside the experiments: the judges' verdicts of all runs


def score_stage(
    *,
    ckpt: str | None,
    before: str | None,
    responses: Path | None,
    data: dict[str, Any] | None,
    answering: Answering,
    judge: JudgeConfig | None,
) -> None:
    """Scores in a run directory; see `pipeline.commands.score`."""
    if judge is not None:
        judge.check()
    source = str(ckpt or responses)
    if responses and responses.exists() and not responses.is_file():  # a pipe cannot be read twice
        raise ValueError(f"responses: {source} is no file; write what it says into one.")
    content = path_digest(locate(ckpt)) if ckpt else sha256(Path(source))
    options = {
        "source": source,
        "before": before,
        "data": data,
        "split": answering.split,
        "max_new_tokens": answering.max_new_tokens,
        "precision": answering.precision,
        "judge": judge and vars(judge),
    }
    deciding = [decisive(options), content, before and path_digest(locate(before))]

    def make(run: Run) -> None:
        if ckpt is None:
            after, earlier, lineage = read_responses(Path(source)), None, {"responses": source}
            sources = {source: content}
        else:
            if judge is not None and (problem := connection_problem(judge)):
                warn(f"{problem} Only answers that it has judged before can be scored.")
            kept = JsonlCache(_answers(run.path))
            after, earlier, lineage, sources = answer(ckpt, before, data, answering, kept)
        _score(run, after, earlier, judge, {**lineage, "digest": content}, sources)

    report = run_once("score", f"{stem_of(source)}-score", deciding, options, make, "report")
    print(*result_lines(report.parent), sep="\n")
    say(f"report: {report}")


def _answers(run: Path) -> Path:
    """A run's file of answers, taken over from an earlier attempt, which lacked verdicts."""
    path = run / ANSWERS
    first = re.sub(r"(?<=-[0-9a-f]{8})-\d{1,7}$", "", run.name)
    for earlier in run.parent.glob(f"{first}*/{ANSWERS}"):
        if not path.exists():
            earlier.replace(path)
    return path


def _score(
    run: Run,
    after: list[Response],
    earlier: list[Response] | None,
    judge: JudgeConfig | None,
    lineage: dict[str, str],
    sources: dict[str, str],
) -> None:
    """Scores responses, and records the results."""
    cache = mlruns_root() / VERDICTS
    summary = evaluate(
        after, before=earlier, judge=judge, directory=run.path, verdicts=cache, lineage=lineage
    )
    metrics = summary.metrics()
    run.log_metrics(metrics, step=0)
    run.log_tags({f"lineage.{key}": value for key, value in lineage.items()})
    counts = {"answers": len(summary.after.responses)}
    answered = lineage.get("data", lineage["digest"])
    run.log_dataset("responses", answered, counts, ", ".join(sources))
    names = {"responses": "responses.jsonl", "scores": "scores.jsonl", "report": "report.html"}
    before = ("responses-before.jsonl", "scores-before.jsonl") if summary.before else ()
    for name in (*names.values(), *before, "summary.json"):
        run.log_artifact(name)
    run.log_figure(score_histogram(summary), "figures/scores.png")
    if summary.before:
        run.log_figure(before_and_after(summary), "figures/before-and-after.png")
    run.log_table([vars(r) for r in summary.after.responses[:50]], "samples/responses.json")
    outputs = {key: str(run.path / name) for key, name in names.items()}
    asked = [scored for scored in (summary.after, summary.before) if scored]
    verdicts = [
        pair
        for scored in asked
        for pair in zip(scored.scores.get("judge", ()), scored.responses, strict=False)
    ]
    missing = [pair for pair in verdicts if pair[0].score is None]
    if missing:  # an empty response has no verdict only if another has none: that one says why
        first = next(verdict for verdict, response in missing if not response.is_empty)
        warn(
            f"{len(missing)} of {len(verdicts)} verdicts of the judge are missing (see "
            f"the report, such as: {first.rationale}); repeat the command to ask for them again."
        )
    else:
        (run.path / ANSWERS).unlink(missing_ok=True)  # the responses hold them
    run.finish(outputs, metrics, sources, headline(metrics), complete=not missing)


def result_lines(directory: Path) -> list[str]:
    """A finished run's measures as lines: before and after, the difference with its interval."""
    summary = json.loads((directory / "summary.json").read_text("utf-8"))
    outcome, n_items = read_outcome(directory), summary["n_items"]
    assert outcome is not None
    sides = [side for side in ("before", "after") if summary[f"n_empty_{side}"]]
    empty = ", ".join(f"{summary[f'n_empty_{side}']} {side}" for side in sides)
    lines = [f"{n_items} answers, 95 % intervals" + (f"; empty: {empty}" if empty else "")]
    shown = outcome["headline"]
    for values, line in zip(shown, lines_of(shown), strict=True):
        row = summary["measures"][values["metric"].partition(" ")[0]]
        apart, n_paired = row["difference"], row["n_paired"]
        if apart is None or None in apart.values():  # what is not finite is null there
            found = row["after"]["estimate"]
            is_known = found is not None and None not in found.values()
            lines.append(line + (" [{low:.2f}, {high:.2f}]".format(**found) if is_known else ""))
            continue
        of = f" over {n_paired} pairs" if n_paired < n_items else ""
        interval = "{value:+.2f} [{low:+.2f}, {high:+.2f}]".format(**apart)
        is_few = row["n_questions"] < MIN_QUESTIONS
        why = f" (fewer than {MIN_QUESTIONS} different questions)" if is_few else ""
        lines.append(f"{line}, difference {interval}{of}: {row['verdict']}{why}")
    return lines


def headline(metrics: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of the chain's table."""
    unscored = {m: int(metrics.get(f"after/{m}_unscored", 0)) for m in MEASURES}
    return [
        {
            "metric": f"{measure} ({n} unscored)" if (n := unscored[measure]) else measure,
            "before": metrics.get(f"before/{measure}"),
            "after": metrics[f"after/{measure}"],
        }
        for measure in MEASURES
        if f"after/{measure}" in metrics
    ]
