"""Schedules at their turning points, decay groups by name, and two optimizers run as one."""

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.gpt import GPT
from pipeline.training.muon import Muon, orthogonalize
from pipeline.training.optim import (
    Chained,
    OptimizerConfig,
    check_warmup,
    learning_rate_factor,
    make_optimizer,
)

MakeGPT = Callable[..., GPT]
ADAMW = OptimizerConfig("adamw", 1e-2, 0.1, 2, 0.1, (0.9, 0.95), 1.0)
MUON = replace(ADAMW, name="muon")


def factor(step: int) -> float:
    return learning_rate_factor(step, warmup_steps=4, total_steps=24, final=0.1)


def test_schedule() -> None:
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(4) == 1.0
    assert factor(14) == pytest.approx((1 + 0.1) / 2)  # half way down
    assert factor(9) == pytest.approx(0.1 + 0.9 * (1 + 2**-0.5) / 2)
    assert factor(24) == pytest.approx(0.1)
    assert factor(1000) == pytest.approx(0.1)
    assert learning_rate_factor(0, warmup_steps=0, total_steps=1, final=0.0) == 1.0


def test_warm_up_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"warmup_steps is 8 .* only 8 steps .*max_steps"):
        check_warmup(8, 8)
    check_warmup(7, 8)
    check_warmup(7, -1)  # a run without an end


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "sgd"}, "name is sgd; give adamw or muon"),
        ({"lr": 0.0}, r"lr is 0\.0; give a positive number"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"final_lr_fraction": 1.5}, r"final_lr_fraction is 1\.5; give a fraction"),
        ({"warmup_steps": -1}, "warmup_steps is -1; give 0 or more"),
        ({"weight_decay": -0.1}, r"weight_decay is -0\.1"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0\.9, 1\.0\); give two numbers in \[0, 1\)"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm is 0\.0"),
    ],
)
def test_refused_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.optimizer\.{message}"):
        replace(ADAMW, **changes)


def names_of(model: nn.Module, groups: list[dict[str, Any]]) -> list[set[str]]:
    names = {p: name for name, p in model.named_parameters()}
    return [{names[p] for p in group["params"]} for group in groups]


def test_matrices_decay_and_vectors_do_not(tiny_gpt: MakeGPT) -> None:
    model = tiny_gpt("gpt2")
    model.position_embedding.requires_grad_(False)
    optimizer = make_optimizer(model, ADAMW)
    decayed, others = names_of(model, optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {group["betas"] for group in optimizer.param_groups} == {ADAMW.betas}
    assert {"token_embedding.weight", "blocks.0.attention.q.weight"} <= decayed
    assert all(name.endswith("bias") or "norm" in name for name in others)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert decayed | others == trained
    assert "position_embedding.weight" not in trained


def test_muon_takes_the_matrices_of_the_blocks(tiny_gpt: MakeGPT) -> None:
    model = tiny_gpt("gpt2")
    optimizer = make_optimizer(model, replace(MUON, weight_decay=0.2))
    assert isinstance(optimizer, Chained)
    adamw, muon = optimizer.optimizers
    assert isinstance(muon, Muon)
    by_head, others = names_of(model, muon.param_groups)
    assert {group["head_size"] for group in muon.param_groups} == {model.config.head_size, None}
    assert {group["weight_decay"] for group in muon.param_groups} == {0.2}
    assert {name.split(".", 2)[2] for name in by_head} == {
        "attention.q.weight",
        "attention.k.weight",
    }
    matrices = by_head | others
    assert (len(by_head), len(others)) == (2 * 2, 2 * 4)
    assert all(name.startswith("blocks.") and name.endswith("weight") for name in matrices)
    decayed, others = names_of(model, adamw.param_groups)
    assert decayed == {"token_embedding.weight", "position_embedding.weight"}
    assert decayed | others | matrices == {name for name, _ in model.named_parameters()}


def test_muon_alone_where_nothing_is_left_for_adamw(tiny_gpt: MakeGPT) -> None:
    model = tiny_gpt().requires_grad_(False)
    model.blocks[0].attention.q.weight.requires_grad_(True)
    assert isinstance(make_optimizer(model, MUON), Muon)


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
def test_gradients_that_are_scaled_are_left_to_who_scales_them(
    tiny_gpt: MakeGPT, config: OptimizerConfig
) -> None:
    """A fused AdamW unscales them itself, after they are clipped."""
    for is_scaled in (False, True):
        optimizer = make_optimizer(tiny_gpt(), config, is_scaled=is_scaled)
        adamw = optimizer.optimizers[0] if isinstance(optimizer, Chained) else optimizer
        assert all(group["fused"] != is_scaled for group in adamw.param_groups)


def test_nothing_to_train_is_refused(tiny_gpt: MakeGPT) -> None:
    model = tiny_gpt().requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing is trainable; check model\.trainable"):
        make_optimizer(model, ADAMW)
    model.head.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model\.optimizer\.name is muon, but no matrix"):
        make_optimizer(model, MUON)


def train(model: GPT, optimizer: torch.optim.Optimizer, scheduler: Any, steps: range) -> None:
    for step in steps:
        input_ids = torch.randint(96, (2, 8), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model.head(model(input_ids)).square().mean().backward()
        optimizer.step()
        scheduler.step()


def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
def test_a_restored_optimizer_continues_bit_for_bit(
    tiny_gpt: MakeGPT, config: OptimizerConfig
) -> None:
    model = tiny_gpt()
    optimizer = make_optimizer(model, config)
    scheduler = halving(optimizer)
    train(model, optimizer, scheduler, range(2))
    saved = io.BytesIO()
    torch.save([model.tensors(), optimizer.state_dict(), scheduler.state_dict()], saved)
    train(model, optimizer, scheduler, range(2, 4))

    saved.seek(0)
    tensors, state, schedule = torch.load(saved, weights_only=True)
    resumed = GPT.from_tensors(model.config, tensors).eval()
    its_optimizer = make_optimizer(resumed, config)
    its_scheduler = halving(its_optimizer)
    its_optimizer.load_state_dict(state)
    its_scheduler.load_state_dict(schedule)
    train(resumed, its_optimizer, its_scheduler, range(2, 4))
    for name, tensor in resumed.tensors().items():
        assert torch.equal(tensor, model.tensors()[name]), name


def test_the_schedule_reaches_both(tiny_gpt: MakeGPT) -> None:
    model = tiny_gpt()
    optimizer = make_optimizer(model, MUON)
    assert isinstance(optimizer, Chained)
    scheduler = halving(optimizer)
    train(model, optimizer, scheduler, range(3))
    rates = [group["lr"] for part in optimizer.optimizers for group in part.param_groups]
    assert rates == [1e-2 / 8] * 4
    before = copy.deepcopy(model.tensors())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert changed(model, before) == set()


def test_both_step_once_behind_a_closure_and_forget_gradients(tiny_gpt: MakeGPT) -> None:
    model = tiny_gpt()
    optimizer = make_optimizer(model, MUON)
    before = copy.deepcopy(model.tensors())

    def closure() -> float:
        loss = model.head(model(torch.arange(8)[None])).square().mean()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) > 0  # type: ignore[arg-type,operator]
    assert changed(model, before) == {name for name, _ in model.named_parameters()}
    assert len(optimizer.state) == len(before)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_gradient_scaler_finds_every_gradient(tiny_gpt: MakeGPT) -> None:
    """What 16-mixed does: gradients are unscaled through `param_groups`, then clipped."""
    model = tiny_gpt()
    optimizer = make_optimizer(model, MUON)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model.head(model(torch.arange(8)[None])).square().mean().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.zero_grad()
    scaler.scale(model.head(model(torch.arange(8)[None])).square().mean()).backward()
    scaler.unscale_(optimizer)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name])  # powers of two: exact but for 0
    before = copy.deepcopy(model.tensors())
    scaler.step(optimizer)
    assert changed(model, before) == wanted.keys()


