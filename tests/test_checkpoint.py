"""Checkpoints are complete or refused by name, and load as they were saved, wherever moved to."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from datamodules.tokenizer import Tokenizer, train_tokenizer
from pipeline import checkpoint as files
from pipeline import directories, lora, models
from pipeline.checkpoint import newest_valid, verify_checkpoint, write_checkpoint
from pipeline.classifier import GPTClassifier
from pipeline.directories import CheckpointError
from pipeline.gpt import GPT
from pipeline.lora import LoRAConfig
from pipeline.models import describe_base, load
from pipeline.weights.gguf_out import gguf_writers
from pipeline.weights.reading import tokenizer_of
from tests import exporting
from tests.journey import Journey

MakeGPT = Callable[..., GPT]
LORA = LoRAConfig(rank=2, alpha=4.0, dropout=0.0, targets=["q", "o"], rslora=False, dora=False)
INPUT_IDS = torch.arange(20).reshape(2, 10)
MERGED = 1e-5  # float32: adapters are merged into their base, which rounds differently


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["some text, some words"], vocab_size=270, min_frequency=1)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("mlruns/book/instruct-0a1b2c3d/checkpoints/step-00000020", "instruct"),
        ("mlruns/book/my-run-0a1b2c3d-2/checkpoints/step-00000020", "my-run"),
        ("mlruns/export/instruct-gguf-0a1b2c3d/exported/model.gguf", "instruct-gguf"),
        ("gpt2-medium/checkpoints/step-1", "gpt2-medium"),
        ("models/Llama-3.2-1B", "Llama-3.2-1B"),
        ("models/SmolLM2.Q4_1.gguf", "SmolLM2.Q4_1"),
    ],
)
def test_what_a_model_is_called(path: str, name: str, tmp_path: Path) -> None:
    (tmp_path / path).mkdir(parents=True)
    if path.endswith(".gguf"):
        (tmp_path / path).rmdir()
        (tmp_path / path).touch()
    assert files.stem_of(tmp_path / path) == name


def test_what_a_published_model_is_called() -> None:
    assert files.stem_of("HuggingFaceTB/SmolLM2-135M@v1") == "SmolLM2-135M"
    assert files.stem_of("smollm2-135m-instruct") == "smollm2-135m-instruct"


Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path, tokenizer: Tokenizer) -> Save:
    """Writes a checkpoint as a run does: weights, or the adapter and what is trained beside it."""

    def save_checkpoint(
        model: nn.Module, path: str, *, base: Any = None, config: LoRAConfig | None = None
    ) -> Path:
        named = dict(model.named_parameters())
        if config is not None:
            named = {n: p for n, p in named.items() if p.requires_grad and ".lora_" not in n}
        gpt: Any = getattr(model, "gpt", model)
        meta = {
            "kind": "language_model" if gpt is model else "classifier",
            "gpt": asdict(gpt.config),
            "lora": asdict(config) if config else None,
            "base": base,
        }
        writers = {
            files.WEIGHTS: files.tensors_writer(named),
            files.META: files.json_writer(meta),
            files.TOKENIZER: tokenizer.save,
            files.TRAINING: partial(torch.save, {"step": 5, "rng": torch.get_rng_state()}),
        }
        if config is not None:
            writers[files.ADAPTER_WEIGHTS] = files.tensors_writer(lora.adapter_state(model))
        write_checkpoint(tmp_path / path, writers)
        return tmp_path / path

    return save_checkpoint


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    hidden = model(INPUT_IDS)
    return model.head(hidden) if hasattr(model, "head") else hidden


def itself(gpt: GPT) -> GPT:
    return gpt


def classifier(gpt: GPT) -> GPTClassifier:
    torch.manual_seed(1)
    return GPTClassifier(gpt, n_labels=3).eval()


def adapt(model: nn.Module) -> LoRAConfig:
    """Attaches an adapter that does something; a classifier's head is trained beside it."""
    config = lora.attach(model, LORA)
    for tensor in lora.adapter_state(model).values():
        nn.init.normal_(tensor, std=0.3)
    if isinstance(model, GPTClassifier):
        model.classifier.requires_grad_(True)
    return config


