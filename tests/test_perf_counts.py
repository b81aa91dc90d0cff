"""Counts of what costs time: a regression fails here without a stopwatch.

Counts are for one optimizer step (of several micro-batches, unless stated otherwise), forward and
backward, as PyTorch's dispatcher sees it.
"""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from sqlalchemy import event
from sqlalchemy.engine import Engine
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from datamodules.batching import MicroBatch
from pipeline.decoding.packed import pack
from pipeline.decoding.passes import decode, prefill
from pipeline.gpt import GPT
from pipeline.layers import cross_entropy
from pipeline.layers.unpadding import MULTIPLE
from pipeline.loss import count_supervised, cross_entropies
from pipeline.runs.journal import metric_history
from pipeline.runs.run_directory import Run
from pipeline.training.callbacks import LossSpikes, Throughput
from pipeline.training.run_logger import RunLogger
from tests import training
from tests.journey import CONFIGS, PLAIN, TINY, Journey, outcome_of, said
from tests.machine import needs_f16_products
from tests.training import LORA, fit, instruction_data, language_model, pretraining_data

PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"}
PER_ADAPTED_LINEAR = 3 + 5  # forward: W x, A x, B (A x); backward: 2 for A x, and x, A, B
PER_ATTENTION = 2 + 4  # forward: scores, weighted values; backward: both factors of each
FROZEN_HEAD = 1 + 1  # forward; backward to the hidden states alone
FIRST_LAYER_QKV = 3 * 2  # their input is frozen: two of the five backward products fall away

TRAINING_PASSES = 55  # of a block, forward and backward, without its products
DECODING_PRODUCTS = 4  # q k v; o; gate up; down; where oneDNN lays matrices out
DECODING_OPERATIONS = 40  # of a block, views included; those products and two of attention too


