from collections.abc import Iterable, Sequence
from itertools import chain
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import Tensor, nn

from datamodules.batching import (
    IGNORE,
    MicroBatch,
    Sample,
    Samples,
    StepSampler,
    collate,
    digest_of,
    epoch_generator,
    pad,
    shuffled,
)
from datamodules.step_data_module import StepDataModule
from datamodules.tokenizer import Tokenizer, train_tokenizer

PAD = 99


def sample(sample_id: int, ids: Sequence[int], labels: Sequence[int] | None = None) -> Sample:
    labels = ids if labels is None else labels
    return Sample(sample_id=sample_id, input_ids=torch.tensor(ids), labels=torch.tensor(labels))


@pytest.fixture
def samples() -> list[Sample]:
    """Eight samples of 2 to 12 tokens, in no order of length, their first token unsupervised."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for sample_id, length in enumerate((5, 2, 12, 7, 7, 3, 9, 4)):
        ids = torch.randint(0, 20, (length,), generator=generator).tolist()
        made.append(sample(sample_id, ids, [IGNORE, *ids[1:]]))
    return made


class Module(StepDataModule):
    """The smallest data module on the base class."""

    def __init__(self, samples: list[Sample], tokenizer: Tokenizer, **options: int) -> None:
        own = {"max_tokens": 24, "seed": 1, "num_workers": 0, **options}
        super().__init__(tokenizer=None, **own)
        self.tokenizer = tokenizer
        self.train_set = self.val_set = self.test_set = samples
        self.fingerprint = {"digest": digest_of([samples])}

    def setup(self, stage: str) -> None: ...


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["abc abc abc"], vocab_size=270, min_frequency=2)


def test_samples_are_few_tensors_and_as_they_were(samples: list[Sample]) -> None:
    made = Samples(samples)
    assert len(made) == len(samples)
    for ours, theirs in zip(made, samples, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["sample_id"] == theirs["sample_id"]
        assert all(torch.equal(ours[key], theirs[key]) for key in ("input_ids", "labels"))
    assert made[-1]["sample_id"] == 7
    assert [sample["sample_id"] for sample in made[2:4]] == [2, 3]
    with pytest.raises(IndexError):
        made[8]
    assert digest_of([made]) == digest_of([samples])
    labelled = Samples([Sample(sample_id=3, input_ids=torch.tensor([1, 2]), label=1)])
    assert labelled[0].keys() == {"sample_id", "input_ids", "label"}
    assert list(Samples([])) == []


def test_a_worker_is_given_few_file_descriptors() -> None:
    many = Samples([sample(i, [i, i + 1]) for i in range(2000)])
    process = psutil.Process()
    before = process.num_fds()
    sent = ForkingPickler.dumps(many)
    assert process.num_fds() - before < 10
    del sent


def test_padding_by_hand() -> None:
    batch = pad([sample(7, [1, 2, 3], [IGNORE, 2, 3]), sample(4, [5])], PAD)
    assert batch["sample_ids"].tolist() == [7, 4]
    assert batch["input_ids"].tolist() == [[1, 2, 3], [5, PAD, PAD]]
    assert batch["labels"].tolist() == [[IGNORE, 2, 3], [5, IGNORE, IGNORE]]
    assert batch["attention_mask"].tolist() == [[True, True, True], [True, False, False]]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


def test_rows_of_equal_length_have_no_mask() -> None:
    batch = pad([sample(0, [1, 2]), sample(1, [3, 4])], PAD)
    assert "attention_mask" not in batch


def test_class_labels_by_hand() -> None:
    rows = [
        Sample(sample_id=0, input_ids=torch.tensor([1, 2]), label=1),
        Sample(sample_id=1, input_ids=torch.tensor([3]), label=0),
    ]
    batch = pad(rows, PAD)
    assert batch["label"].tolist() == [1, 0]
    assert "labels" not in batch


def test_a_step_is_cut_to_the_budget_longest_first(samples: list[Sample]) -> None:
    batches = collate(samples, max_tokens=24, pad_id=PAD)
    ids = [batch["sample_ids"].tolist() for batch in batches]
    assert ids == [[2, 6], [3, 4, 0], [7, 5, 1]]  # 2x12, 3x7, 3x4


@pytest.mark.parametrize("max_tokens", [1, 5, 12, 13, 24, 40, 96, 10_000])
def test_every_budget_is_kept_and_no_sample_lost(samples: list[Sample], max_tokens: int) -> None:
    batches = collate(samples, max_tokens, PAD)
    for batch in batches:
        n_rows = len(batch["input_ids"])
        assert batch["input_ids"].numel() <= max_tokens or n_rows == 1
    seen = sorted(i for batch in batches for i in batch["sample_ids"].tolist())
    assert seen == list(range(len(samples)))


def test_no_samples_make_no_micro_batches() -> None:
    assert collate([], 24, PAD) == []


def test_order_is_a_pure_function_of_seed_and_epoch() -> None:
    order = shuffled(100, seed=3)
    assert torch.equal(order(5), shuffled(100, seed=3)(5))
    assert not torch.equal(order(5), order(6))
    assert not torch.equal(order(5), shuffled(100, seed=4)(5))
    before = torch.get_rng_state()
    order(7)
    assert torch.equal(before, torch.get_rng_state())


def test_neighbouring_seeds_share_no_epoch() -> None:
    """A generator seeded by seed + epoch would give (3, 1) and (4, 0) the same order."""
    states = {
        epoch_generator(seed, epoch).initial_seed() for seed in range(20) for epoch in range(20)
    }
    assert len(states) == 400


def test_every_sample_once_an_epoch_and_epochs_differ() -> None:
    sampler = StepSampler(shuffled(10, seed=0), batch_size=4)
    first, second = list(sampler), list(sampler)
    assert [len(step) for step in first] == [4, 4, 2]
    assert len(sampler) == 3
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(10))
    assert first != second


def test_a_resumed_sampler_goes_on_where_the_first_one_was() -> None:
    whole = StepSampler(shuffled(10, seed=0), batch_size=4)
    epochs = [list(whole) for _ in range(3)]
    resumed = StepSampler(shuffled(10, seed=0), batch_size=4, epoch=1, start=2)
    assert len(resumed) == 3  # that of a full epoch, whatever is left of this one
    assert list(resumed) == epochs[1][2:]
    assert list(resumed) == epochs[2]  # the offset counts once
    shrunk = StepSampler(shuffled(10, seed=0), batch_size=4, epoch=1, start=5)
    assert list(shrunk) == epochs[1][2:], "of less data than before the last step is taken"


@pytest.mark.parametrize("n_samples", [10, 9])  # 9: the second rank has nothing in the last step
def test_two_ranks_share_each_step(n_samples: int) -> None:
    def steps(rank: int, world_size: int) -> list[list[int]]:
        order = shuffled(n_samples, seed=0)
        return list(StepSampler(order, batch_size=4, rank=rank, world_size=world_size))

    alone, first, second = steps(0, 1), steps(0, 2), steps(1, 2)
    assert len(first) == len(second) == len(alone)
    for step, own, other in zip(alone, first, second, strict=True):
        assert sorted(own + other) == sorted(step)
        assert 0 <= len(own) - len(other) <= 1


@pytest.mark.parametrize("split", ["train", "val"])
def test_ranks_are_dealt_training_and_validation(
    split: str, samples: list[Sample], tokenizer: Tokenizer
) -> None:
    """Eight samples in steps of three: of the last two ranks have one each, and one has none."""
    seen: list[list[list[int]]] = []
    for rank in range(3):
        module = Module(samples, tokenizer, batch_size=3)
        module.trainer = SimpleNamespace(world_size=3, global_rank=rank)  # type: ignore[assignment]
        loader = getattr(module, f"{split}_dataloader")()
        seen.append([[i for mb in step for i in mb["sample_ids"].tolist()] for step in loader])
    assert [[len(step) for step in rank] for rank in seen] == [[1, 1, 1], [1, 1, 1], [1, 1, 0]]
    assert sorted(i for rank in seen for step in rank for i in step) == list(range(8))
    if split == "val":
        assert seen == [[[0], [3], [6]], [[1], [4], [7]], [[2], [5], []]]


def test_an_empty_set_has_no_steps(tokenizer: Tokenizer) -> None:
    assert list(Module([], tokenizer, batch_size=3).val_dataloader()) == []


class TinyModel(nn.Module):
    """Embedding, one causal mean, head: enough for padding to do harm where it is not masked."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embedding = nn.Parameter(torch.randn(PAD + 1, 8, generator=generator))
        self.head = nn.Parameter(torch.randn(20, 8, generator=generator))

    def loss_sum(self, batch: MicroBatch) -> Tensor:
        embedded = self.embedding[batch["input_ids"]]  # (B, T, 8)
        ramp = torch.arange(1, embedded.shape[1] + 1)[:, None]
        hidden = torch.tanh(embedded.cumsum(1) / ramp)
        logits = hidden[:, :-1] @ self.head.T
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )


