"""Who may import whom inside phase1, and that the command line starts without heavy libraries."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "phase1"
LEAVES = {"config", "errors", "files", "interrupts", "vocabulary"}
MAY_IMPORT = {
    "config": set(),
    "errors": {"files"},
    "migrate": set(),
    "files": set(),
    "interrupts": set(),
    "vocabulary": set(),
    "ops": set(),
    "layers": {"ops", "vocabulary"},
    "model": {"config", "layers", "ops", "vocabulary"},
    "data": LEAVES,
    "passes": {"model"},
    "optimizers": LEAVES,
    "train": LEAVES | {"model", "ops", "optimizers", "passes"},
    "checkpoint": LEAVES | {"model", "optimizers", "train"},
    "candidates": LEAVES | {"checkpoint", "model", "record"},
    "record": LEAVES | {"migrate"},
    "journal": LEAVES,
    "compare": LEAVES | {"record"},
    "schema": LEAVES | {"migrate", "record"},
    "tables": LEAVES | {"record"},
    "report": LEAVES | {"record", "tables"},
    "measure": LEAVES | {"data", "journal", "model", "ops", "record", "train"},
    "commands": LEAVES
    | {"candidates", "checkpoint", "compare", "data", "journal", "layers", "measure", "model", "record", "report", "tables", "train"},
    "cli": LEAVES,
    "__main__": {"cli"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("phase1."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "phase1":
            yield from (a.name for a in node.names if (PACKAGE / f"{a.name}.py").exists())
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("phase1."))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part != "__init__":
        assert set(imports(path)) <= MAY_IMPORT[part] | {part}


def test_no_module_imports_the_scripts():
    assert not any(
        "scripts" in path.read_text().split("import")[0]
        for path in PACKAGE.rglob("*.py")
        if "import scripts" in path.read_text()
    )


@pytest.mark.parametrize("module", ["phase1.cli", "phase1.config", "phase1.errors", "phase1.commands"])
def test_starting_the_command_line_loads_no_heavy_library(module):
    heavy = ["torch", "numpy", "scipy", "pydantic", "datasets", "tokenizers", "matplotlib", "pandas", "tqdm"]
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["phase1.tables", "phase1.commands.tables", "phase1.commands.compare", "phase1.schema"])
def test_work_on_result_files_needs_no_torch(module):
    code = f"import sys, {module}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
