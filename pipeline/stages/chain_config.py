"""The YAML of a chain: read and checked as a whole, before anything runs."""

import datetime
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from datamodules.files import at, expanded, sha256
from datamodules.sources import SOURCES
from datamodules.sources import check as check_source
from pipeline.arguments import build, load_yaml, parse
from pipeline.commands import FUNCTIONS
from pipeline.runs.identity import decisive
from pipeline.runs.run_directory import check_name, flat

PATHS = {"tokenizer", "init_from", "ckpt", "ckpt_path", "before", "responses", "file"}  # options
MODELS = {"init_from", "ckpt", "before"}  # of these, those that name a model
FILES = ("file", "responses")  # those that name a file
TO_COME = "to come"  # stands for what an earlier stage hands over
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


@dataclass(frozen=True)
class StageCommand:
    """A command that can be a stage.

    Attributes:
        inputs: key under `inputs` -> its option, and the outputs of an earlier stage that can be
            given to it (the first that the stage has is taken).
        outputs: names of the outputs in its outcome; empty if it hands nothing over.
        schema: to be raised when results of older versions must not be reused.
    """

    inputs: Mapping[str, tuple[str, tuple[str, ...]]]
    outputs: tuple[str, ...] = ()
    schema: int = 1


_TOKENIZER = ("--data.tokenizer", ("tokenizer", "best"))  # a checkpoint holds its tokenizer
_BEFORE = ("--before", ("best",))
_CKPT = {"ckpt": ("--ckpt", ("best",))}
_EVALUATION = StageCommand({"ckpt": ("--ckpt_path", ("best",)), "tokenizer": _TOKENIZER})
STAGE_COMMANDS = {
    "tokenizer train": StageCommand({}, outputs=("tokenizer",)),
    "fit": StageCommand(
        {"init_from": ("--model.init_from", ("best",)), "tokenizer": _TOKENIZER},
        outputs=("best", "last"),
    ),
    "import": StageCommand({}, outputs=("best",)),
    "merge": StageCommand(_CKPT, outputs=("best",)),
    "export": StageCommand(_CKPT, outputs=("exported",)),
    "validate": _EVALUATION,
    "test": replace(_EVALUATION, inputs={**_EVALUATION.inputs, "before": _BEFORE}),
    "predict": replace(_EVALUATION, outputs=("predictions",)),
    "generate": StageCommand(_CKPT),
    "classify": StageCommand(_CKPT, outputs=("labels",)),
    "score": StageCommand(
        {**_CKPT, "before": _BEFORE, "responses": ("--responses", ("responses",))},
        outputs=("responses", "scores", "report"),
    ),
}


@dataclass(frozen=True)
class Reference:
    """An output of an earlier stage, given to an option."""

    stage: str
    output: str
    option: str


