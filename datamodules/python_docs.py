"""The English prose that every Python installation carries: a corpus without a download."""

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

_NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def python_docs() -> Iterator[tuple[str, str]]:
    """Names and texts of the language reference's topics and of the standard library's docstrings.

    Read with `ast`, never imported. A document is a topic that is not part of another one, or all
    docstrings of a module, so that related texts fall on one side of a split.

    Raises:
        FileNotFoundError: if this Python was installed without its sources.
    """
    library = Path(sysconfig.get_path("stdlib"))
    topics = library / "pydoc_data" / "topics.py"
    if not topics.is_file():
        raise FileNotFoundError(
            f"this Python has no {topics}; install its full standard library "
            "or give another data.source than bundled:python-docs."
        )
    yield from _topics(topics)
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if not _NOT_PROSE & set(relative.parts) and (text := _docstrings(path)):
            yield ".".join(relative.with_suffix("").parts), text


def _topics(path: Path) -> Iterator[tuple[str, str]]:
    table = next(node for node in ast.walk(_parse(path)) if isinstance(node, ast.Dict))
    topics = {name: text.strip() for name, text in ast.literal_eval(table).items()}
    for name, text in topics.items():
        body = text.partition("\n\n")[2]  # without the heading, whose underline differs
        if not any(body in other and len(text) < len(other) for other in topics.values()):
            yield f"topics.{name}", text


def _docstrings(path: Path) -> str:
    tree = _parse(path)
    texts = [ast.get_docstring(node) for node in (tree, *_definitions(tree))]
    return "\n\n".join(text for text in texts if text)


def _definitions(parent: ast.AST) -> Iterator[_Definition]:
    """Classes and functions at any depth, in the file's order."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.expr):  # most nodes are expressions, and hold no definition
            continue
        if isinstance(node, _Definition):
            yield node
        yield from _definitions(node)


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # old escapes in the library's own strings
        return ast.parse(path.read_bytes())
