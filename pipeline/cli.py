"""`fit`, `validate`, `test` and `predict`: LightningCLI, each run in a directory of its own."""

import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from datamodules.files import digest
from datamodules.step_data_module import StepDataModule
from datamodules.text_classification import TextClassificationDataModule
from pipeline.arguments import one_line
from pipeline.checkpoint import newest_valid
from pipeline.console import say
from pipeline.directories import CHECKPOINTS, path_digest
from pipeline.failures import explain
from pipeline.hardware import available_memory_bytes, resolve_precision
from pipeline.resume import earlier_like
from pipeline.runs.identity import decisive
from pipeline.runs.reuse import Attempt, find_run, what_changed
from pipeline.runs.run_directory import AlreadyFinished, Run, lines_of, read_outcome
from pipeline.runs.stage_run import RUN_VARIABLE, mlruns_root, open_run
from pipeline.training.callbacks import LossSpikes, Throughput
from pipeline.training.checkpoint_callback import Checkpoints, DirectoryCheckpointIO
from pipeline.training.classifier_report import read_rival, report_classifier
from pipeline.training.lit_model import check_context
from pipeline.training.lit_step import LitStep
from pipeline.training.memory import GIB
from pipeline.training.optim import check_warmup
from pipeline.training.options import (
    RunConfig,
    as_list,
    check_callbacks,
    check_precision,
    check_processes,
    check_trainer,
    option_names,
    with_options_of_fit,
    with_own_help,
)
from pipeline.training.progress import ProgressDisplay, quiet_libraries
from pipeline.training.reports import (
    PREDICTIONS,
    Report,
    hand_over,
    log_predictions,
    prediction_rows,
    report_fit,
    report_language_model,
)
from pipeline.training.run_logger import RunLogger
from pipeline.weights.fetch import PACKAGED, locate
from pipeline.weights.reading import is_foreign, tokenizer_of

EXIT_TERMINATED = 128 + 15
RAISE = {"exit_on_error": False, "allow_abbrev": False}  # errors become one line, in __main__
NO_CONFIG = "options come from a YAML file; give one, for example -c configs/pretrain.yaml."
TrainingPrecision = Literal["auto", "32-true", "bf16-mixed", "16-mixed"]


