"""The next-token loss: shifted once, summed over supervised tokens, exact however it is split."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.layers import cross_entropy as module
from pipeline.layers.cross_entropy import cross_entropy
from pipeline.loss import IGNORE, count_supervised, next_token_loss, next_token_losses

V, C = 7, 5


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (3, 6, C), head (V, C), labels (3, 6): one row in part, one not supervised."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 6, C, generator=generator, requires_grad=True)
    head = torch.randn(V, C, generator=generator, requires_grad=True)
    labels = torch.randint(V, (3, 6), generator=generator)
    labels[1, :4] = IGNORE
    labels[2] = IGNORE
    return hidden, head, labels


def test_against_cross_entropy_of_shifted_logits(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, head, labels = batch
    total, count = next_token_loss(hidden, head, labels)
    logits = hidden[:, :-1] @ head.T
    expected = F.cross_entropy(
        logits.reshape(-1, V), labels[:, 1:].reshape(-1), ignore_index=IGNORE, reduction="sum"
    )
    assert count == 5 + 2 == count_supervised(labels)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(total, (hidden, head))
    wanted = torch.autograd.grad(expected, (hidden, head))
    torch.testing.assert_close(gradients, wanted)  # float32 sums in another order


@pytest.mark.parametrize("chunk", [1, 100, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_have_the_losses_and_gradients_of_the_whole(
    dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(17, 40, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(40, (17,), generator=generator)
    weights = torch.rand(17, generator=generator)
    weights[3] = 0.0
    found = cross_entropy(logits, targets)
    wide = logits.detach().double().requires_grad_()
    exact = F.cross_entropy(wide, targets, reduction="none")
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(found, logits, weights)
    (wanted,) = torch.autograd.grad(exact, wide, weights.double())
    assert found.dtype == torch.float32
    assert gradient.dtype == dtype
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(gradient.double(), wanted, rtol=rounding, atol=1e-7)
    none = cross_entropy(logits[:0], targets[:0])
    assert none.shape == (0,)
    assert not torch.autograd.grad(none.sum(), logits)[0].any()


def test_by_hand() -> None:
    """Position 0 says token 1 with odds 3 to 1; position 1 has no target."""
    hidden = torch.tensor([[[math.log(3.0)], [99.0]]])
    total, count = next_token_loss(hidden, torch.tensor([[0.0], [1.0]]), torch.tensor([[0, 1]]))
    assert count == 1
    assert float(total) == pytest.approx(-math.log(3 / 4))
    one_by_one = next_token_losses(hidden, torch.tensor([[0.0], [1.0]]), torch.tensor([[1, 0]]))
    assert one_by_one.tolist() == pytest.approx([-math.log(1 / 4)])


def test_the_sum_over_micro_batches_is_the_whole(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, head, labels = batch
    total, count = next_token_loss(hidden, head, labels)
    parts = [next_token_loss(h[None], head, y[None]) for h, y in zip(hidden, labels, strict=True)]
    assert sum(n for _, n in parts) == count
    summed = torch.stack([part for part, _ in parts]).sum()
    torch.testing.assert_close(summed, total, rtol=1e-6, atol=0)
    whole = torch.autograd.grad(total, head)
    torch.testing.assert_close(torch.autograd.grad(summed, head), whole)


def test_nothing_supervised_is_zero_and_can_be_differentiated() -> None:
    hidden = torch.randn(1, 4, C, requires_grad=True)
    # the first label is nobody's target
    total, count = next_token_loss(hidden, torch.randn(V, C), torch.tensor([[3, *[IGNORE] * 3]]))
    assert (float(total.detach()), count) == (0.0, 0)
    total.backward()
    assert hidden.grad is not None
    assert (hidden.grad == 0).all()


def test_half_precision_is_reduced_in_float32(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, head, labels = batch
    total, _ = next_token_loss(hidden.bfloat16(), head.bfloat16(), labels)
    assert total.dtype == torch.float32
