"""Sends a run's journal to MLflow, so that sending a line again changes nothing.

The run directory's `mlflow.json` records what was sent. If it is lost, or the process died in
between, lines are sent again: metrics keep the journal's time, by which the store recognises those
that it has; all else overwrites itself. A run is found again by its id, in a tag.

In MLflow, unlike in the journal, an infinite metric is NaN (its 1.8e308 would spoil every chart),
with a tag `non_finite.<metric>`; steps that a resumed run repeats and parameters that are None are
left out; a changed parameter is a tag `changed.<parameter>`; what is too long is cut.
"""

import json
import math
import posixpath
import re
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import (
    MAX_DATASET_DIGEST_SIZE,
    MAX_DATASET_NAME_SIZE,
    MAX_DATASET_SOURCE_SIZE,
    MAX_ENTITY_KEY_LENGTH,
    MAX_PARAM_VAL_LENGTH,
    MAX_TAG_VAL_LENGTH,
)

from datamodules.files import MALFORMED, write_atomically
from pipeline.console import warn
from pipeline.runs.journal import JOURNAL, read_journal
from pipeline.runs.mlflow_store import REPLICATED, experiment_id, open_store
from pipeline.runs.provenance import redact
from pipeline.runs.run_directory import is_open, read_outcome

_RUN_TAG, _TABLES_TAG = "gpt_pipeline.run", "mlflow.loggedArtifacts"
_NOT_ALLOWED = r"[^\w\-./: ]"  # characters in names
_LINES_AT_ONCE = 500


@dataclass
class _Replicated:
    """What a store already has of a run."""

    store: str
    run_id: str
    offset: int = 0  # bytes of the journal that were sent
    status: str = "RUNNING"
    n_resumed: int = 0
    last: dict[str, list[Any]] = field(default_factory=dict)  # metric -> [step, value]
    last_before: dict[str, list[Any]] = field(default_factory=dict)  # the same, at the last resume


def send_missing(run: Path, uri: str, *, ask: bool) -> int:
    """Sends what a store lacks of a run, its parent first; see `pipeline.runs.tracking.sync`."""
    if not (ask or _is_behind(run, uri)):
        return 0
    client = open_store(uri)
    with FileLock(run / "mlflow.lock"):
        replicated = _attach(client, run, uri)
        if replicated is None:
            return 0
        if not _is_line_start(run / JOURNAL, replicated.offset):  # sent lines are gone
            replicated = _Replicated(replicated.store, replicated.run_id)
        n_lines = 0
        lines = read_journal(run, replicated.offset)
        while some := list(islice(lines, _LINES_AT_ONCE)):
            _send(client, run, uri, replicated, [line for line, _ in some])
            replicated.offset = some[-1][1]
            _remember(run, replicated)
            n_lines += len(some)
        if replicated.status == "RUNNING" and not is_open(run):  # it was killed
            *_, (last, _) = read_journal(run)
            status = "KILLED" if read_outcome(run) is None else "FINISHED"
            _set_status(client, replicated, status, int(last["time"] * 1000))
            _remember(run, replicated)
    return n_lines


def _send(
    client: MlflowClient, run: Path, uri: str, replicated: _Replicated, lines: list[dict[str, Any]]
) -> None:
    batch = _Batch(replicated)
    for line in lines:
        try:
            batch.add(line)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{run / JOURNAL} is damaged ({str(line)[:80]}); take that line out."
            ) from error
    if batch.parent and (parent := _parent_id((run / batch.parent).resolve(), uri)):
        batch.tags["mlflow.parentRunId"] = parent
    batch.send(client, run)


def _is_line_start(journal: Path, offset: int) -> bool:
    with journal.open("rb") as file:
        file.seek(max(0, offset - 1))
        return not offset or file.read(1) == b"\n"


def _is_behind(run: Path, uri: str) -> bool:
    """Whether the store may lack something, as far as the run directory knows."""
    replicated = _remembered(run, uri)
    if replicated is None or replicated.offset != (run / JOURNAL).stat().st_size:
        return True
    return replicated.status == "RUNNING" and not is_open(run)