def changed(model: GPT, before: dict[str, Tensor]) -> set[str]:
    return {name for name, t in model.tensors().items() if not torch.equal(t, before[name])}


def test_float32_muon_is_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps beside torch's, whose orthogonalisation rounds to bf16 (8 bits): updates to 3 %."""
    monkeypatch.setattr("pipeline.training.muon.multiplies_bf16", lambda device: False)
    torch.manual_seed(0)
    shapes = [(12, 20), (20, 12), (16, 16), (8, 32), (32, 8)]
    start = [torch.randn(shape) for shape in shapes]
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(10)]
    ended = []
    for kind in (torch.optim.Muon, Muon):
        matrices = [matrix.clone().requires_grad_() for matrix in start]
        optimizer = kind(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for of_step in gradients:  # of which momentum must tell the last from those before
            for matrix, gradient in zip(matrices, of_step, strict=True):
                matrix.grad = gradient.clone()
            optimizer.step()
        ended.append([m.detach() - s for m, s in zip(matrices, start, strict=True)])
    for theirs, ours in zip(*ended, strict=True):
        assert (theirs - ours).norm() < 0.03 * theirs.norm()
        assert not torch.equal(theirs, ours)


@pytest.mark.parametrize("shape", [(96, 96), (96, 128), (96, 384), (384, 96)])
def test_wide_matrices_are_orthogonalised_as_others_are(shape: tuple[int, int]) -> None:
    """In float64, where nothing rounds: the singular values move as one number by itself does."""
    torch.manual_seed(0)
    coefficients = (3.4445, -4.775, 2.0315)
    matrix = torch.randn(shape, dtype=torch.float64) * torch.logspace(0, -3, shape[1])
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        a, b, c = coefficients
        s = a * s + b * s**3 + c * s**5
    got = orthogonalize(matrix[None], coefficients, 5)
    torch.testing.assert_close(got[0], u @ s.diag() @ v, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(24, 24), (12, 32), (32, 12)])
def test_matrices_of_a_shape_are_orthogonalised_together_as_alone(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    coefficients = (3.4445, -4.775, 2.0315)
    matrices = torch.stack([torch.randn(shape) * 10.0**i for i in range(4)])
    matrices[0] = 0  # as the gradient of an adapter's A at its first step
    alone = [orthogonalize(matrix[None], coefficients, 5)[0] for matrix in matrices]
    together = orthogonalize(matrices, coefficients, 5)
    torch.testing.assert_close(torch.stack(alone), together, rtol=0, atol=1e-5)
    assert not together[0].any()


def test_a_head_is_a_matrix_of_its_own() -> None:
    """Three heads of 8 rows in one matrix move as three matrices do, not as the one does."""
    torch.manual_seed(0)
    start, gradient = torch.randn(24, 32), torch.randn(24, 32) * torch.arange(1, 25)[:, None]

    def moved(n_parts: int, head_size: int | None) -> Tensor:
        matrices = [nn.Parameter(part.clone()) for part in start.chunk(n_parts)]
        for matrix, part in zip(matrices, gradient.chunk(n_parts), strict=True):
            matrix.grad = part
        groups = [{"params": matrices, "head_size": head_size}]
        Muon(groups, lr=0.1, weight_decay=0.0).step()
        return torch.cat([matrix.detach() for matrix in matrices])

    torch.testing.assert_close(moved(1, 8), moved(3, None))
    assert (moved(1, 8) - moved(1, None)).norm() > 0.1 * (moved(1, None) - start).norm()