class Operations(TorchDispatchMode):
    """Operations of the dispatcher, each by name with its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[Tensor], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [argument for argument in args if isinstance(argument, Tensor)]
        self.seen.append((func.overloadpacket.__name__, tensors, out))
        return out

    def named(self, *names: str) -> list[tuple[str, list[Tensor], Any]]:
        return [operation for operation in self.seen if operation[0] in names]


class Watch(pl.Callback):
    """Records the operations of one step, and the tokens that each linear layer of blocks sees."""

    def __init__(self, step: int = 2) -> None:
        self.step, self.operations = step, Operations()
        self.tokens: dict[str, int] = Counter()
        self.batch: list[MicroBatch] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx != self.step:
            return
        self.batch = batch
        for name, layer in module.model.named_modules():
            if "blocks." in name and isinstance(layer, nn.Linear):
                layer.register_forward_pre_hook(self._counter(name))
        self.operations.__enter__()

    def _counter(self, name: str) -> Any:
        def count(layer: nn.Module, inputs: tuple[Tensor]) -> None:
            self.tokens[name] += inputs[0].shape[:-1].numel()

        return count

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step == self.step + 1:
            self.operations.__exit__(None, None, None)


def watched(module: Any, data: Any, folder: Path, **options: Any) -> Watch:
    watch = Watch()
    options = {"max_steps": 3, "limit_val_batches": 0, "log_every_n_steps": 1, **options}
    fit(module, data, folder, callbacks=[Throughput(), watch], **options)
    assert len(watch.batch) > 1, "a step of several micro-batches"
    assert watch.operations.seen
    return watch


def n_distinct(micro_batch: MicroBatch) -> int:
    """Real tokens, those that all rows begin with counted once, rounded up."""
    if "attention_mask" not in micro_batch:
        return micro_batch["input_ids"].numel()
    real = [
        row[mask].tolist()
        for row, mask in zip(micro_batch["input_ids"], micro_batch["attention_mask"], strict=True)
    ]
    shared = 0
    while all(len(row) > shared and row[shared] == real[0][shared] for row in real):
        shared += 1
    n = sum(map(len, real)) - (len(real) - 1) * shared
    return -(-n // MULTIPLE) * MULTIPLE


def test_logits_exist_where_there_is_a_loss(tiny: Journey, tmp_path: Path) -> None:
    module = language_model()
    watch = watched(module, instruction_data(tiny.tokenizer), tmp_path)
    head = module.model.head.weight.untyped_storage().data_ptr()
    rows = [
        out.shape[0]
        for _, tensors, out in watch.operations.named("mm")
        if tensors[1].untyped_storage().data_ptr() == head
        and out.shape[-1] == len(module.model.head.weight)
    ]
    assert rows == [count_supervised(micro_batch["labels"]) for micro_batch in watch.batch]


def test_linear_layers_see_distinct_real_tokens(tiny: Journey, tmp_path: Path) -> None:
    """All seven of both blocks, and rotations; padding and what rows share cost attention alone."""
    module = language_model(gpt=replace(training.TINY, dropout=0.0))
    watch = watched(module, instruction_data(tiny.tokenizer), tmp_path)
    expected = sum(map(n_distinct, watch.batch))
    assert expected < sum(micro_batch["input_ids"].numel() for micro_batch in watch.batch)
    assert set(watch.tokens.values()) == {expected}
    assert len(watch.tokens) == 2 * 7
    rotated = [out.shape[:2].numel() for _, _, out in watch.operations.named("addcmul")]
    assert rotated == [n_distinct(batch) for batch in watch.batch for _ in range(2 * 2)]


@pytest.fixture
def adapters(tiny: Journey, tmp_path: Path) -> tuple[Any, Watch]:
    """A step of LoRA under bf16-mixed."""
    lora = replace(LORA, dropout=0.0)
    module = language_model(gpt=None, init_from=str(tiny.best("pretrain")), lora=lora)
    data = instruction_data(tiny.tokenizer)
    return module, watched(module, data, tmp_path, precision="bf16-mixed")


def test_products_under_bf16_are_bf16_and_no_more_than_needed(adapters: tuple[Any, Watch]) -> None:
    module, watch = adapters
    products = watch.operations.named(*PRODUCTS)
    dtypes = Counter(tensors[-1].dtype for _, tensors, _ in products)
    n_layer = module.model.config.n_layer
    per_micro_batch = (
        n_layer * (7 * PER_ADAPTED_LINEAR + PER_ATTENTION) - FIRST_LAYER_QKV + FROZEN_HEAD
    )
    assert dtypes == {torch.bfloat16: per_micro_batch * len(watch.batch)}
    # added where the layer's own product is, forward and backward, and not in a pass of its own
    added = n_layer * 7 * 2 - FIRST_LAYER_QKV // 2
    assert len(watch.operations.named("addmm_")) == added * len(watch.batch)


def test_the_frozen_base_is_never_cast_or_copied(adapters: tuple[Any, Watch]) -> None:
    """It is bf16 already. Norms count too: autocast leaves them alone."""
    module, watch = adapters
    frozen = {
        p.untyped_storage().data_ptr() for p in module.model.parameters() if not p.requires_grad
    }
    assert len(frozen) > 10
    copies = watch.operations.named("_to_copy", "copy_", "clone")
    assert copies, "adapters are float32 and are cast"
    assert not [
        tensors[-1].shape
        for _, tensors, _ in copies
        if tensors[-1].untyped_storage().data_ptr() in frozen
    ]


@pytest.mark.parametrize(
    ("in_f16", "product", "n_more"),
    [
        (False, "_linear_pointwise", 0),
        pytest.param(True, "linear_dynamic_fp16", 2, marks=needs_f16_products),  # two adds
    ],
)
def test_a_block_decodes_in_few_operations(
    tiny_gpt: Callable[..., GPT], in_f16: bool, product: str, n_more: int
) -> None:
    """They cost as much as the products do, where these are small."""
    counts = []
    for n_layer in (2, 3):
        model = pack(tiny_gpt("llama", n_layer=n_layer), in_f16=in_f16)
        cache = prefill(model, [[5, 6, 7], [11]]).cache
        with Operations() as operations:
            decode(model, [[1], [2]], [3, 1], cache)
        counts.append(Counter(name for name, *_ in operations.seen))
    of_block = counts[1] - counts[0]
    assert of_block[product] == DECODING_PRODUCTS
    assert of_block.total() == DECODING_OPERATIONS + n_more


def test_a_block_is_trained_in_few_passes_over_memory(tiny_gpt: Callable[..., GPT]) -> None:
    """Operations on whole rows of states, products and views aside."""
    ids, lengths = torch.arange(60).view(3, 20), torch.tensor([20, 12, 9])
    counts = []
    for n_layer in (2, 3):
        model = tiny_gpt("llama", n_layer=n_layer).train()
        with Operations() as operations:
            model(ids, torch.arange(20) < lengths[:, None]).square().sum().backward()
        counts.append(
            Counter(
                name
                for name, _, out in operations.seen
                if isinstance(out, Tensor)
                and out._base is None
                and out.numel() >= lengths.sum() * model.config.n_embd
            )
        )
    of_block = counts[1] - counts[0]
    for name in PRODUCTS:
        of_block.pop(name, None)
    assert of_block.total() <= TRAINING_PASSES, of_block


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_under_autocast_a_state_is_cast_once_for_all_that_read_it(
    tiny_gpt: Callable[..., GPT], family: str
) -> None:
    """Queries, keys and values; gate and up. Forward, and the gradient once on its way back."""
    counts = []
    for n_layer in (2, 3):
        model = tiny_gpt(family, n_layer=n_layer).train()
        with Operations() as operations:
            with torch.autocast("cpu", torch.bfloat16):
                hidden = model(torch.arange(40).view(2, 20))
            hidden.square().sum().backward()
        states = (2, 20, model.config.n_embd)
        casts = [t[0] for _, t, _ in operations.named("_to_copy") if t[0].shape[-3:] == states]
        counts.append(len(casts))
    read, written = 2, 2  # by attention and MLP; what they add to a residual stream in float32
    assert counts[1] - counts[0] == 2 * read + written


def test_a_loss_makes_no_copy_of_all_logits_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_CHUNK", 5 * 64)
    hidden, head = torch.randn(100, 16).bfloat16(), torch.randn(64, 16).bfloat16()
    with Operations() as operations:
        losses = cross_entropies(hidden.requires_grad_(), head, torch.arange(100) % 64)
        losses.sum().backward()
    made = [out for _, _, out in operations.seen if isinstance(out, Tensor) and out._base is None]
    whole = {out.dtype for out in made if out.numel() >= 100 * 64}
    wide = [out.numel() for out in made if out.dtype == torch.float32]
    assert whole == {torch.bfloat16}
    assert max(wide) == 5 * 64


def test_rows_come_in_few_widths(tiny_gpt: Callable[..., GPT]) -> None:
    """oneDNN generates code for each; a micro-batch of equal rows is as it is."""
    widths, model = set(), tiny_gpt("llama", block_size=60).train()
    for n_tokens in range(25, model.config.block_size + 1):
        mask = torch.arange(n_tokens) < torch.tensor([[n_tokens], [20]])
        with Operations() as operations:
            hidden = model(torch.ones(2, n_tokens, dtype=torch.int64), mask)
        assert hidden.shape == (2, n_tokens, model.config.n_embd)
        attended = (t[0] for name, t, _ in operations.seen if "attention" in name)
        widths |= {queries.shape[2] for queries in attended}
    assert widths == {*range(32, model.config.block_size, 8), model.config.block_size}
    with Operations() as operations:
        model(torch.ones(2, 25, dtype=torch.int64))
    (queries, *_), *_ = (t for name, t, _ in operations.seen if "attention" in name)
    assert queries.shape[2] == 25


def test_the_host_waits_for_few_numbers(tiny: Journey, tmp_path: Path) -> None:
    """Reads of single numbers, which a GPU has to finish all its work for."""
    data = pretraining_data(tiny.tokenizer, tiny.folder / "prose", max_tokens=64)
    watch = watched(language_model(), data, tmp_path, log_every_n_steps=1000)
    n_micro_batches = len(watch.batch)
    reads = len(watch.operations.named("_local_scalar_dense"))
    # a micro-batch: its supervised positions; where it is padded, its real tokens too.
    # a step: whether the gradient's norm is finite; its loss, which the callback of `fit` keeps
    assert not any("attention_mask" in micro_batch for micro_batch in watch.batch)
    assert reads == n_micro_batches + 2


class Counting(pl.Callback):
    """Has a journal count optimizer steps, as the command line does."""

    def __init__(self, journal: RunLogger) -> None:
        self.journal = journal

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.journal.trainer = trainer


def test_values_are_logged_where_they_are_written(
    tiny: Journey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`log` costs the better part of a millisecond, also where Lightning drops the value; what
    nobody watches goes without it to a journal that is alone.
    """
    log, steps = pl.LightningModule.log, []

    def counting(module: pl.LightningModule, name: str, *args: Any, **options: Any) -> None:
        steps.append((name, module.global_step))
        log(module, name, *args, **options)

    monkeypatch.setattr(pl.LightningModule, "log", counting)
    watched = {"train/loss", "perf/tokens_per_s"}
    figures = {"train/lr", "train/grad_norm", "train/skipped_steps", "train/tokens"}
    figures |= {"train/loss_spikes", "perf/model_flops_utilisation"}
    for n_others, names in ((0, watched), (1, watched | figures)):
        steps.clear()
        folder = tmp_path / str(n_others)
        journal = RunLogger(Run.open(folder / "run"))
        trainer, _ = fit(
            language_model(),
            pretraining_data(tiny.tokenizer, tiny.folder / "prose"),
            folder,
            callbacks=[Throughput(), LossSpikes(), Counting(journal)],
            max_steps=7,
            limit_val_batches=0,
            log_every_n_steps=3,
            logger=[journal, CSVLogger(folder)][: 1 + n_others],
        )
        assert sorted(steps) == sorted((name, step) for name in names for step in (3, 6, 7))
        assert float(trainer.callback_metrics["train/loss"]) > 0, "of the last step"
        history = metric_history(journal.run.path)
        for name in watched | figures:
            assert list(history[name]) == [3, 6], name
        if n_others:
            (table,) = folder.glob("**/metrics.csv")
            header, *rows = table.read_text().splitlines()
            assert names <= set(header.split(","))
            assert len(rows) == 2, "all values of a step together"