# Round trips


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("wrap", [itself, classifier], ids=["lm", "classifier"])
def test_full_model(
    tiny_gpt: MakeGPT, save: Save, tokenizer: Tokenizer, family: str, tied: bool, wrap: Any
) -> None:
    model = wrap(tiny_gpt(family, tie_embeddings=tied))
    loaded = load(save(model, "step-00000005"))
    assert type(loaded.model) is type(model)
    assert not loaded.model.training
    assert torch.equal(outputs(loaded.model), outputs(model))
    assert loaded.model.tensors().keys() == model.tensors().keys()
    assert loaded.tokenizer.digest == tokenizer.digest
    assert loaded.gpt.config == getattr(model, "gpt", model).config
    assert files.read_training(loaded.path)["step"] == 5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("wrap_base", "wrap"),
    [(itself, itself), (itself, classifier), (classifier, classifier)],
    ids=["lm on lm", "classifier on lm", "classifier on classifier"],
)
def test_adapter(tiny_gpt: MakeGPT, save: Save, tied: bool, wrap_base: Any, wrap: Any) -> None:
    base = save(wrap_base(tiny_gpt(tie_embeddings=tied)), "pretrain/checkpoints/step-00000100")
    gpt = load(base).gpt
    described = describe_base(load(base), base.parents[2] / "tune" / "checkpoints")
    model = wrap(gpt)
    config = adapt(model)
    path = save(model, "tune/checkpoints/step-00000005", base=described, config=config)

    loaded = load(path)
    assert (outputs(loaded.model) - outputs(model)).abs().max() < MERGED
    assert all(p.requires_grad for p in loaded.model.parameters()), "ready for the next stage"
    beside = set(files.read_tensors(path))
    assert beside == ({"classifier.weight", "classifier.bias"} if wrap is classifier else set())
    assert all(".lora_" in name for name in files.read_tensors(path, files.ADAPTER_WEIGHTS))


def test_an_adapter_on_an_adapter(tiny_gpt: MakeGPT, save: Save, tmp_path: Path) -> None:
    path, folder = save(tiny_gpt(), "step-00000000"), tmp_path
    for step in (1, 2):
        model = load(path).gpt
        described = describe_base(load(path), folder)
        config = adapt(model)
        path = save(model, f"step-0000000{step}", base=described, config=config)
    assert (outputs(load(path).model) - outputs(model)).abs().max() < MERGED