@dataclass(frozen=True)
class Stage:
    """One command of a chain, already checked."""

    name: str
    command: str
    configs: tuple[Path, ...]
    overrides: Mapping[str, Any]
    inputs: Mapping[str, Reference]

    def arguments(self, inputs: Mapping[str, str]) -> list[str]:
        """The words after `python -m pipeline`, given the path of each input."""
        return [
            *self.command.split(),
            *(f"--config={path}" for path in self.configs),
            *(f"--{key}={_as_text(value)}" for key, value in self.overrides.items()),
            *(f"{self.inputs[key].option}={path}" for key, path in inputs.items()),
        ]

    def options(self) -> dict[str, Any]:
        """Options from configs and `set`, by dotted key; later ones override earlier ones."""
        identity = self.identity()
        return {k: v for flat in [*identity["config"], identity["set"]] for k, v in flat.items()}

    def paths(self) -> dict[str, Path]:
        """Existing files and folders that options name; inputs and data are recorded elsewhere."""
        given = {key: v for key, v in self.options().items() if key.rpartition(".")[2] in PATHS}
        paths = {key: expanded(value) for key, value in given.items() if isinstance(value, str)}
        return {key: path for key, path in paths.items() if path.exists()}

    def own(self) -> dict[str, Any]:
        """Options, without those that inputs override."""
        taken = {ref.option.lstrip("-") for ref in self.inputs.values()}
        return {key: value for key, value in self.options().items() if key not in taken}

    def models(self) -> list[str]:
        """Models that options name, here or elsewhere, without inputs."""
        given = {key: v for key, v in self.own().items() if key.rpartition(".")[2] in MODELS}
        return [name for name in given.values() if isinstance(name, str)]

    def entries(self) -> list[str]:
        """Sources of the entries that a `score` stage answers."""
        given = [self.options().get(f"data.{key}") for key in SOURCES if self.command == "score"]
        return [name for name in given if isinstance(name, str)]

    def identity(self) -> dict[str, Any]:
        """What decides the result, besides inputs; comments and places of files do not."""
        texts = [os.path.expandvars(_read(path)) for path in self.configs]
        identity: dict[str, Any] = {
            "command": self.command,
            "schema": STAGE_COMMANDS[self.command].schema,
            "config": [decisive(load_yaml(text)) for text in texts],
            "set": {key: _with_variables(v) for key, v in decisive(self.overrides).items()},
        }
        given = [v for flat in [*identity["config"], identity["set"]] for v in flat.values()]
        nested = [Path(v) for v in given if isinstance(v, str) and v.endswith((".yaml", ".yml"))]
        if files := {str(path): sha256(path) for path in nested if path.is_file()}:
            identity["files"] = files  # YAML files that are given as an option
        return identity

    def starts_anew(self) -> bool:
        """Whether `run.resume` is never: nothing is to be resumed or reused."""
        given = [*(load_yaml(_read(path)) for path in self.configs), self.overrides]
        options = [flat(config) for config in given if isinstance(config, dict)]
        told = [own["run.resume"] for own in options if "run.resume" in own]
        return told[-1:] == ["never"]


@dataclass(frozen=True)
class Chain:
    """Stages in their order, in one experiment."""

    path: Path
    experiment: str
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class _ChainYaml:
    experiment: str
    stages: list[dict[str, Any]]


@dataclass(frozen=True)
class _StageYaml:
    name: str
    command: str
    config: list[str] | str = field(default_factory=list)
    set: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)


def load_chain(path: Path, overrides: Sequence[str] = ()) -> Chain:
    """Reads a chain and checks it as a whole.

    Args:
        path: the chain's YAML; the paths of configs in it are relative to its folder.
        overrides: `stage.key=value` each; override the YAML.

    Raises:
        ValueError: the chain has a mistake; the error is one line that names file and key.
        OSError: a file cannot be read.
    """
    try:
        chain = build(_ChainYaml, _expand(load_yaml(_read(path)), "chain"), "chain")
        check_name(chain.experiment, "experiment")
        stages: dict[str, Stage] = {}
        for i, raw in enumerate(chain.stages):
            stage = _stage(build(_StageYaml, raw, f"stages[{i}]"), f"stages[{i}]", path, stages)
            stages[stage.name] = stage
        if not stages:
            raise ValueError("stages: is empty; give at least one.")
        for text in overrides:
            _override(stages, text)
        for stage in stages.values():
            with at(f"stage {stage.name!r}"):
                _check_arguments(stage)
                _check_source(stage)
                _check_files(stage, made_before([*stages.values()], stage))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error
    return Chain(path, chain.experiment, tuple(stages.values()))


def _stage(raw: _StageYaml, key: str, path: Path, earlier: Mapping[str, Stage]) -> Stage:
    check_name(raw.name, f"{key}.name")
    if raw.name in earlier:
        raise ValueError(f"{key}.name: there are two stages {raw.name!r}; rename one.")
    if raw.command not in STAGE_COMMANDS:
        raise ValueError(
            f"{key}.command: {raw.command!r} is not a command of a chain; "
            f"give one of {', '.join(STAGE_COMMANDS)}."
        )
    names = [raw.config] if isinstance(raw.config, str) else raw.config or []
    configs = [Path(os.path.normpath(path.parent / Path(name).expanduser())) for name in names]
    for config in configs:
        if not config.is_file():
            raise ValueError(
                f"{key}.config: {config} does not exist; paths are relative to the chain's folder."
            )
    inputs = {
        name: _reference(raw.command, name, value, f"{key}.inputs.{name}", earlier)
        for name, value in (raw.inputs or {}).items()
    }
    return Stage(raw.name, raw.command, tuple(configs), raw.set or {}, inputs)


