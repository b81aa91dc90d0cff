"""Every YAML file in configs/ parses, alone and with every overlay."""

from itertools import product
from pathlib import Path

import pytest
import yaml

from datamodules.step_data_module import StepDataModule
from pipeline.cli import PipelineCLI
from pipeline.stages.chain_config import load_chain
from pipeline.training.lit_step import LitStep

CONFIGS = Path(__file__).parents[1] / "configs"
STAGES = sorted(path for path in CONFIGS.glob("*.yaml") if "trainer:" in path.read_text())
ADAPTERS = CONFIGS / "model" / "lora_classifier.yaml"
SIZES = sorted({*CONFIGS.glob("model/*.yaml")} - {ADAPTERS})
OVERLAYS = SIZES + sorted(CONFIGS.glob("trainer/*.yaml"))
TABLE = CONFIGS / "data" / "table.yaml"
CHAINS = sorted(CONFIGS.glob("run/*.yaml"))


class ParseOnly(PipelineCLI):
    """Parses and stops there."""

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def parse(*words: str) -> PipelineCLI:
    return ParseOnly(
        None,
        model_class=LitStep,
        datamodule_class=StepDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        args=list(words),
    )


def test_there_are_configs() -> None:
    names = {path.stem for path in STAGES}
    assert names == {"pretrain", "spam", "instruct"}
    assert len(OVERLAYS) >= 5
    assert {"quickstart", "book"} <= {path.stem for path in CHAINS}
    everything = set(CONFIGS.rglob("*.yaml"))
    plain = {CONFIGS / "tokenizer.yaml", CONFIGS / "score.yaml"}
    assert everything == {*STAGES, *OVERLAYS, *CHAINS, *plain, ADAPTERS, TABLE}, (
        "a config that no test parses"
    )


@pytest.mark.parametrize("stage", STAGES, ids=lambda path: path.stem)
def test_a_stage_parses(stage: Path) -> None:
    cli = parse("fit", "-c", str(stage))
    assert cli.config.fit.run.name == stage.stem
    assert len(stage.read_text().splitlines()) <= 70


@pytest.mark.parametrize(
    ("stage", "overlay"), product(STAGES, OVERLAYS), ids=lambda path: path.stem
)
def test_a_stage_parses_with_an_overlay(stage: Path, overlay: Path) -> None:
    whole = stage.stem == "pretrain" or overlay.stem == "tiny"
    if overlay.parent.name == "model" and not whole:
        pytest.skip("the size of a model is decided where it is pretrained")
    cli = parse("fit", "-c", str(stage), "-c", str(overlay))
    values = yaml.safe_load(overlay.read_text())
    if "precision" in values:
        assert cli.config.fit.precision == values["precision"]
    if "trainer" in values:
        trainer, given = cli.config.fit.trainer, values["trainer"]
        for key in ("accelerator", "devices", "strategy"):
            value = given.get(key, "auto")
            if isinstance(value, dict):
                assert trainer[key].class_path == value["class_path"]
            else:
                assert trainer[key] == value
    else:
        gpt = values["model"]["init_args"]["gpt"]
        assert {key: getattr(cli.config.fit.model.init_args.gpt, key) for key in gpt} == gpt


def test_a_table_of_ones_own() -> None:
    cli = parse("fit", "-c", f"{CONFIGS}/spam.yaml", "-c", f"{TABLE}", "--data.label_names=[a,b,c]")
    data, spam = cli.config.fit.data, parse("fit", "-c", f"{CONFIGS}/spam.yaml").config.fit.data
    assert data.class_path.endswith(".TextClassificationDataModule")
    assert data.init_args.label_names == ["a", "b", "c"]
    others = {**vars(spam.init_args), "text_column": "text", "label_column": "label"}
    assert {**vars(data.init_args), "label_names": None} == {**others, "label_names": None}


def test_adapters_of_a_classifier() -> None:
    """Those that instructions are learnt with."""
    spam = parse("fit", "-c", f"{CONFIGS}/spam.yaml", "-c", f"{ADAPTERS}").config.fit.model
    assert spam.init_args.trainable == "lora"
    instruct = parse("fit", "-c", f"{CONFIGS}/instruct.yaml").config.fit.model
    assert spam.init_args.lora == instruct.init_args.lora


@pytest.mark.parametrize("chain", CHAINS, ids=lambda path: path.stem)
def test_a_chain_is_whole(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VERDICT", "INSTRUCTIONS"):
        monkeypatch.setenv(name, __file__)  # any that is there
    loaded = load_chain(chain)
    assert "score" in [stage.name for stage in loaded.stages]