def test_an_adapter_on_an_adapter_that_another_processor_merges(
    tiny_gpt: MakeGPT,
    save: Save,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It rounds otherwise."""
    path = save(tiny_gpt(), "step-00000000")
    for step in (1, 2):
        loaded = load(path)
        described = describe_base(loaded, tmp_path)
        path = save(loaded.gpt, f"step-0000000{step}", base=described, config=adapt(loaded.gpt))
    wanted = outputs(load(path).model)
    merge = lora.merge

    def merge_otherwise(model: torch.nn.Module) -> None:
        merge(model)
        with torch.no_grad():
            next(model.parameters()).mul_(1 + 1e-7)

    monkeypatch.setattr(lora, "merge", merge_otherwise)
    assert (outputs(load(path).model) - wanted).abs().max() < MERGED


def test_an_adapter_on_a_half_precision_base(tiny_gpt: MakeGPT, save: Save, tmp_path: Path) -> None:
    base = save(tiny_gpt().bfloat16(), "step-00000000")
    described = describe_base(load(base), tmp_path)
    model = load(base).gpt.float()
    config = adapt(model)
    path = save(model, "step-00000001", base=described, config=config)
    assert (outputs(load(path).model) - outputs(model)).abs().max() < MERGED


@pytest.fixture
def tuned(tiny_gpt: MakeGPT, save: Save) -> Path:
    """An adapter's checkpoint, in a project of its own with its base."""
    base = save(tiny_gpt(), "project/pretrain/checkpoints/step-00000100")
    model = load(base).gpt
    described = describe_base(load(base), base.parents[2] / "tune" / "checkpoints")
    config = adapt(model)
    return save(model, "project/tune/checkpoints/step-00000005", base=described, config=config)


def test_a_project_that_moved_finds_its_base(tuned: Path, tmp_path: Path) -> None:
    before = outputs(load(tuned).model)
    (tmp_path / "project").rename(tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / "tune" / "checkpoints" / "step-00000005"
    assert torch.equal(outputs(load(moved).model), before)


def test_a_checkpoint_that_moved_alone_finds_its_base(tuned: Path, tmp_path: Path) -> None:
    before = outputs(load(tuned).model)
    moved = tuned.rename(tmp_path / "alone")
    assert torch.equal(outputs(load(moved).model), before)


def test_another_model_where_the_base_may_be_is_passed_over(
    tuned: Path, tiny_gpt: MakeGPT, save: Save, tmp_path: Path
) -> None:
    """In the project that the checkpoint was copied to another lies at the base's place."""
    before = outputs(load(tuned).model)
    other = save(tiny_gpt(bias=False), "copies/pretrain/checkpoints/step-00000100")
    copied = tmp_path / "copies" / "tune" / "checkpoints" / "step-00000005"
    shutil.copytree(tuned, copied)
    assert torch.equal(outputs(load(copied).model), before)
    shutil.rmtree(tuned.parents[2])
    with pytest.raises(ValueError, match=f"the one at {re.escape(str(other))} has .*put the orig"):
        load(copied)


def test_another_model_where_a_base_with_a_name_was_is_told_offline_too(
    tiny_gpt: MakeGPT, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save(tiny_gpt(), "base")
    model = load(base).gpt
    described = describe_base(load(base), tmp_path) | {"name": "them/base"}
    path = save(model, "step-00000001", base=described, config=adapt(model))
    shutil.rmtree(base)
    save(tiny_gpt(bias=False), "base")
    located = models.locate

    def offline(source: str | Path) -> Path:
        if str(source) == "them/base":
            raise ValueError("go online once")
        return located(source)

    monkeypatch.setattr(models, "locate", offline)
    with pytest.raises(ValueError, match=f"the one at {re.escape(str(base))} has .*put the orig"):
        load(path)
    shutil.rmtree(base)
    with pytest.raises(ValueError, match="go online once"):
        load(path)


def test_a_base_whose_own_name_is_a_link_is_read_by_that_name(
    tiny_gpt: MakeGPT, save: Save, tmp_path: Path
) -> None:
    """As in the cache of the hub, where the file itself has no suffix that says what it is."""
    plain = exporting.loaded(tiny_gpt("llama", vocab_size=384), exporting.vocabulary())
    written = exporting.write(gguf_writers(plain, "f32", name="x", license=None), tmp_path / "out")
    (written / "model.gguf").rename(tmp_path / "0a1b2c3d")
    link = tmp_path / "hub" / "x.gguf"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "0a1b2c3d")
    model = load(link).gpt
    config = adapt(model)
    path = save(model, "step-00000001", base=describe_base(load(link), tmp_path), config=config)
    assert (outputs(load(path).model) - outputs(model)).abs().max() < MERGED


def test_a_base_found_through_a_link_survives_a_move(
    tiny_gpt: MakeGPT, save: Save, tmp_path: Path
) -> None:
    """The relative path is that of the real folders, however the run named them."""
    (tmp_path / "disk" / "deep" / "runs").mkdir(parents=True)
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "runs").symlink_to(tmp_path / "disk" / "deep" / "runs")
    base = save(tiny_gpt(), "project/base")
    model = load(base).gpt
    described = describe_base(load(base), tmp_path / "project" / "runs") | {"path": "gone"}
    config = adapt(model)
    path = save(model, "project/runs/step-00000005", base=described, config=config)
    assert (outputs(load(path).model) - outputs(model)).abs().max() < MERGED


def test_another_base_is_refused(tiny_gpt: MakeGPT, save: Save, tuned: Path) -> None:
    save(tiny_gpt(seed=1), "project/pretrain/checkpoints/step-00000100")
    with pytest.raises(ValueError, match=r"trained on a base with digest .* put the original"):
        load(tuned)


def test_a_base_that_is_gone_is_named(tuned: Path) -> None:
    base = tuned.parents[2] / "pretrain"
    shutil.rmtree(base)
    with pytest.raises(ValueError, match=rf"is an adapter; its base {base}.* is gone"):
        load(tuned)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere does not exist .*; give a checkpoint directory"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        CheckpointError, match=r"empty is not a whole checkpoint: its manifest\.json"
    ):
        load(tmp_path / "empty")