def _attach(client: MlflowClient, run: Path, uri: str) -> _Replicated | None:
    """What the store has of the run, which is created if need be; None if it was deleted there."""
    if replicated := _remembered(run, uri):
        try:
            deleted = client.get_run(replicated.run_id).info.lifecycle_stage == "deleted"
            return None if deleted else replicated
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    created = next(read_journal(run), None)
    if created is None:
        return None
    experiment = experiment_id(client, run.parent.parent, uri, run.parent.name)
    tags = {_RUN_TAG: created[0].get("run") or run.relative_to(run.parent.parent).as_posix()}
    wanted = f"tags.`{_RUN_TAG}` = '{tags[_RUN_TAG]}'"
    found = client.search_runs([experiment], wanted, ViewType.ALL, max_results=1)
    if found and found[0].info.lifecycle_stage == "deleted":
        return None
    start_ms = int(created[0]["time"] * 1000)
    entity = found[0] if found else client.create_run(experiment, start_ms, tags, run.name)
    return _Replicated(_store_name(run, uri), entity.info.run_id)


def _parent_id(parent: Path, uri: str) -> str | None:
    if not (parent / JOURNAL).exists():
        return None
    send_missing(parent, uri, ask=True)
    replicated = _remembered(parent, uri)
    return replicated.run_id if replicated else None


def _store_name(run: Path, uri: str) -> str:
    """The store as mlflow.json names it: without login, and unaffected if the root is moved."""
    return redact(uri.replace(str(run.parent.parent), "."))


def _remembered(run: Path, uri: str) -> _Replicated | None:
    """What mlflow.json says, if it is about this store and of this version."""
    try:
        replicated = _Replicated(**json.loads((run / REPLICATED).read_text("utf-8")))
    except (FileNotFoundError, *MALFORMED):
        return None
    return replicated if replicated.store == _store_name(run, uri) else None


def _remember(run: Path, replicated: _Replicated) -> None:
    write_atomically(run / REPLICATED, json.dumps(asdict(replicated)).encode())


