"""Options of Lightning's commands: where they come from, their names, and which are refused."""

import argparse
import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from datamodules.instruction import InstructionDataModule
from datamodules.pretraining import PretrainingDataModule
from datamodules.split_data_module import SplitDataModule
from datamodules.step_data_module import StepDataModule
from datamodules.text_classification import TextClassificationDataModule
from pipeline.arguments import EARLY, early, load_yaml
from pipeline.checkpoint import stem_of
from pipeline.console import say
from pipeline.directories import CHECKPOINTS
from pipeline.gpt import GPTConfig
from pipeline.launchers import n_started
from pipeline.lora import LoRAConfig
from pipeline.runs.run_directory import CONFIG, check_name
from pipeline.runs.stage_run import mlruns_root
from pipeline.training.callbacks import LossSpikes, Throughput
from pipeline.training.checkpoint_callback import Checkpoints, check_monitor
from pipeline.training.lit_classifier import LitClassifier
from pipeline.training.lit_language_model import LitLanguageModel
from pipeline.training.lit_step import LitStep
from pipeline.training.optim import OptimizerConfig
from pipeline.training.sharding import FullySharded

_FROM = (
    "checkpoint of another run to go on from, with its optimizer and its steps: with a larger "
    "trainer.max_steps or max_epochs this makes a finished run longer. For its weights alone: "
    "model.init_from."
)
_MEASURED = "checkpoint, or finished run, to measure; with its options, unless -c gives others."
A_STEP = "here a batch is an optimizer step: set data.batch_size, data.max_tokens for memory."
# trainer options that are refused: name, values that do no harm, what to use instead
_NOT_HERE = (
    ("accumulate_grad_batches", (1,), A_STEP),
    ("fast_dev_run", (False, 0), "it keeps nothing; use check, or trainer.max_steps."),
    ("overfit_batches", (0,), "steps are drawn anew every epoch: give a data.source of few rows."),
    ("reload_dataloaders_every_n_epochs", (0,), "data stay as they are; leave it out."),
    ("gradient_clip_val", (None, 0), "set model.optimizer.max_grad_norm."),
    ("enable_checkpointing", (None, True), "a run goes on from its own; see checkpoints."),
    ("default_root_dir", (None,), "runs lie below GPT_PIPELINE_HOME, or else mlruns: set that."),
)
# trainer options that must not be 0 or false, and what to use instead
_NOT_OFF = {
    "logger": "a run always keeps a journal: leave it out.",
    "val_check_interval": "give the steps between validations, or to have none "
    "trainer.limit_val_batches: 0.",
    "check_val_every_n_epoch": "give the epochs between validations, or null to count "
    "trainer.val_check_interval over epochs.",
}
# callbacks that are refused, and what to use instead
_NO_CALLBACKS = (
    (
        (ModelCheckpoint, OnExceptionCheckpoint),
        "a run writes its checkpoints anyway: set checkpoints.monitor, mode, every_n_steps, "
        "keep_best and keep_last.",
    ),
    (
        (StochasticWeightAveraging, WeightAveraging),
        "a checkpoint holds the weights that were trained, so the average would be lost.",
    ),
    ((BatchSizeFinder, GradientAccumulationScheduler), A_STEP),
    (LearningRateFinder, "it trains outside of the run: give model.optimizer.lr."),
    (ModelPruning, "a checkpoint has no place for masks."),
    ((Checkpoints, LossSpikes, Throughput), "a run has one anyway: leave it out."),
    (BaseFinetuning, "what is trained stays so in a run: set model.trainable, or model.lora."),
)


@dataclass(frozen=True)
class RunConfig:
    """Where a run is kept, and how it resumes.

    Args:
        experiment: name of its folder among those of all runs, and of its experiment in MLflow.
        name: name of the run; a digest of its configuration is added.
        resume: auto resumes from the newest whole checkpoint of the same configuration, if any;
            must requires one; never starts anew.
        allow_changes: resume even if data, model or number of processes have changed.
    """

    experiment: str
    name: str
    resume: Literal["auto", "must", "never"] = "auto"
    allow_changes: bool = False

    def __post_init__(self) -> None:
        check_name(self.experiment, "run.experiment")  # folders: must not lead out of the root
        check_name(self.name, "run.name")


def as_list(value: Any) -> list[Any]:
    """A list of one, several or no values, as Lightning takes plugins and callbacks."""
    return value if isinstance(value, list) else [] if value is None else [value]


def check_precision(words: Sequence[str]) -> None:
    """ValueError if trainer.precision is given on its own: it follows from `precision`.

    The configuration that a run keeps has both.
    """
    parser = argparse.ArgumentParser(**EARLY)
    parser.add_argument("-c", "--config", action="append", default=[], type=Path)
    parser.add_argument("--trainer.precision", dest="precision")
    given = early(parser, words)
    found = given.precision
    for path in filter(Path.is_file, given.config):
        options = load_yaml(path.read_text(encoding="utf-8"))
        trainer = options.get("trainer")
        if isinstance(trainer, dict) and "precision" not in options:
            found = trainer.get("precision", found)
    if found is not None:
        raise ValueError(f"trainer.precision is {found}; set precision, which it follows from.")


def with_own_help(parser: LightningArgumentParser, command: str) -> LightningArgumentParser:
    """Says of `ckpt_path` what it does here; Lightning's words for it are refused."""
    for action in parser._actions:
        if action.dest == "ckpt_path":
            action.help = _FROM if command in ("fit", "check") else _MEASURED
    return parser