def test_a_finished_run_stands_for_its_best_checkpoint(tiny: Journey) -> None:
    best = tiny.best("pretrain")
    run = best.parents[1]
    assert load(run).path == best
    assert Tokenizer.load(tokenizer_of(run)).digest == load(best).tokenizer.digest
    assert files.stem_of(run) == files.stem_of(best)


def test_a_run_that_is_not_finished_is_no_checkpoint(tiny: Journey, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny.best("pretrain").parents[1], run)
    (run / "outcome.json").unlink()
    newest = max(run.glob("checkpoints/step-*"))
    for folder in (newest.parent, run):
        message = f"{folder} is not a checkpoint but holds some; give one, as {newest}."
        with pytest.raises(CheckpointError, match=re.escape(message)):
            load(folder)
        with pytest.raises(CheckpointError, match=re.escape(message)):
            tokenizer_of(folder)


# Damage


def write_text(path: Path, **contents: str) -> Path:
    writers: dict[str, Callable[[Path], object]] = {
        name: lambda file, text=text: file.write_text(text) for name, text in contents.items()
    }
    write_checkpoint(path, writers)
    return path


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write_text(tmp_path / "step-00000001", weights="0123456789" * 100, meta="{}")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["weights", "meta"])
def test_damage_is_refused_by_name(whole: Path, damage: Callable[[Path], None], name: str) -> None:
    verify_checkpoint(whole)
    damage(whole / name)
    with pytest.raises(CheckpointError, match=rf"{whole / name} is missing or damaged; take anoth"):
        verify_checkpoint(whole)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", "7", '{"files": {}}', b"\xff"])
def test_a_manifest_that_says_nothing_is_refused(whole: Path, content: str | bytes | None) -> None:
    manifest = whole / files.MANIFEST
    manifest.unlink()
    if content is not None:
        manifest.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(
        CheckpointError, match=r"not a whole checkpoint: its manifest\.json is missing"
    ):
        verify_checkpoint(whole)


def test_another_format_is_refused_but_not_damage(whole: Path) -> None:
    manifest = json.loads((whole / files.MANIFEST).read_text())
    (whole / files.MANIFEST).write_text(json.dumps({**manifest, "format": files.FORMAT + 1}))
    for use in (verify_checkpoint, lambda path: newest_valid(path.parent)):
        with pytest.raises(
            ValueError, match=r"is of another form \(4; this version reads 3\)"
        ) as caught:
            use(whole)
        assert not isinstance(caught.value, CheckpointError)
    assert whole.is_dir()


def test_the_earlier_form_is_refused_as_such(whole: Path) -> None:
    manifest = json.loads((whole / files.MANIFEST).read_text())
    (whole / files.MANIFEST).write_text(json.dumps({**manifest, "format": files.FORMAT - 1}))
    for use in (verify_checkpoint, load, lambda path: newest_valid(path.parent)):
        with pytest.raises(ValueError, match=r"is of an earlier form \(2; .* reads 3\)") as caught:
            use(whole)
        assert "or train anew (--run.resume never)" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert whole.is_dir(), "it is not set aside: it is not damaged"


def test_the_digest_covers_every_file(whole: Path, tmp_path: Path) -> None:
    same = write_text(tmp_path / "step-00000002", weights="0123456789" * 100, meta="{}")
    other = write_text(tmp_path / "step-00000003", weights="0123456789" * 100, meta="[]")
    digests = [directories.path_digest(path) for path in (whole, same, other)]
    assert digests[0] == digests[1] != digests[2]


