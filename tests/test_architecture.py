"""Who may import whom, and what may not be imported before it is needed."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "evla_cli"

# Top to bottom: a unit imports what stands below it, nothing above it, and nothing beside it.
LAYERS = [
    {"cli"},
    {"running"},
    {"pipeline"},
    {"bundling", "checking", "choosing", "comparison", "evaluation", "refitting"},
    {"runtime", "vision"},
    {"models", "methods"},
    {"families"},
    {"plan", "settings", "calibration"},
    {"checkpoint"},
    {"ranks"},
    {"schema", "progress"},
    {"errors", "versions"},
]
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}
# A family is data about a model; the functions among its fields build that model when they are called.
LAZY_EXCEPTIONS = {("families", "models")}


def files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or not path.name.startswith("__")]


def unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """Modules of the package that a file imports, and whether it does so inside a function."""
    found = _imports(ast.parse(path.read_text()), inside=False)
    return [(name, lazy) for name, lazy in found if name != "evla_cli.__version__"]


def _imports(tree: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.expr) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("evla_cli"):
            names = [node.module] if "." in node.module else [f"evla_cli.{alias.name}" for alias in node.names]
            yield from ((name, inside) for name in names)
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names if alias.name.startswith("evla_cli"))
        yield from _imports(node, inside or isinstance(node, ast.FunctionDef))


def test_every_unit_has_a_level():
    assert {unit(path) for path in files()} == set(LEVEL)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    here = unit(path)
    for name, lazy in imports(path):
        there = name.split(".")[1]
        allowed = there == here or LEVEL[there] > LEVEL[here] or (lazy and (here, there) in LAZY_EXCEPTIONS)
        assert allowed, f"{here} imports {name}"


def test_commands_do_not_import_each_other():
    for path in (PACKAGE / "cli").glob("*.py"):
        siblings = {name for name, _ in imports(path) if name.startswith("evla_cli.cli")}
        assert path.name == "main.py" or siblings <= {"evla_cli.cli.options"}


@pytest.mark.parametrize("heavy", ["torch", "transformers", "numpy", "PIL"])
def test_light_modules_stay_light(heavy, light_modules):
    assert heavy not in light_modules


@pytest.fixture(scope="module")
def light_modules() -> set[str]:
    names = ["cli.main", "settings", "plan", "schema", "errors", "calibration", "progress"]
    code = "import sys\n" + "".join(f"import evla_cli.{name}\n" for name in names) + "print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_methods_know_no_family_and_no_files():
    """Tensor maths: whatever needs a family's name lacks a field in `ModelFamily`."""
    for path in (PACKAGE / "methods").glob("*.py"):
        text = path.read_text().lower()
        code = "\n".join(line.split("#")[0] for line in text.splitlines())
        assert "families" not in code, path.name
        assert "open(" not in code, path.name