def step_gradients(samples: list[Sample], max_tokens: int) -> tuple[list[Tensor], list[int]]:
    model = TinyModel()
    batches = collate(samples, max_tokens, PAD)
    n_supervised = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches)
    for batch in batches:
        (model.loss_sum(batch) / n_supervised).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return [g for g in gradients if g is not None], [len(b["input_ids"]) for b in batches]


@pytest.mark.parametrize("max_tokens", [13, 16, 24, 36, 50])
def test_gradients_do_not_depend_on_the_cut(samples: list[Sample], max_tokens: int) -> None:
    whole, rows = step_gradients(samples, 8 * 12)
    assert rows == [8]  # 1x8
    single, rows = step_gradients(samples, 1)
    assert rows == [1] * 8  # 8x1
    cut, rows = step_gradients(samples, max_tokens)
    assert 1 < len(rows) < 8
    for a, b, c in zip(whole, single, cut, strict=True):
        # the contract's tolerance; float32 sums in another order differ by about 1e-8 here
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
        torch.testing.assert_close(a, c, atol=1e-6, rtol=0)


def test_equal_digests_mean_equal_samples(samples: list[Sample]) -> None:
    digest = digest_of([samples])
    assert digest == digest_of([list(samples)])
    assert digest != digest_of([samples[::-1]])
    assert digest != digest_of([samples[:4], samples[4:]])
    relabelled = [sample(i, s["input_ids"].tolist()) for i, s in enumerate(samples)]
    assert digest != digest_of([relabelled])


