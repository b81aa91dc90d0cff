"""The notebooks run from top to bottom and are committed with their outputs.

As committed they train until there is something to see; here they train a tenth of that, all in one
kernel, cleared between notebooks, since a new kernel would spend long on imports.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import KernelManager, start_new_kernel
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = ["01_pretraining", "02_spam", "03_instruction", "04_evaluation"]
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|tmp|home|Users|private|var|opt|mnt)/\S*")
MAX_BYTES = 1_000_000
MAX_FUNCTION_LINES = 5
MIN_IMAGES = 2
FEW_STEPS = ["--trainer.max_steps=12", "--trainer.val_check_interval=6"]
FEW_STEPS += ["--trainer.check_val_every_n_epoch=null"]
SHORTER = {  # what the notebooks say -> what the tests run
    '"--trainer.max_steps=400"': '"--trainer.max_steps=40"',
    '"--trainer.val_check_interval=100"': '"--trainer.val_check_interval=20"',
    '"--trainer.max_epochs=3"': str(FEW_STEPS)[1:-1],
    '"--trainer.max_epochs=4"': str(FEW_STEPS)[1:-1],
    '"--data.batch_size=16"': '"--data.batch_size=4"',
}

each_notebook = pytest.mark.parametrize("name", NAMES)


def read(name: str) -> NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def texts(notebook: NotebookNode) -> list[str]:
    """All that outputs say in words."""
    said = [output.get("text", "") for output in outputs(notebook)]
    data = [output.get("data", {}) for output in outputs(notebook)]
    return said + [d[kind] for d in data for kind in ("text/plain", "text/html") if kind in d]


def functions(cell: NotebookNode) -> list[ast.FunctionDef]:
    python = "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
    return [node for node in ast.walk(ast.parse(python)) if isinstance(node, ast.FunctionDef)]


def assert_worth_reading(notebook: NotebookNode) -> None:
    """Every cell was executed, in order; there are plots, no errors, no warnings, no paths."""
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [o for o in outputs(notebook) if o.output_type == "error"] == []
    assert [o.text for o in outputs(notebook) if o.get("name") == "stderr"] == []
    images = [o for o in outputs(notebook) if "image/png" in o.get("data", {})]
    assert len(images) >= MIN_IMAGES
    assert [path for text in texts(notebook) for path in MACHINE_PATH.findall(text)] == []


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of all notebooks: the later ones find what the earlier ones trained."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def kernel(home: Path) -> Iterator[KernelManager]:
    """What the notebooks run in, with runs of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT_PIPELINE_HOME", str(home))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        manager, client = start_new_kernel(kernel_name="python3", cwd=str(FOLDER))
    client.stop_channels()
    yield manager
    manager.shutdown_kernel(now=True)


def test_all_notebooks_are_known() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@each_notebook
def test_committed_notebook_carries_its_outputs(name: str) -> None:
    assert_worth_reading(read(name))
    assert (FOLDER / f"{name}.ipynb").stat().st_size < MAX_BYTES


@each_notebook
def test_first_cell_asks_and_last_one_concludes(name: str) -> None:
    first, last = read(name).cells[0], read(name).cells[-1]
    assert (first.cell_type, last.cell_type) == ("markdown", "markdown")
    for said in ("# ", "**Question.**", "**Inputs.**", "**Run time.**"):
        assert said in first.source
    assert re.match(r"## Conclusion\n\n\S", last.source)


@each_notebook
def test_functions_are_short(name: str) -> None:
    defined = [function for cell in code_cells(read(name)) for function in functions(cell)]
    lines = {f.name: (f.end_lineno or f.lineno) - f.lineno + 1 for f in defined}
    assert {name: n for name, n in lines.items() if n > MAX_FUNCTION_LINES} == {}


def shortened(notebook: NotebookNode) -> NotebookNode:
    """The same notebook without outputs, training for less long."""
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
        for words, fewer in SHORTER.items():
            cell.source = cell.source.replace(words, fewer)
    return notebook


def test_every_training_is_shortened() -> None:
    everything = "".join(cell.source for name in NAMES for cell in code_cells(read(name)))
    sizes = r"\"--(?:trainer\.(?:max_\w+|val_check_interval)|data\.batch_size)=\d+\""
    assert set(re.findall(sizes, everything)) == set(SHORTER)


@each_notebook
def test_notebook_runs(name: str, home: Path, kernel: KernelManager) -> None:
    forget = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("%reset -f")])
    notebook = shortened(read(name))
    for cells in (forget, notebook):
        NotebookClient(cells, timeout=600, km=kernel).execute()
    assert_worth_reading(notebook)
    assert [text for text in texts(notebook) if str(home) in text] == []
