"""The classifier reads the last real token of a row, whatever padding follows it."""

from collections.abc import Callable

import pytest
import torch

from pipeline.classifier import GPTClassifier
from pipeline.gpt import GPT
from pipeline.training.lit_classifier import MeanAUROC, make_metrics

MakeGPT = Callable[..., GPT]


@pytest.fixture(params=["gpt2", "llama"])
def classifier(request: pytest.FixtureRequest, tiny_gpt: MakeGPT) -> GPTClassifier:
    torch.manual_seed(0)
    model = GPTClassifier(tiny_gpt(request.param, block_size=256), n_labels=3).eval()
    torch.nn.init.normal_(model.classifier.weight)
    return model


@pytest.mark.parametrize("n_pads", [0, 50, 200])
@torch.inference_mode()
def test_pads_do_not_matter(classifier: GPTClassifier, n_pads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(96, (2, 40), generator=generator)
    padded = torch.cat((rows, torch.full((2, n_pads), 95)), dim=1)
    mask = torch.arange(40 + n_pads) < torch.tensor([[40], [25]])
    alone = torch.cat((classifier(rows[:1]), classifier(rows[1:, :25])))
    # float32: longer rows sum in another order
    assert (classifier(padded, mask) - alone).abs().max() < 1e-5
    assert (alone[0] - alone[1]).abs().max() > 1e-2


@torch.inference_mode()
def test_the_last_real_token_decides(classifier: GPTClassifier) -> None:
    row = torch.arange(10)[None]
    mask = torch.arange(10)[None] < 6
    before = classifier(row, mask)
    last, behind = row.clone(), row.clone()
    last[0, 5], behind[0, 6] = 90, 90
    assert torch.equal(classifier(behind, mask), before)
    assert (classifier(last, mask) - before).abs().max() > 1e-2


@pytest.mark.parametrize(("family", "n_biases"), [("gpt2", 2), ("llama", 0)])
def test_it_has_no_language_model_head(tiny_gpt: MakeGPT, family: str, n_biases: int) -> None:
    gpt = tiny_gpt(family, tie_embeddings=False)
    without_head = gpt.n_parameters() - gpt.head.weight.numel()
    model = GPTClassifier(gpt, n_labels=2)
    n_parameters = sum(t.numel() for t in model.tensors().values())
    assert n_parameters == without_head + 2 * 32 + n_biases
    again = GPTClassifier(model.gpt, n_labels=5)
    assert again(torch.arange(4)[None]).shape == (1, 5)


def test_a_label_that_does_not_occur_is_in_no_mean() -> None:
    """As in a test: of three labels two occur and are all found."""
    labels = torch.tensor([0, 2, 2])
    metrics = make_metrics(3)
    metrics.update(torch.eye(3)[labels], labels)
    scores = metrics.compute()
    assert {float(scores[name]) for name in ("precision", "recall", "f1")} == {1.0}


def test_auroc_is_of_the_labels_that_occur() -> None:
    auroc = MeanAUROC(3, average="none")
    labels = torch.tensor([0, 1, 0, 1])
    auroc.update(torch.eye(3)[labels], labels)
    assert auroc.compute() == 1.0
    auroc.reset()
    auroc.update(torch.eye(3)[labels], torch.zeros_like(labels))
    assert auroc.compute().isnan()
