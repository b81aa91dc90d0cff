"""Import directions: notebooks, tests, benchmarks -> pipeline -> datamodules -> third party."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIGHTNING_MODULES = {
    f"pipeline.training.lit_{name}"
    for name in ("model", "checkpoint", "step", "language_model", "classifier")
}
MAY_IMPORT_THEM = {"cli", "options", "checkpoint_callback"} | {
    module.rpartition(".")[2] for module in LIGHTNING_MODULES
}
TORCH_ONLY = {  # and each other
    *("classifier", "gpt", "loss", "training.flops"),
    *(
        f"{folder}.{path.stem}"
        for folder, others in (("decoding", ("text_stream",)), ("layers", ("fused_lora",)))
        for path in (ROOT / "pipeline" / folder).glob("*.py")
        if path.stem not in ("__init__", *others)
    ),
}
BELOW = {  # folder -> what it knows nothing of
    "layers": ("decoding", "runs", "training", "stages", "serving", "evaluation", "weights"),
    "decoding": ("runs", "training", "stages", "serving", "evaluation", "weights"),
    "runs": ("decoding", "training", "stages", "serving", "evaluation", "weights"),
    "weights": ("training", "stages", "serving", "evaluation"),
    "evaluation": ("training", "stages", "serving"),
    "training": ("stages", "serving"),
    "serving": ("stages",),
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("path", files("datamodules"), ids=lambda path: path.stem)
def test_datamodules_never_import_pipeline(path: Path) -> None:
    assert not [name for name in imports(path) if name.split(".")[0] == "pipeline"]


@pytest.mark.parametrize("path", files("pipeline"), ids=lambda path: path.stem)
def test_only_the_command_line_imports_lightning_modules(path: Path) -> None:
    if path.stem not in MAY_IMPORT_THEM:
        assert not imports(path) & LIGHTNING_MODULES


@pytest.mark.parametrize("folder", BELOW)
def test_folders_know_nothing_of_those_above(folder: str) -> None:
    above = tuple(f"pipeline.{name}" for name in BELOW[folder])
    found = {
        n for path in files(f"pipeline/{folder}") for n in imports(path) if n.startswith(above)
    }
    assert not found


@pytest.mark.parametrize("name", sorted(TORCH_ONLY))
def test_the_model_needs_torch_alone(name: str) -> None:
    ours = {f"pipeline.{other}" for other in TORCH_ONLY}
    third = {
        module
        for module in imports(ROOT / "pipeline" / f"{name.replace('.', '/')}.py")
        if not any(module == o or module.startswith(f"{o}.") for o in ours)
    }
    allowed = {
        "torch",
        "math",
        "dataclasses",
        "typing",
        "collections",
        "functools",
        "copy",
        "__future__",
    }
    assert {module.split(".")[0] for module in third} <= allowed