def test_who_may_read_the_folder_may_read_the_files(tmp_path: Path) -> None:
    """Safetensors writes files for their owner alone."""
    tmp_path.chmod(0o755)
    files.write_files(tmp_path, {"a": files.tensors_writer({"x": torch.zeros(2)})})
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_a_repositorys_own_files_are_no_part_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    digest = directories.path_digest(tmp_path)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("main")
    assert directories.path_digest(tmp_path) == digest
    (tmp_path / "more.json").write_text("{}")
    assert directories.path_digest(tmp_path) != digest


def test_a_copy_of_a_users_is_no_checkpoint_of_the_run(save: Save, tiny_gpt: MakeGPT) -> None:
    path = save(tiny_gpt(), "step-00000004")
    shutil.copytree(path, path.with_name("step-00000004-mine"))
    assert files.steps_in(path.parent) == [path]
    assert newest_valid(path.parent) == path


def test_newest_valid_sets_the_damaged_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert newest_valid(tmp_path) is None
    paths = [write_text(tmp_path / files.step_name(n), weights=f"{n}") for n in (9, 10, 200)]
    assert newest_valid(tmp_path) == paths[2]
    truncate(paths[2] / "weights")
    (paths[1] / files.MANIFEST).unlink()
    assert newest_valid(tmp_path) == paths[0]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name.rpartition("-")[0] for name in names] == [
        "damaged-step-00000010",
        "damaged-step-00000200",
        "step",
    ]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert f"{paths[2] / 'weights'} is missing or damaged" in warnings[0]
    assert f"Set aside as {names[1]}" in warnings[0]
    assert newest_valid(tmp_path) == paths[0]
    assert capsys.readouterr().err == ""


def test_of_several_processes_one_alone_sets_aside(tmp_path: Path) -> None:
    paths = [write_text(tmp_path / files.step_name(n), weights=f"{n}") for n in (9, 10)]
    with pytest.raises(CheckpointError, match=rf"give one, as {paths[1]}\.$"):
        verify_checkpoint(tmp_path)
    truncate(paths[1] / "weights")
    assert newest_valid(tmp_path, set_aside=False) == paths[0]
    assert files.steps_in(tmp_path) == paths


# Writing


def test_a_step_is_replaced(tmp_path: Path) -> None:
    path = write_text(tmp_path / "step-00000001", weights="old", extra="old")
    write_text(path, weights="new")
    verify_checkpoint(path)
    assert (path / "weights").read_text() == "new"
    assert sorted(p.name for p in path.iterdir()) == [files.MANIFEST, "weights"]
    assert list(tmp_path.iterdir()) == [path], "nothing hidden is left"


