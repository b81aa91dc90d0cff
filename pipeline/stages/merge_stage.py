"""`merge`: merges an adapter into its base, with a certificate that outputs are unchanged.

Shapes: V vocabulary, K labels, P positions.
"""

import json
import math
import pydoc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.batching import MicroBatch
from datamodules.step_data_module import StepDataModule
from pipeline import lora
from pipeline.arguments import construct
from pipeline.checkpoint import json_writer, model_writers, stem_of, step_name, write_checkpoint
from pipeline.classifier import GPTClassifier
from pipeline.console import say
from pipeline.decoding.generate import generate
from pipeline.decoding.sampling import Sampling
from pipeline.directories import CHECKPOINTS, check_output, path_digest
from pipeline.loss import IGNORE, next_token_losses
from pipeline.models import Loaded, load_checkpoint
from pipeline.runs.run_directory import Run
from pipeline.runs.stage_run import run_once
from pipeline.weights.fetch import locate

CERTIFICATE = "certificate.json"
# Rounding in float32 makes W x + B A x and (W + B A) x differ by some 1e-5 at logits of size 10; a
# merge in bf16 moved them by 0.125. What lies in between is neither rounding nor acceptable.
TOLERANCE = 1e-3
N_TEXTS, N_POSITIONS = 16, 32  # texts whose logits are compared, at their last positions
N_NEW = 32  # greedy tokens to continue each text with
N_SCORED = 2000  # items of the test set that are scored, at most


@dataclass(frozen=True)
class Behaviour:
    """A model's outputs and score on its task's test set.

    Attributes:
        logits: (P, V) of each of the first texts; of a classifier, (1, K) of each text.
        said: greedy continuation of each of the first texts; of a classifier, each text's label.
        score: perplexity of the supervised tokens, or accuracy.
        n_scored: number of items that were scored.
    """

    logits: list[Tensor]
    said: list[list[int]]
    score: float
    n_scored: int


def merge_stage(ckpt: str, *, data: dict[str, Any] | None, output: Path | None) -> None:
    """Merges in a run directory; see `pipeline.commands.merge`."""
    if output is not None:
        output = check_output(output, is_own=(output / CERTIFICATE).is_file())
    path = locate(ckpt)
    options = {"ckpt": ckpt, "data": data, "output": output and str(output)}
    stem, deciding = f"{stem_of(ckpt)}-merge", [options, path_digest(path)]
    make = partial(_merge, ckpt=path, data=data, output=output)
    print(run_once("merge", stem, deciding, options, make, "best"))


def _merge(run: Run, ckpt: Path, data: dict[str, Any] | None, output: Path | None) -> None:
    loaded = load_checkpoint(ckpt, merge=False)
    if not loaded.meta["lora"]:
        raise ValueError(f"{ckpt} has no adapter; there is nothing to merge.")
    held_out = data_of(loaded, data)
    held_out.setup("test")
    before = behaviour(loaded, held_out)
    lora.merge(loaded.model)
    after = behaviour(loaded, held_out)
    certificate = {
        "adapter": {"path": str(ckpt.resolve()), "digest": path_digest(ckpt)},
        "base": loaded.meta["base"]["digest"],
        "data": held_out.fingerprint["digest"],
        **compare(before, after, is_classifier=isinstance(loaded.model, GPTClassifier)),
    }
    say(table(certificate))
    check(certificate, ckpt)
    meta = {**loaded.meta, "lora": None, "base": None, "adapter": certificate["adapter"]}
    target = output or run.path / CHECKPOINTS / step_name(loaded.meta["step"])
    writers = model_writers(loaded.model.tensors(), meta, loaded.tokenizer)
    write_checkpoint(target, {**writers, CERTIFICATE: json_writer(certificate)})
    score, difference = certificate["score"], certificate["logits"]
    metrics = {f"merged/{score['name']}": after.score, "merged/max_logit": difference["max"]}
    facts = held_out.fingerprint
    run.log_tags({"adapter": certificate["adapter"]})
    run.log_dataset(
        type(held_out).__name__, facts["digest"], facts["counts"], ", ".join(facts["sources"])
    )
    run.log_metrics(metrics, step=0)
    run.log_text(json.dumps(certificate, indent=1), CERTIFICATE)
    run.finish(
        outputs={"best": str(target)},
        digests={"best": path_digest(target)},
        metrics=metrics,
        sources=facts["sources"],
        headline=[{"metric": score["name"], "before": before.score, "after": after.score}],
    )