def _reference(
    command: str, name: str, value: str, key: str, earlier: Mapping[str, Stage]
) -> Reference:
    known = STAGE_COMMANDS[command].inputs
    if name not in known:
        raise ValueError(f"{key}: {command} takes the inputs {', '.join(known) or '(none)'}.")
    option, wanted = known[name]
    stage, _, output = value.partition(".")
    if stage not in earlier:
        there = ", ".join(earlier) or "none"
        raise ValueError(f"{key}: {stage!r} is not an earlier stage; before this one: {there}.")
    outputs = STAGE_COMMANDS[earlier[stage].command].outputs
    found = [choice for choice in ([output] if output else wanted) if choice in outputs]
    if not found:
        raise ValueError(
            f"{key}: {stage!r} ({earlier[stage].command}) has no output {output or wanted[0]!r}; "
            f"it has {', '.join(outputs) or 'none'}."
        )
    return Reference(stage, found[0], option)


def _override(stages: dict[str, Stage], text: str) -> None:
    target, equals, value = text.partition("=")
    name, _, key = target.partition(".")
    if not equals or not key:
        raise ValueError(f"--set {text}: give stage.key=value.")
    if name not in stages:
        raise ValueError(
            f"--set {text}: no stage is called {name!r}; there are {', '.join(stages)}."
        )
    overrides = {**stages[name].overrides, key: _given(value)}
    stages[name] = replace(stages[name], overrides=overrides)


def _given(text: str) -> Any:
    """An option's value: what YAML makes of a text, or the text if a scalar is respelled."""
    try:
        value = load_yaml(text)
    except yaml.YAMLError:
        return text
    is_nested = isinstance(value, list | dict) and text.lstrip().startswith(("[", "{"))
    return value if is_nested or _as_text(value) == text else text


def _check_arguments(stage: Stage) -> None:
    """Parses a command's arguments; Lightning's, slow to load, are left to `preflight`."""
    if stage.command in FUNCTIONS:
        words = stage.arguments(dict.fromkeys(stage.inputs, TO_COME))
        parse(FUNCTIONS[stage.command], words[len(stage.command.split()) :], stage.command)


def _check_source(stage: Stage) -> None:
    """Checks that the data of a command exist, before hours are spent on earlier stages."""
    options, is_plain = stage.options(), stage.command == "tokenizer train"
    keys = ["source"] if is_plain else [f"data.{key}" for key in SOURCES]
    given = [options.get(key) for key in keys]
    for name in (name for one in given for name in (one if isinstance(one, list) else [one])):
        if isinstance(name, str):  # anything else is the parser's to refuse
            check_source(name)


def _check_files(stage: Stage, made: Sequence[Path]) -> None:
    given = {key: expanded(v) for key in FILES if isinstance(v := stage.own().get(key), str)}
    for key, path in given.items():
        if not (path.is_file() or is_below(path, made)):
            problem = "is no file" if path.exists() else "does not exist"
            raise ValueError(f"{key}: {path} {problem}; give a file that is there.")


def made_before(stages: Sequence[Stage], stage: Stage) -> list[Path]:
    """Paths of `output` options of earlier stages, which will have been written by then."""
    outputs = [s.options().get("output") for s in stages[: stages.index(stage)]]
    return [expanded(output) for output in outputs if isinstance(output, str)]


def is_below(path: Path, folders: Sequence[Path]) -> bool:
    """Whether a path is one of the folders, or lies in one."""
    return any(path.absolute().is_relative_to(folder.absolute()) for folder in folders)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _with_variables(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_variables(item) for item in value]
    return os.path.expandvars(value) if isinstance(value, str) else value


def _as_text(value: Any) -> str:
    if isinstance(value, str | datetime.date):
        return str(value)
    return json.dumps(value, default=str, ensure_ascii=False)  # YAML reads no surrogate pairs


def _expand(value: Any, key: str) -> Any:
    """Replaces `${VAR}` and `${VAR:-default}` in every string below a value."""
    if isinstance(value, dict):
        return {name: _expand(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, f"{key}[{i}]") for i, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        found = os.environ.get(match[1]) or match[2]
        if found is None:
            raise ValueError(
                f"{key}: environment variable {match[1]} is not set; "
                f"set it, or write ${{{match[1]}:-default}}."
            )
        return found

    return VARIABLE.sub(variable, value)