@contextmanager
def statements_by_thread() -> Iterator[Counter[str]]:
    """How many SQL statements each thread sends to any database."""
    counts: Counter[str] = Counter()

    def count(*_: Any) -> None:
        counts[threading.current_thread().name] += 1

    event.listen(Engine, "before_cursor_execute", count)
    try:
        yield counts
    finally:
        event.remove(Engine, "before_cursor_execute", count)


def test_training_never_waits_for_the_database(tiny: Journey, tmp_path: Path) -> None:
    """The thread that trains appends to the journal; another one sends that to MLflow."""
    with statements_by_thread() as counts:
        code, _, err = said(
            "fit",
            f"--config={CONFIGS}/pretrain.yaml",
            *TINY,
            *PLAIN,
            f"--data.source=[{tiny.folder / 'prose'}]",
            f"--data.tokenizer={tiny.tokenizer}",
            "--data.near_duplicates=null",
            "--trainer.log_every_n_steps=1",
        )
    assert code == 0, err
    assert counts.total() > 0, "MLflow was kept up to date"
    assert threading.main_thread().name not in counts
    (journal,) = (tmp_path / "mlruns" / "default").glob("*/journal.jsonl")
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    logged = {line["step"] for line in lines if "train/loss" in line.get("values", {})}
    assert logged == set(range(1, 9))
    assert outcome_of(tmp_path / "mlruns" / "default")["status"] == "FINISHED"