def data_of(loaded: Loaded, changes: dict[str, Any] | None) -> StepDataModule:
    """The data that a checkpoint was tuned on, with some arguments changed.

    Raises:
        ValueError: the checkpoint names no data, or a class from outside this project; or the
            class does not take a change.
    """
    given = loaded.meta.get("data") or {}
    name = given.get("class_path", "")  # a stranger's checkpoint may name any class
    kind = pydoc.locate(name) if name.startswith("datamodules.") else None
    if not (isinstance(kind, type) and issubclass(kind, StepDataModule)):
        raise ValueError(
            f"{loaded.path} does not say which of our data modules it was tuned with, so nothing "
            "can be compared; merge where it was trained."
        )
    arguments = {**given["init_args"], "tokenizer": str(loaded.path), **(changes or {})}
    return construct(kind, arguments, "data")


@torch.inference_mode()
def behaviour(loaded: Loaded, data: StepDataModule) -> Behaviour:
    """A model's outputs and score on the test set of its data."""
    batches = [micro_batch for batch in data.test_dataloader() for micro_batch in batch]
    if isinstance(loaded.model, GPTClassifier):
        return _labels(loaded.model, batches)
    samples = [data.test_set[i] for i in range(min(N_TEXTS, len(data.test_set)))]
    n_items, nats = 0, []
    for micro_batch in batches:
        hidden = loaded.gpt(micro_batch["input_ids"], micro_batch.get("attention_mask"))
        nats.append(next_token_losses(hidden, loaded.gpt.head.weight, micro_batch["labels"]))
        n_items += len(hidden)
        if n_items >= N_SCORED:
            break
    rows = [loaded.gpt.head(loaded.gpt(s["input_ids"][None])[0, -N_POSITIONS:]) for s in samples]
    prompts = [_prompt(sample["input_ids"], sample["labels"]) for sample in samples]
    room = loaded.gpt.config.block_size - max(map(len, prompts))
    settings = Sampling(max_new_tokens=min(N_NEW, room))
    said = [generate(loaded.gpt, [prompt], settings)[0] for prompt in prompts]
    return Behaviour(rows, said, math.exp(float(torch.cat(nats).mean())), n_items)


def _labels(model: GPTClassifier, batches: Sequence[MicroBatch]) -> Behaviour:
    logits = torch.cat([model(b["input_ids"], b.get("attention_mask")) for b in batches])  # (N, K)
    labels = torch.cat([batch["label"] for batch in batches])  # (N,)
    decided = logits.argmax(dim=-1)
    accuracy = float((decided == labels).float().mean())
    return Behaviour(list(logits[:, None]), [[i] for i in decided.tolist()], accuracy, len(labels))


def _prompt(input_ids: Tensor, labels: Tensor) -> list[int]:
    """Ids before the first supervised token; the first half of the text if there are none."""
    first = int((labels != IGNORE).int().argmax())
    return input_ids[: first or max(1, len(input_ids) // 2)].tolist()


def compare(before: Behaviour, after: Behaviour, *, is_classifier: bool) -> dict[str, Any]:
    """The differences that a certificate states."""
    pairs = zip(before.logits, after.logits, strict=True)
    differences = torch.cat([(a - b).abs().flatten() for a, b in pairs])
    n_same = sum(a == b for a, b in zip(before.said, after.said, strict=True))
    return {
        "tolerance": TOLERANCE,
        "logits": {
            "n": len(differences),
            "max": float(differences.max()),
            "mean": float(differences.mean()),
        },
        "decisions" if is_classifier else "greedy_texts": {
            "n": len(before.said),
            "identical": n_same,
        },
        "score": {
            "name": "accuracy" if is_classifier else "perplexity",
            "n": before.n_scored,
            "before": before.score,
            "after": after.score,
        },
    }


def check(certificate: dict[str, Any], ckpt: Path) -> None:
    """ValueError if merging has changed the model's outputs."""
    largest = certificate["logits"]["max"]
    said = certificate.get("decisions") or certificate["greedy_texts"]
    if not largest <= TOLERANCE or said["identical"] < said["n"]:  # NaN is not <= either
        raise ValueError(
            f"merging {ckpt} moves logits by up to {largest:.3g} (tolerance {TOLERANCE}) and keeps "
            f"{said['identical']} of {said['n']} outputs; nothing was written, use the adapter as "
            "it is."
        )


def table(certificate: dict[str, Any]) -> str:
    """The certificate as a readable table."""
    logits, score = certificate["logits"], certificate["score"]
    kind = "decisions" if "decisions" in certificate else "greedy_texts"
    said = certificate[kind]
    rows = {
        "logits, largest difference": f"{logits['max']:.3g} of {logits['n']:,}",
        "logits, mean difference": f"{logits['mean']:.3g}",
        f"{kind.replace('_', ' ')}, identical": f"{said['identical']} of {said['n']}",
        f"{score['name']} on {score['n']} items": f"{score['before']:.6g} -> {score['after']:.6g}",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