def members(loader: Iterable[list[MicroBatch]]) -> list[list[int]]:
    """The samples of each step, whatever its cut."""
    return [sorted(chain(*(batch["sample_ids"].tolist() for batch in step))) for step in loader]


def test_loaders_give_steps(samples: list[Sample], tokenizer: Tokenizer) -> None:
    module = Module(samples, tokenizer, batch_size=3)
    assert len(module.train_dataloader()) == 3
    expected = shuffled(8, seed=1)(0).split(3)
    assert members(module.train_dataloader()) == [sorted(step.tolist()) for step in expected]
    assert members(module.val_dataloader()) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    padding = {
        int(batch["input_ids"][~batch["attention_mask"]].unique())
        for step in module.val_dataloader()
        for batch in step
        if "attention_mask" in batch
    }
    assert padding == {tokenizer.eos_id}


def test_loading_draws_nothing_from_the_global_generator(
    samples: list[Sample], tokenizer: Tokenizer
) -> None:
    module = Module(samples, tokenizer, batch_size=3)
    before = torch.get_rng_state()
    list(module.train_dataloader())
    list(module.val_dataloader())
    assert torch.equal(before, torch.get_rng_state())


def test_a_position_is_taken_up(samples: list[Sample], tokenizer: Tokenizer) -> None:
    module = Module(samples, tokenizer, batch_size=3)
    module.load_state_dict({"epoch": 2, "position": 1})
    expected = [step for epoch in (2, 3) for step in shuffled(8, seed=1)(epoch).split(3)][1:]
    loader = module.train_dataloader()
    found = members(loader) + members(loader)  # the next epoch is a whole one
    assert found == [sorted(step.tolist()) for step in expected]


def test_a_position_moves_into_the_next_epoch(samples: list[Sample], tokenizer: Tokenizer) -> None:
    module = Module(samples, tokenizer, batch_size=3)
    seen = []
    for _ in range(4):
        module.advance(n_steps=3)
        seen.append(tuple(module.state_dict().values()))
    assert seen == [(0, 1), (0, 2), (1, 0), (1, 1)]


@pytest.mark.parametrize("key", ["batch_size", "max_tokens"])
def test_sizes_below_one_are_refused(samples: list[Sample], tokenizer: Tokenizer, key: str) -> None:
    with pytest.raises(ValueError, match=f"data.{key} is 0; give at least 1"):
        Module(samples, tokenizer, **{"batch_size": 1, key: 0})
