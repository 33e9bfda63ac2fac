"""The shape of the house, counted: files, functions, comments, import circles.

These figures are habits. Where one fails, a file or a function has grown into two, or a file of a few lines has been
split off that its reader would rather see where it is used.
"""

import ast
import io
import statistics
import tokenize
from pathlib import Path

import foley

PACKAGE = Path(foley.__file__).parent
MOST_FILES = 277
LONGEST_FILE = 500  # lines
SHORTEST_FILE = 40  # lines, unless it is named below
LONGEST_FUNCTION = 48  # lines, signature and docstring included
MEDIAN_FUNCTION = 7
ROOMS_OF_MATHS = ("accel", "diffusion", "models", "nn")
FEWEST_COMMENTS = 7  # comment lines in 100 lines of those rooms
SHORT_FILES = {
    "__main__.py": "`python -m foley` is the command",
    "core/logs.py": "everything logs; it belongs to no other file",
    "metrics/references.py": "the one place where metrics read manifests, which the layers allow it alone",
    "nn/norm.py": "attention and AdaLN, which do not know each other, both norm",
}
"""Files of under `SHORTEST_FILE` lines, each with its reason."""


def source_files() -> dict[str, Path]:
    """Name relative to the package to file, without `__init__.py`."""
    files = sorted(file for file in PACKAGE.rglob("*.py") if file.name != "__init__.py")
    return {file.relative_to(PACKAGE).as_posix(): file for file in files}


def num_lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def function_lengths(text: str, name: str = "") -> dict[str, int]:
    """Every function and method of a source text to its lines, from `def` to its last statement."""
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {f"{name}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1 for node in functions}


def count_comments(text: str) -> int:
    """Lines that hold a comment, whole or at their end; what a linter is told does not count."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type == tokenize.COMMENT and "noqa" not in token.string for token in tokens)


def imported_at_the_top(module: str, text: str) -> set[str]:
    """Names of `foley` that a module imports as it is loaded: not in functions, nor for type checkers alone."""
    names: set[str] = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in names if name.startswith("foley.") and name != module}


def nearest_module(name: str, modules: set[str]) -> str | None:
    """The module that the import of a name loads: itself, or what defines it."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def import_circles(texts: dict[str, str]) -> list[list[str]]:
    """Circles among modules, name to source text, by a search that goes from each module as deep as it can."""
    modules = set(texts)
    edges = {
        module: {nearest_module(name, modules) for name in imported_at_the_top(module, text)} - {None, module}
        for module, text in texts.items()
    }
    circles: list[list[str]] = []
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            circles.append([*path[path.index(module) :], module])
        elif module not in done:
            for target in sorted(edges[module]):
                visit(target, [*path, module])
            done.add(module)

    for module in sorted(texts):
        visit(module, [])
    return circles


def test_there_are_not_too_many_files():
    assert len(source_files()) <= MOST_FILES


def test_no_file_is_too_long():
    assert {name: num_lines(file) for name, file in source_files().items() if num_lines(file) > LONGEST_FILE} == {}


def test_short_files_have_a_reason():
    short = {name for name, file in source_files().items() if num_lines(file) < SHORTEST_FILE}
    assert short - set(SHORT_FILES) == set(), "fold it into the file that uses it, or give its reason in SHORT_FILES"
    assert set(SHORT_FILES) <= set(source_files()), "SHORT_FILES names a file that is gone"


def test_functions_are_short():
    lengths: dict[str, int] = {}
    for name, file in source_files().items():
        lengths |= function_lengths(file.read_text(encoding="utf-8"), name)
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION} == {}
    assert statistics.median(lengths.values()) <= MEDIAN_FUNCTION


def test_the_maths_is_commented():
    texts = [file.read_text(encoding="utf-8") for room in ROOMS_OF_MATHS for file in (PACKAGE / room).rglob("*.py")]
    lines, comments = sum(len(text.splitlines()) for text in texts), sum(map(count_comments, texts))
    assert 100 * comments / lines >= FEWEST_COMMENTS, f"{comments} comments in {lines} lines of {ROOMS_OF_MATHS}"


def test_no_import_circle():
    texts = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        texts[module] = file.read_text(encoding="utf-8")
    assert import_circles(texts) == []


def test_the_counts_count():
    text = "def f(x):\n    '''Doc.'''\n    return x  # why\n\n# whole\nX = 1  # noqa: E501\n"
    assert function_lengths(text, "a.py") == {"a.py:1 f": 3}
    assert count_comments(text) == 2


def test_a_circle_is_found():
    texts = {"foley.a": "from foley.b import x\n", "foley.b": "import foley.c\n", "foley.c": "from foley import a\n"}
    assert import_circles(texts) == [["foley.a", "foley.b", "foley.c", "foley.a"]]
    texts["foley.c"] = "def late():\n    from foley import a\n"
    assert import_circles(texts) == []