class _Batch:
    """Lines of one journal, collected by `add`, that `send` writes to a store."""

    def __init__(self, replicated: _Replicated) -> None:
        self.replicated = replicated
        self.parent: str | None = None  # path of the parent run, relative to the run, if named
        self.tags: dict[str, str] = {}
        self._metrics: list[Metric] = []
        self._params: list[tuple[str, str]] = []
        self._datasets: list[DatasetInput] = []
        self._artifacts: dict[str, bool] = {}  # path -> is a table
        self._status: tuple[str, int] | None = None  # and its time, ms

    def add(self, line: dict[str, Any]) -> None:
        """Adds one line; ignores one of an unknown kind."""
        time_ms = int(line["time"] * 1000)
        match line["kind"]:
            case "param":
                self._params += [(k, v) for k, v in line["values"].items() if v != "None"]
            case "metric":
                self._add_metrics(line["values"], line["step"], time_ms)
            case "tag":
                self.tags |= line["values"]
            case "dataset":
                self._add_dataset(line)
            case "artifact":
                self._artifacts[line["path"]] = line["table"]
            case "event":
                self._add_event(line)
            case "status":
                self._status = line["status"], time_ms
                if "reason" in line:
                    self.tags["last_failure"] = line["reason"]

    def _add_metrics(self, values: dict[str, Any], step: int, time_ms: int) -> None:
        for name, value in values.items():
            step_before, value_before = self.replicated.last_before.get(name, (-1, None))
            is_known = 0 < step == step_before or (step, value) == (step_before, value_before)
            if step < step_before or is_known:
                continue
            self.replicated.last[name] = [step, value]
            key, number = _metric_key(name), float(value)
            if math.isinf(number):
                self.tags[f"non_finite.{key}"] = f"{value} at step {step}"
                number = math.nan
            self._metrics.append(Metric(key, number, time_ms, step))

    def _add_dataset(self, line: dict[str, Any]) -> None:
        dataset = Dataset(
            name=line["name"][:MAX_DATASET_NAME_SIZE],
            digest=line["digest"][:MAX_DATASET_DIGEST_SIZE],
            source_type="local",
            source=json.dumps({"uri": line["source"]})[:MAX_DATASET_SOURCE_SIZE],
            profile=json.dumps({"digest": line["digest"], **line["counts"]}),
        )
        self._datasets.append(DatasetInput(dataset))

    def _add_event(self, line: dict[str, Any]) -> None:
        if line["name"] == "stage":  # child runs show it
            return
        if line["name"] not in ("created", "resumed"):
            facts = {key: line[key] for key in line.keys() - {"time", "kind", "name"}}
            self.tags[f"event.{line['name']}"] = json.dumps(facts, sort_keys=True)
            return
        words = re.split(" '?-", line["command"], maxsplit=1)  # a shell's: '--source=["a.txt"]'
        self.tags["mlflow.source.name"] = words[0]  # the UI cuts at slashes
        self.parent = line.get("parent", self.parent)
        if line["name"] == "resumed":
            self.replicated.n_resumed += 1
            self.replicated.last_before = dict(self.replicated.last)
            self.tags["resumed"] = str(self.replicated.n_resumed)

    def send(self, client: MlflowClient, run: Path) -> None:
        """Writes it all to the store, the status last; artifacts come from the run directory."""
        run_id = self.replicated.run_id
        params = self._settle(client.get_run(run_id))
        client.log_batch(
            run_id,
            self._metrics,
            [Param(key, value) for key, value in params.items()],
            [RunTag(_key(name), text[:MAX_TAG_VAL_LENGTH]) for name, text in self.tags.items()],
        )
        if self._datasets:
            try:
                client.log_inputs(run_id, self._datasets)
            except MlflowException:  # a run on the same data was sent at the same time
                client.log_inputs(run_id, self._datasets)
        for name in self._artifacts:
            if (run / name).exists():
                client.log_artifact(run_id, str(run / name), posixpath.dirname(name) or None)
            else:
                warn(f"{run / name} was recorded as an artifact but is gone.")
        if self._status:
            _set_status(client, self.replicated, *self._status)

    def _settle(self, known: Run) -> dict[str, str]:
        """Returns the new parameters; adds the tags that depend on what the store has."""
        params, tags = dict(known.data.params), known.data.tags
        for name, text in self._params:
            value = text[:MAX_PARAM_VAL_LENGTH]
            changed = f"changed.{_key(name)}"
            if params.setdefault(_key(name), value) != value or changed in tags | self.tags:
                self.tags[changed] = value
        if "git.commit" in self.tags:
            self.tags["mlflow.source.git.commit"] = self.tags["git.commit"]
        tables = json.loads(tags.get(_TABLES_TAG, "[]"))
        new = [{"path": path, "type": "table"} for path, table in self._artifacts.items() if table]
        tables += [table for table in new if table not in tables]
        while len(json.dumps(tables)) > MAX_TAG_VAL_LENGTH:
            del tables[0]
        if tables:
            self.tags[_TABLES_TAG] = json.dumps(tables)
        return {key: value for key, value in params.items() if key not in known.data.params}


def _set_status(client: MlflowClient, replicated: _Replicated, status: str, time_ms: int) -> None:
    """Sets RUNNING (again), or a final status and its time."""
    if status == "RUNNING":
        client.update_run(replicated.run_id, status)
    else:
        client.set_terminated(replicated.run_id, status, time_ms)
    replicated.status = status


def _key(name: str) -> str:
    """A name reduced to the characters and the length that MLflow allows."""
    allowed = posixpath.normpath(re.sub(_NOT_ALLOWED, "_", name)).lstrip("./")
    return allowed[:MAX_ENTITY_KEY_LENGTH] or "_"


def _metric_key(name: str) -> str:
    """Like `_key`, but labels in it stay distinct: other characters become their code points."""
    parts = re.sub(_NOT_ALLOWED, lambda found: f"_{ord(found[0]):x}", name).split("/")
    return _key("/".join({"": "_2f", ".": "_2e", "..": "_2e_2e"}.get(p, p) for p in parts))