class PipelineCLI(LightningCLI):
    """LightningCLI with a run directory, runs that resume by themselves, and one-line errors."""

    help: ClassVar[dict[str, str]] = {}  # usage and description, where they are not Lightning's

    def __init__(self, stack: ExitStack, **options: Any) -> None:
        self.stack = stack  # ends the run, well or not
        self.name = options["args"][0]
        own = {**RAISE, "prog": "python -m pipeline"}
        parsers = {**own, self.name: {**RAISE, **self.help}}
        super().__init__(parser_kwargs=parsers, **options)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the one asked for: making the parsers of all four takes longer than parsing."""
        return {self.name: super().subcommands()[self.name]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """`run`, `checkpoints` and `precision` beside Lightning's own groups."""
        parser.add_argument("--run", type=RunConfig, help="Where the run is kept.")
        parser.add_argument(
            "--precision",
            type=TrainingPrecision,
            default="auto",
            help="Numerical precision of training.",
        )
        parser.link_arguments(
            ("precision", "trainer.accelerator"), "trainer.precision", compute_fn=resolve_precision
        )
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_lightning_class_args(Throughput, "throughput")
        if self.name == "test":
            parser.add_argument(
                "--before",
                type=str | None,
                help="A classifier, by its checkpoint, to compare with on the same texts.",
            )

    def _prepare_subcommand_parser(self, *args: Any, **options: Any) -> LightningArgumentParser:
        return with_own_help(super()._prepare_subcommand_parser(*args, **options), self.name)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Takes the words that it is given, whatever those of the process are."""
        check_precision(args)
        if self.name != "fit":
            args = [re.sub("^--ckpt(?=$|=)", "--ckpt_path", word) for word in args]  # as elsewhere
            args = with_options_of_fit(args)
        self.config = parser.parse_args(args)

    def _dump_config(self) -> None:
        """The options in primitives; from YAML, as Lightning has it, "1e5" would be a number."""
        if not hasattr(self, "config_dump"):
            options = {"skip_link_targets": False, "skip_none": False, "format": "json"}
            self.config_dump = json.loads(self.parser.dump(self.config, **options))[self.name]

    def _parse_ckpt_path(self) -> None:
        """Does nothing: a checkpoint never overrides the command line."""

    @property
    def stage(self) -> Namespace:
        """The parsed configuration of this subcommand."""
        return self.config[self.subcommand]

    def before_instantiate_classes(self) -> None:
        """Fills in what follows from a checkpoint, and checks what needs no data."""
        self.take_from_checkpoint()
        stage = self.stage
        model, data = stage.model.init_args, stage.data.init_args
        if stage.ckpt_path is not None and not Path(stage.ckpt_path).is_dir():
            raise ValueError(
                f"ckpt_path is {stage.ckpt_path}; give a checkpoint directory that is there."
            )
        if data.tokenizer is None:
            if model.get("init_from") is None:
                raise ValueError(
                    "data.tokenizer is null and there is no model.init_from to take it from; give "
                    "--model.init_from (a checkpoint, a name such as smollm2-135m-instruct), or "
                    "--data.tokenizer for a new model."
                )
            data.tokenizer = tokenizer_of(model.init_from)
        elif data.tokenizer in PACKAGED or is_foreign(Path(data.tokenizer)):
            data.tokenizer = tokenizer_of(data.tokenizer)
        check_trainer(stage.trainer, str(self.subcommand))

    def take_from_checkpoint(self) -> None:
        """Evaluates the weights at `ckpt_path`; a model without a checkpoint is refused."""
        stage, model = self.stage, self.stage.model.init_args
        if self.subcommand == "fit":
            return
        if stage.ckpt_path is not None:
            model.init_from, model.gpt, stage.ckpt_path = stage.ckpt_path, None, None
        if model.get("init_from") is None:
            raise ValueError(f"there is no checkpoint to {self.subcommand}; give --ckpt_path.")

    def check_parts(self, model: LitStep, data: StepDataModule) -> None:
        """Checks model and data against each other and the trainer's options."""
        if model.gpt_config is not None:
            check_context(data, model.gpt_config.block_size)
        if self.subcommand == "fit" and self.stage.trainer.max_steps >= 0:
            check_warmup(model.optimizer_config.warmup_steps, self.stage.trainer.max_steps)

    def instantiate_classes(self) -> None:
        """Builds the parts; their errors lose jsonargparse's wrapping."""
        try:
            super().instantiate_classes()
        except AlreadyFinished:
            raise
        except (ValueError, TypeError) as error:  # the latter Lightning's, of devices
            raise ValueError(one_line(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Checks the parts against each other, opens the run, builds the trainer around it."""
        assert isinstance(self.model, LitStep)
        assert isinstance(self.datamodule, StepDataModule)
        self.datamodule.check(str(self.subcommand))
        self.check_parts(self.model, self.datamodule)
        options = self._get(self.config_init, "trainer")
        check_callbacks(as_list(options.callbacks))
        self._dump_config()
        self._open_on_first_rank()
        self.datamodule.config = self.config_dump["data"]
        logger = RunLogger(self.run) if self.run else DummyLogger()  # which callbacks look for
        callbacks = [*as_list(options.callbacks), LossSpikes()]
        has_display = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if options.enable_progress_bar is not False and not has_display:
            callbacks = [*callbacks, ProgressDisplay()]
        others = [] if options.logger is True else as_list(options.logger)
        trainer = super().instantiate_trainer(
            logger=[logger, *others],
            default_root_dir=str(self.run_path),
            callbacks=callbacks,
            plugins=[*as_list(options.plugins), DirectoryCheckpointIO()],
            enable_checkpointing=False,
            use_distributed_sampler=False,
            **kwargs,
        )
        check_processes(trainer)
        if isinstance(logger, RunLogger):
            logger.trainer = trainer
        return trainer

    def make_run(self, attempt: Attempt) -> AbstractContextManager[Run]:
        """The run that the command keeps everything in."""
        return open_run(attempt, self.config_dump)

    def _open_on_first_rank(self) -> None:
        """Opens the run in the first of several processes; the others take its path."""
        attempt = self.attempt()
        self.run: Run | None = None
        self.run_path = Path(os.environ.get(RUN_VARIABLE) or attempt.path)
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            run = self.stack.enter_context(self.make_run(attempt))
            run.log_tags({"precision.resolved": self.stage.trainer.precision})
            self.run, self.run_path = run, run.path
            if RUN_VARIABLE not in os.environ:  # for processes that Lightning starts
                os.environ[RUN_VARIABLE] = str(run.path)
                self.stack.callback(os.environ.pop, RUN_VARIABLE)
        elif read_outcome(self.run_path) is not None:  # the first does not wait for the others
            raise AlreadyFinished(self.run_path)

    def attempt(self) -> Attempt:
        """The run directory to use, named by configuration and content of the starting weights."""
        options = {k: v for k, v in self.config_dump.items() if k not in ("run", "config")}
        init_from = self.config_dump["model"]["init_args"].get("init_from")
        given = (init_from, self.stage.ckpt_path, self.stage.get("before"))
        weights = [path_digest(locate(source)) for source in given if source]
        deciding = [self.subcommand, decisive(options), weights]
        stem = self.stage.run.name + ("" if self.subcommand == "fit" else f"-{self.subcommand}")
        name = f"{stem}-{digest(deciding)[:8]}"
        base = mlruns_root() / self.stage.run.experiment / name
        change = partial(what_changed, options=decisive(options))
        return find_run(base, change, anew=self.stage.run.resume == "never")

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs it; libraries' errors for short memory or a dead worker become one line."""
        try:
            super()._run_subcommand(subcommand)
        except (RuntimeError, MemoryError) as error:
            text = explain(
                error,
                max_tokens=self.datamodule.max_tokens,
                needed_gib=self.model.memory_gib() if self.model.model is not None else 0.0,
                free_gib=available_memory_bytes(self.trainer.strategy.root_device) / GIB,
            )
            if text is None:
                raise
            raise ValueError(text) from error

    def before_fit(self) -> None:
        """Resumes from the newest whole checkpoint of this run, else from the given one.

        Raises:
            ValueError: `run.resume` is must and there is none.
        """
        config = self.config_init[self.subcommand]
        self.model.allow_changes = config.run.allow_changes
        if config.run.resume != "never":
            newest = newest_valid(self.run_path / CHECKPOINTS, set_aside=self.run is not None)
            if newest:
                config.ckpt_path = str(newest)
            elif config.ckpt_path is None:
                self._say_what_is_new(must=config.run.resume == "must")
        self.model.ckpt_path = config.ckpt_path
        if config.ckpt_path is not None and self.run:
            say(f"resuming from {config.ckpt_path}")

    def _say_what_is_new(self, *, must: bool) -> None:
        """Says how a shorter or interrupted run of this name differs: there is none to resume."""
        other = earlier_like(self.run_path)
        text = f"; {other}" if other else ""
        if must:
            raise ValueError(
                f"run.resume is must, but {self.run_path / CHECKPOINTS} holds no whole checkpoint"
                f"{text}; give auto to start anew where there is none."
            )
        if other and self.run:
            say(f"starting anew{text}")

    def after_fit(self) -> None:
        """Figures, baselines, outcome."""
        if self.run is None:
            return
        checkpoints = self._get(self.config_init, "checkpoints")
        outputs = checkpoints.outputs(self.trainer)
        report = report_fit(self.run, self.datamodule, checkpoints.best_metrics())
        self._finish(self.run, report, outputs)

    def after_validate(self) -> None:
        """Outcome."""
        if self.run:
            self._finish(self.run, Report(self._metrics()))

    def before_test(self) -> None:
        """Reads the classifier to compare with, if one is given."""
        given = self.stage.before if self.run else None
        self.other = read_rival(given, self.datamodule) if given else None
        if self.run and self.other:
            path = self.other[1].path
            self.run.log_tags({"before": {"path": str(path), "digest": path_digest(path)}})

    def after_test(self) -> None:
        """Scores with intervals, baselines, outcome."""
        if self.run is None:
            return
        data, metrics = self.datamodule, self._metrics()
        if not isinstance(data, TextClassificationDataModule):
            self._finish(self.run, report_language_model(data, metrics))
            return
        training = self.model.earlier[-1] if self.model.earlier else None
        found = self.model.predictions
        report = report_classifier(self.run, data, metrics, found, training, self.other)
        self._finish(self.run, report)

    def predict(self, model: Any, datamodule: Any, **kwargs: Any) -> None:
        """Predictions of the test set, one JSON line a sample, in order."""
        outputs = self.trainer.predict(model, datamodule=datamodule, **kwargs) or []
        if self.run is None:
            return
        log_predictions(self.run, prediction_rows(datamodule, outputs))
        self._finish(self.run, Report({}), {"predictions": str(self.run.path / PREDICTIONS)})

    def _metrics(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.trainer.callback_metrics.items()}

    def _finish(self, run: Run, report: Report, outputs: dict[str, str] | None = None) -> None:
        known = self._metrics()  # and those of a validation belong to its step
        news = {k: v for k, v in report.metrics.items() if k not in known and k[:4] != "val/"}
        if self.subcommand == "fit":  # of the checkpoint that is handed over, to sort runs by
            news |= {f"best/{k[4:]}": v for k, v in report.metrics.items() if k[:4] == "val/"}
        if news:
            run.log_metrics(news, self.trainer.global_step)
        tokenizer = Path(self.config_dump["data"]["init_args"]["tokenizer"])
        run.finish(
            outputs=outputs or {},
            metrics=report.metrics,
            sources={
                **self.datamodule.fingerprint["sources"],
                **({str(tokenizer): path_digest(tokenizer)} if tokenizer.exists() else {}),
            },
            headline=report.headline,
        )
        stream = sys.stderr if outputs else sys.stdout  # a path that is handed over stands alone
        for line in report.lines or lines_of(report.headline):
            print(line, file=stream)
        say(f"finished: {run.path}")
        hand_over(run.path)


def main(args: Sequence[str], cli: type[PipelineCLI] = PipelineCLI) -> None:
    """Runs `fit`, `validate`, `test` or `predict`; a mistake is a ValueError that names the key."""
    quiet_libraries()
    # where a loss is near nothing gradients are denormal, which a CPU multiplies in microcode
    torch.set_flush_denormal(True)
    try:
        with ExitStack() as stack:
            cli(
                stack,
                model_class=LitStep,
                datamodule_class=StepDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                save_config_callback=None,
                args=list(args),
            )
    except (ArgumentError, MisconfigurationException) as error:
        if "are required" in str(error) and not any(re.match("-c|--config", a) for a in args):
            raise ValueError(NO_CONFIG) from error
        raise ValueError(one_line(str(error), option_names(), args)) from error
    except SIGTERMException as error:  # without a code of its own it would exit with 0
        raise SystemExit(EXIT_TERMINATED) from error
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning exits with 1 for it
            raise KeyboardInterrupt from error
        raise
    except AlreadyFinished as finished:
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            again = "--run.resume never starts anew"
            outcome = read_outcome(finished.path)
            if outcome and "last" in outcome["outputs"]:
                last = shlex.quote(outcome["outputs"]["last"])
                again += f", a longer run goes on from it with --ckpt_path {last}"
            say(f"already finished: {finished.path}; {again}")
            hand_over(finished.path)
