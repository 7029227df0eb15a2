"""Imports go one way: kernels < passes < runtime < moe_compiler, and no cycles inside a folder."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "passes", "runtime", "moe_compiler")


def modules() -> dict[str, Path]:
    found = {}
    for folder in FOLDERS:
        prefix = "moe_compiler" if folder == "moe_compiler" else f"moe_compiler.{folder}"
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((prefix, *(part for part in parts if part != "__init__")))] = path
    return found


def imports(path: Path) -> set[str]:
    """Modules of the project that the file imports when it is imported itself (type-checking blocks aside)."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for block in ast.walk(tree):
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING":
            block.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def level(module: str) -> int:
    parts = module.split(".")
    return FOLDERS.index(parts[1]) if len(parts) > 1 and parts[1] in FOLDERS else FOLDERS.index("moe_compiler")


def test_no_module_imports_a_higher_layer() -> None:
    known = modules()
    wrong = [
        f"{name} imports {imported}"
        for name, path in known.items()
        for imported in imports(path) & known.keys()
        if level(imported) > level(name)
    ]
    assert not wrong


def test_there_are_no_cycles() -> None:
    known = modules()
    graph = {name: (imports(path) & known.keys()) - {name, "moe_compiler"} for name, path in known.items()}
    assert set(TopologicalSorter(graph).static_order()) >= known.keys()


def test_bare_folder_names_are_not_importable() -> None:
    names = {name.split(".")[0] for path in modules().values() for name in imports(path)}
    assert not names & {"kernels", "passes", "runtime"}


def test_files_stay_short() -> None:
    long = {str(path): n for path in ROOT.rglob("*.py") if (n := len(path.read_text().splitlines())) > 500}
    assert not {path: n for path, n in long.items() if "/.venv/" not in path and "/build/" not in path}
