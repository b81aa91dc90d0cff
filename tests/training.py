"""Small trainers and modules, built by hand, for tests beneath the command line."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch

from datamodules.instruction import InstructionDataModule
from datamodules.pretraining import PretrainingDataModule
from datamodules.text_classification import SpamDataModule
from pipeline.gpt import GPTConfig
from pipeline.lora import LoRAConfig
from pipeline.training.checkpoint_callback import Checkpoints, DirectoryCheckpointIO
from pipeline.training.lit_classifier import LitClassifier
from pipeline.training.lit_language_model import LitLanguageModel
from pipeline.training.optim import OptimizerConfig

TINY = GPTConfig(
    n_layer=2,
    n_head=2,
    n_kv_head=1,
    n_embd=32,
    block_size=256,
    vocab_size=None,
    norm="rmsnorm",
    norm_eps=1e-5,
    position="rope",
    rope_theta=10_000.0,
    mlp="swiglu",
    mlp_hidden=64,
    bias=False,
    tie_embeddings=True,
    dropout=0.1,
    causal=True,
)
ADAMW = OptimizerConfig(
    name="adamw",
    lr=1e-3,
    final_lr_fraction=0.1,
    warmup_steps=0,
    weight_decay=0.1,
    betas=(0.9, 0.99),
    max_grad_norm=1.0,
)
LORA = LoRAConfig(rank=4, alpha=8, dropout=0.1, targets=["all-linear"], rslora=False, dora=False)


def spam_data(tokenizer: Path, **options: Any) -> SpamDataModule:
    defaults: dict[str, Any] = {
        "source": "bundled:sms",
        "max_length": 64,
        "suffix": "",
        "train_fraction": 0.2,
        "val_fraction": 0.05,
        "balance": False,
        "batch_size": 8,
        "max_tokens": 256,
        "seed": 1,
        "split_seed": 1,
        "num_workers": 0,
    }
    return SpamDataModule(tokenizer=str(tokenizer), **{**defaults, **options})


def instruction_data(tokenizer: Path, **options: Any) -> InstructionDataModule:
    defaults: dict[str, Any] = {
        "source": "bundled:instructions",
        "prompt_style": "alpaca",
        "supervise": "response",
        "max_length": 256,
        "train_fraction": 0.2,
        "val_fraction": 0.05,
        "shuffle_split": True,
        "batch_size": 8,
        "max_tokens": 512,
        "seed": 1,
        "split_seed": 1,
        "num_workers": 0,
    }
    return InstructionDataModule(tokenizer=str(tokenizer), **{**defaults, **options})


def pretraining_data(tokenizer: Path, source: Path, **options: Any) -> PretrainingDataModule:
    defaults: dict[str, Any] = {
        "text_column": "text",
        "block_size": 32,
        "batch_size": 8,
        "max_tokens": 128,
        "val_fraction": 0.1,
        "near_duplicates": None,
        "seed": 1,
        "num_workers": 0,
    }
    return PretrainingDataModule(
        source=[str(source)], tokenizer=str(tokenizer), **{**defaults, **options}
    )


def language_model(**options: Any) -> LitLanguageModel:
    return LitLanguageModel(**{"optimizer": ADAMW, "gpt": TINY, **options})


def classifier(**options: Any) -> LitClassifier:
    return LitClassifier(**{"optimizer": ADAMW, "gpt": TINY, "trainable": "all", **options})


def after_a_validation() -> Any:
    """A trainer as callbacks see it between steps."""
    return SimpleNamespace(
        sanity_checking=False,
        state=SimpleNamespace(fn="fit"),
        world_size=1,
        global_step=7,
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
    )


class Losses(pl.Callback):
    """Collects the loss of every step, and the ids of its samples."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.sample_ids: list[list[int]] = []

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, i: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        ids = torch.cat([micro_batch["sample_ids"] for micro_batch in batch])
        self.sample_ids.append(sorted(ids.tolist()))


def fit(
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    folder: Path,
    *,
    ckpt_path: Path | None = None,
    callbacks: Sequence[pl.Callback] = (),
    every_n_steps: int = 1_000,
    plugins: Sequence[Any] = (),
    accelerator: str = "cpu",
    logger: Any = False,
    **options: Any,
) -> tuple[pl.Trainer, Losses]:
    """Trains, seeded; Lightning's own bars and files left out."""
    pl.seed_everything(1, verbose=False)
    losses = Losses()
    trainer = pl.Trainer(
        accelerator=accelerator,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=str(folder),
        plugins=[DirectoryCheckpointIO(), *plugins],
        callbacks=[Checkpoints(every_n_steps, "val/loss", "min"), losses, *callbacks],
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path and str(ckpt_path))
    return trainer, losses
