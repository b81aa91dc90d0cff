"""The import arrows: notebooks, tests, benchmarks -> pipeline -> datamodules -> third party."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIGHTNING_MODULES = {"pipeline.lit_base", "pipeline.lit_language_model", "pipeline.lit_classifier"}
MAY_IMPORT_THEM = {"cli", "checkpointing", *(m.rpartition(".")[2] for m in LIGHTNING_MODULES)}
TORCH_ONLY = {  # and each other
    "classifier",
    "attention_products",
    "generate",
    "gpt",
    "guessing",
    "kv_cache",
    "logprobs",
    "loss",
    "packed",
    "passes",
    "prefix_cache",
    "rotary",
    "sampling",
    "step_graph",
    "unpadding",
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


@pytest.mark.parametrize("name", sorted(TORCH_ONLY))
def test_the_model_needs_torch_alone(name: str) -> None:
    ours = {f"pipeline.{other}" for other in TORCH_ONLY}
    third = {
        module
        for module in imports(ROOT / "pipeline" / f"{name}.py")
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