def with_options_of_fit(words: Sequence[str]) -> list[str]:
    """Gives a command on a checkpoint, if it has no config, that of the run that made it.

    Raises:
        ValueError: the checkpoint does not lie in such a run.
    """
    parser = argparse.ArgumentParser(**EARLY)
    parser.add_argument("-c", "--config")
    parser.add_argument("--ckpt_path", type=Path)
    given = early(parser, words)
    if given.config or not given.ckpt_path:
        return list(words)
    absent = "" if given.ckpt_path.exists() else "does not exist: it "
    is_inside = given.ckpt_path.parent.name == CHECKPOINTS
    config = (given.ckpt_path.parents[1] if is_inside else given.ckpt_path) / CONFIG
    if not config.is_file() or "trainer" not in load_yaml(config.read_text(encoding="utf-8")):
        raise ValueError(
            f"ckpt_path {given.ckpt_path} {absent}is not in a run of fit, whose {CONFIG} has "
            "the options; give them, for example -c configs/spam.yaml."
        )
    say(f"options: {config}")
    run, where = config.parent.resolve(), []
    if run.parents[1] == mlruns_root():  # a chain names it otherwise than its config
        where = [f"--run.experiment={run.parent.name}", f"--run.name={stem_of(run)}"]
    return [words[0], f"--config={config}", *where, *words[1:]]


def option_names() -> list[str]:
    """Names of options, without the names of their groups."""
    data = (StepDataModule, SplitDataModule, InstructionDataModule, PretrainingDataModule)
    models = (LitStep, LitClassifier, LitLanguageModel, GPTConfig, LoRAConfig, OptimizerConfig)
    kinds = (pl.Trainer, RunConfig, Checkpoints, *models, *data, TextClassificationDataModule)
    return [name for kind in kinds for name in inspect.signature(kind).parameters]


def check_trainer(options: Any, command: str) -> None:
    """ValueError for trainer options that make no sense here, or for a command."""
    for key, usual, remedy in _NOT_HERE:
        if options[key] not in usual:
            raise ValueError(f"trainer.{key} is {options[key]}; {remedy}")
    for key, remedy in _NOT_OFF.items():
        if options[key] == 0:
            raise ValueError(f"trainer.{key} is {options[key]}; {remedy}")
    if options.num_nodes > 1 and n_started() == 1:
        raise ValueError(
            f"trainer.num_nodes is {options.num_nodes}; processes of several machines are started "
            "by torchrun, or by srun (configs/trainer/slurm.yaml)."
        )
    limit = options.limit_test_batches  # 1 is a batch, 1.0 is all
    is_all = limit is None or (limit == 1 and not isinstance(limit, int))
    if command == "test" and not is_all:
        raise ValueError(
            f"trainer.limit_test_batches is {limit}; a test is of the whole test set, leave it out."
        )
    if command in (splits := {"validate": "val", "predict": "predict"}):
        key = f"limit_{splits[command]}_batches"  # 0 in a fit without validation, say
        if options[key] == 0:
            raise ValueError(
                f"trainer.{key} is {options[key]}, so {command} would see nothing; give 1.0."
            )


def check_processes(trainer: pl.Trainer) -> None:
    """ValueError for processes that would train independently, or share this one's open run."""
    n_processes = n_started()
    if n_processes > 1 and n_processes != trainer.world_size:
        raise ValueError(
            f"{n_processes} processes were started, but trainer.devices, num_nodes and strategy "
            f"make {trainer.world_size} of them: add -c configs/trainer/ddp.yaml (or fsdp2.yaml) "
            "with trainer.devices as many as there are on a node, or start one."
        )
    strategy = trainer.strategy
    if type(strategy) not in (SingleDeviceStrategy, DDPStrategy, FullySharded):
        raise ValueError(
            f"trainer.strategy is {type(strategy).__name__}, under which gradients would be those "
            "of a process alone; give ddp, or configs/trainer/fsdp2.yaml to share out the weights."
        )
    if trainer.world_size > 1 and getattr(trainer, "_val_check_time_interval", None):
        raise ValueError(
            "trainer.val_check_interval is a time, at which each process would look at a clock of "
            "its own; give steps."
        )
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise ValueError(
            "trainer.strategy forks or spawns its processes, which cannot share an open run; give "
            "ddp, which starts the command again."
        )


def check_callbacks(callbacks: Sequence[pl.Callback]) -> None:
    """Makes early stopping judge a validation before its checkpoint, which stores the verdict.

    Raises:
        ValueError: a callback is not supported here.
    """
    for callback in callbacks:
        for kinds, remedy in _NO_CALLBACKS:
            if isinstance(callback, kinds):
                raise ValueError(f"trainer.callbacks has {type(callback).__name__}; {remedy}")
        if isinstance(callback, EarlyStopping):
            if callback._check_on_train_epoch_end:
                raise ValueError(
                    "EarlyStopping.check_on_train_epoch_end is true; a resumed run would not know "
                    "what was seen there: leave it out."
                )
            check_monitor(callback.monitor, "EarlyStopping.monitor")
            callback._check_on_train_epoch_end = False
    stateful = [c for c in callbacks if type(c).state_dict is not pl.Callback.state_dict]
    for key, n in Counter(callback.state_key for callback in stateful).items():
        if n > 1:
            raise ValueError(
                f"trainer.callbacks has {n} times {key}, and a checkpoint one place for its state; "
                "keep one."
            )