def test_a_writer_that_fails_leaves_what_was_there(whole: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(whole, {"weights": fail})
    verify_checkpoint(whole)
    assert list(whole.parent.iterdir()) == [whole]


def test_remove(whole: Path) -> None:
    files.remove_checkpoint(whole)
    assert list(whole.parent.iterdir()) == []


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from pipeline.checkpoint import write_checkpoint

def stop(file):
    file.write_text("half")
    print(sorted(path.name for path in Path(sys.argv[1]).iterdir()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

write_checkpoint(Path(sys.argv[1]) / "step-00000002", {"a": lambda f: f.write_text("a"), "b": stop})
"""


def test_sigkill_while_writing_leaves_no_checkpoint(whole: Path) -> None:
    folder = whole.parent
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_WRITING, str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert ".step-00000002-" in killed.stdout, "it was killed while it wrote"
    assert [path.name for path in folder.glob("step-*")] == ["step-00000001"]
    assert newest_valid(folder) == whole
    written = write_text(folder / "step-00000002", a="a", b="b")
    assert sorted(folder.iterdir()) == [whole, written], "the half-written one is swept away"


KILLED_BETWEEN_RENAMES = """
import os, signal, sys
from pathlib import Path
from pipeline.directories import writing_directory

rename = Path.rename
def once(path, target):
    rename(path, target)
    os.kill(os.getpid(), signal.SIGKILL)

with writing_directory(Path(sys.argv[1])) as draft:
    (draft / "a").write_text("new")
    Path.rename = once
"""


def test_what_is_replaced_is_never_lost(whole: Path) -> None:
    """Killed while neither stands there, the next one to write finds what was there before."""
    before = sorted(whole.iterdir())
    killed = subprocess.run([sys.executable, "-c", KILLED_BETWEEN_RENAMES, whole], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not whole.exists()
    with (
        pytest.raises(directories.CheckpointNotWritten),
        directories.writing_directory(whole),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert sorted(whole.iterdir()) == before
    verify_checkpoint(whole)
    with directories.writing_directory(whole) as draft:
        (draft / "a").write_text("new")
    assert [path.name for path in whole.iterdir()] == ["a"]
    assert list(whole.parent.iterdir()) == [whole], "nothing else stays"


def test_a_disk_without_locks_takes_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")  # NFS, for a folder

    leftover = tmp_path / ".step-00000001-12345678.draft"
    leftover.mkdir()
    monkeypatch.setattr(directories.fcntl, "flock", refuse)
    path = tmp_path / "step-00000002"
    write_text(path, weights="ours")
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_that_fails_otherwise_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(directories.fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        write_text(tmp_path / "step-00000002", weights="ours")
    assert list(tmp_path.iterdir()) == []


def test_what_another_writes_is_left_to_it(tmp_path: Path) -> None:
    """To the same place, and to one whose name begins alike."""
    odd = [tmp_path / ".step-00000002-old-12345678.draft", tmp_path / ".step-1-12345678.draft"]
    for folder in odd:
        folder.mkdir()
    paths = [tmp_path / name for name in ("step-00000001", "step-00000001-gguf", "model")]
    with contextlib.ExitStack() as stack:
        drafts = [stack.enter_context(files.writing_directory(path)) for path in paths]
        for path in (*paths, tmp_path / "step-00000002"):
            write_text(path, weights="another's")
        for draft in drafts:
            (draft / "weights").write_text("ours")
    assert [(path / "weights").read_text() for path in paths] == ["ours"] * 3
    whole = [*paths, tmp_path / "step-00000002"]
    assert sorted(tmp_path.iterdir()) == sorted([*whole, *odd]), "nothing hidden is left"


# Contents


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_pickles_are_not_executed(tmp_path: Path) -> None:
    bomb = Bomb(tmp_path / "executed")
    path = tmp_path / "step-00000001"
    write_checkpoint(path, {files.TRAINING: partial(torch.save, {"step": bomb})})
    verify_checkpoint(path)  # its digest is right
    with pytest.raises(CheckpointError, match=r"training\.pt holds more than tensors"):
        files.read_training(path)
    assert not (tmp_path / "executed").exists()


def test_training_state_comes_back(tmp_path: Path) -> None:
    state = {"step": 3, "name": "Größe", "betas": (0.9, 0.95), "nested": [{"x": torch.ones(2)}]}
    write_checkpoint(tmp_path / "c", {files.TRAINING: partial(torch.save, state)})
    back = files.read_training(tmp_path / "c")
    assert torch.equal(back["nested"][0].pop("x"), state["nested"][0].pop("x"))  # type: ignore
    assert back == state


def test_meta_is_utf8_everywhere(tmp_path: Path) -> None:
    meta = {"label_names": ["垃圾", "ham"]}
    write_checkpoint(tmp_path / "c", {files.META: files.json_writer(meta)})
    assert files.read_meta(tmp_path / "c") == meta
    assert "垃圾".encode() in (tmp_path / "c" / files.META).read_bytes()


def test_tensors_digest_is_of_values_and_names() -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    digest = files.tensors_digest(tensors)
    assert files.tensors_digest({name: tensors[name] for name in "ba"}) == digest
    assert files.tensors_digest({n: t.bfloat16() for n, t in tensors.items()}) == digest  # exact
    assert files.tensors_digest({**tensors, "a": tensors["a"].T.contiguous().T}) == digest
    assert files.tensors_digest({**tensors, "a": tensors["a"].reshape(3, 2)}) != digest
    assert files.tensors_digest({"a": tensors["a"], "c": tensors["b"]}) != digest
    assert files.tensors_digest({**tensors, "b": torch.tensor([1.0, 1 + 2**-23])}) != digest
