"""Loads models from checkpoints and published weights, with their tokenizer and metadata."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.files import digest, expanded, resolved
from datamodules.prompts import TEMPLATE
from datamodules.tokenizer import Tokenizer
from pipeline import checkpoint as files
from pipeline import lora
from pipeline.classifier import GPTClassifier
from pipeline.directories import CheckpointError
from pipeline.gpt import GPT, GPTConfig
from pipeline.weights.fetch import locate
from pipeline.weights.foreign import Foreign
from pipeline.weights.reading import is_foreign, open_foreign, read_model

Model = GPT | GPTClassifier


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer."""

    model: Model
    tokenizer: Tokenizer
    meta: dict[str, Any]  # meta.json; for published weights the same keys, where they apply
    path: Path
    name: str | None = None  # that it was asked for by, if not by its path

    def __post_init__(self) -> None:
        self.gpt.n_tokens = self.tokenizer.n_vocab

    @property
    def gpt(self) -> GPT:
        """The transformer, without a classifier's head."""
        return self.model.gpt if isinstance(self.model, GPTClassifier) else self.model

    @property
    def title(self) -> str:
        """The model's title: the name it was asked for by, else its run's, else its file's."""
        return self.name or files.stem_of(self.path)

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return self.gpt.token_embedding.weight.device


def load(source: str | Path, dtype: torch.dtype = torch.float32) -> Loaded:
    """Loads a model from any source; an adapter is merged into its base, in float32.

    ValueError if the model is not complete, or an adapter's base is missing or another one.

    Args:
        source: a checkpoint directory, verified; or what `weights.fetch.locate` takes.
        dtype: type of the weights of a language model; a classifier's are float32.
    """
    path = locate(source)
    if not is_foreign(path):
        return load_checkpoint(path, dtype)
    foreign = open_foreign(path)
    model = read_model(foreign, path, dtype).eval()
    name = None if expanded(source).exists() else str(source)
    return Loaded(model, foreign.tokenizer, foreign_meta(foreign), path, name)


def foreign_meta(foreign: Foreign) -> dict[str, Any]:
    """What the meta.json of a checkpoint would say of published weights."""
    return {
        "kind": "language_model",
        "gpt": asdict(foreign.config),
        **dict.fromkeys(("lora", "base", "parent")),
        "earlier": list(foreign.trained_on),
        **({"prompt_style": TEMPLATE} if foreign.tokenizer.vocabulary.chat_template else {}),
    }


def load_checkpoint(
    path: Path, dtype: torch.dtype = torch.float32, *, merge: bool = True
) -> Loaded:
    """Loads and verifies a checkpoint of ours; its adapter is merged into the base, or left on it.

    ValueError if it is not complete, or an adapter's base is missing or another one.
    """
    files.verify_checkpoint(path)
    with _made_here(path):
        meta, tensors = files.read_meta(path), files.read_tensors(path)
        model = _adapted(path, meta, tensors) if meta["lora"] else _whole(meta, tensors)
        if meta["lora"] and merge:
            lora.merge(model)
        if isinstance(model, GPT):
            model.to(dtype)
        return Loaded(model.eval(), Tokenizer.load(path), meta, path)


@contextmanager
def _made_here(path: Path) -> Iterator[None]:
    """Raises CheckpointError for an intact checkpoint of another program, naming what is wrong."""
    try:
        yield
    except (LookupError, TypeError, AttributeError) as error:
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} was not written by this program: its files do not fit together "
            f"({type(error).__name__}: {said}); take another checkpoint."
        ) from error


def _whole(meta: dict[str, Any], tensors: dict[str, Tensor]) -> Model:
    config = GPTConfig.from_primitives(meta["gpt"])
    if meta["kind"] == "language_model":
        return GPT.from_tensors(config, tensors)
    in_gpt = _below("gpt", tensors)
    if not config.tie_embeddings:  # stands in for the head that is dropped next
        in_gpt["head.weight"] = in_gpt["token_embedding.weight"]
    return _with_head(GPT.from_tensors(config, in_gpt), tensors)


def _adapted(path: Path, meta: dict[str, Any], tensors: dict[str, Tensor]) -> Model:
    base = _base(path, meta["base"]).gpt
    model = base if meta["kind"] == "language_model" else _with_head(base, tensors)
    lora.attach(model, lora.LoRAConfig(**meta["lora"]))
    lora.load_adapter(model, files.read_tensors(path, files.ADAPTER_WEIGHTS))
    return model


def _with_head(gpt: GPT, tensors: dict[str, Tensor]) -> GPTClassifier:
    head = _below("classifier", tensors)
    model = GPTClassifier(gpt, n_labels=len(head["weight"]))
    if head.keys() != model.classifier.state_dict().keys():
        raise ValueError(
            "its classifier has a bias that the model has no place for; train it anew."
        )
    model.classifier.load_state_dict(head)
    return model


def _below(module: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{module}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def describe_base(loaded: Loaded, checkpoint_folder: Path) -> dict[str, Any]:
    """How an adapter's checkpoints in a folder refer to their base, which is in float32."""
    return {
        "name": loaded.name,
        "path": str(loaded.path),
        "relative": os.path.relpath(loaded.path, checkpoint_folder.resolve()),
        "digest": base_digest(loaded),
    }


def base_digest(loaded: Loaded) -> str:
    """SHA-256 of a base's float32 weights as they are stored, whatever the file format.

    For a base with an adapter, both digests are combined: merged, they round as the processor does.
    """
    if not loaded.meta["lora"]:
        return files.tensors_digest(loaded.gpt.tensors())
    own = files.tensors_digest(files.read_tensors(loaded.path, files.ADAPTER_WEIGHTS))
    return digest([loaded.meta["base"]["digest"], own, loaded.meta["lora"]])


def find_base(path: Path, base: dict[str, Any]) -> Path:
    """The path of an adapter's base, moved with it or not; ValueError if it is missing."""
    return next(_bases(path, base))


def _base(path: Path, base: dict[str, Any]) -> Loaded:
    """Loads the base, in float32, and checks its digest: another may be at its path by now."""
    others = []
    for place in _bases(path, base):
        loaded = load(place)
        loaded.gpt.float()
        if (found := base_digest(loaded)) == base["digest"]:
            return loaded
        others.append(f"the one at {place} has {found[:12]}")
    raise ValueError(
        f"{path} was trained on a base with digest {base['digest'][:12]}, but "
        f"{', '.join(others)}; put the original back."
    )


def _bases(path: Path, base: dict[str, Any]) -> Iterator[Path]:
    """Paths of the base, at least one: relative to the adapter, absolute, or fetched by name."""
    places = [path.parent / base["relative"], Path(base["path"])]
    there = list(dict.fromkeys(resolved(place) for place in places if place.exists()))
    if there:
        yield from there
    elif base.get("name"):
        yield locate(base["name"])
    else:
        raise ValueError(f"{path} is an adapter; its base {base['path']} is gone; put it back.")
