"""Who may import whom inside phase1, and that the command line starts without heavy libraries."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "phase1"
LEAVES = {"advice", "device", "errors", "files", "progress", "text", "signals", "world"}
SETTINGS = {"config", "presets", "roster", "runs"}
MAY_IMPORT = {
    "text": set(),
    "signals": set(),
    "world": set(),
    "errors": {"text", "world"},
    "files": {"text", "world"},
    "parallel": LEAVES,
    "factory": {"errors"},
    "config": {"factory", "text"},
    "presets": set(),
    "roster": {"config", "factory"},
    "runs": {"config", "factory", "machine", "presets", "roster"},
    "advice": set(),
    "device": set(),
    "tensor_names": set(),
    "cli": LEAVES | SETTINGS | {"factory", "parallel"},
    "__main__": {"cli"},
    "ops": {"files", "world"},  # to keep the answers of checks of kernels, and say once that they are asked
    "progress": set(),
    "vocabulary": {"progress"},
    "layers": {"ops", "vocabulary"},
    "model": {"config", "layers", "ops", "vocabulary"},
    "trainable": {"config", "factory", "model", "ops", "vocabulary"},
    "data": LEAVES | {"config"},
    "training": LEAVES | {"config", "data", "model", "ops", "parallel", "records", "tensor_names", "trainable", "vocabulary"},
    "machine": LEAVES | {"config"},
    "records": LEAVES | {"config", "machine", "roster"},
    "stats": {"records"},
    "checks": {"machine", "records", "roster", "stats"},
    "tables": {"config", "machine", "presets", "records", "roster", "text"},
    "generation": {"config", "data", "device", "layers", "model", "trainable", "training"},
    "hf": {"config", "layers", "model", "ops", "tensor_names"},
    "lm_eval": {"hf", "ops"},
    "plots": {"files", "records", "roster", "tables", "text"},
    "page": {"checks", "errors", "plots", "records", "tables", "text"},
    "measure": LEAVES
    | SETTINGS
    | {"data", "generation", "machine", "model", "ops", "parallel", "records", "stats", "trainable", "training"},
    "commands": LEAVES
    | SETTINGS
    | {"checks", "data", "factory", "generation", "machine", "measure", "model", "page", "parallel", "plots", "records", "stats"}
    | {"tables", "trainable", "training"},
}
WINGS = {
    "execution": set(),
    "workload": set(),
    "soundness": {"workload"},
    "memory": {"execution", "workload"},
    "throughput": {"execution", "workload", "memory.estimate.allocator"},  # which rounds sizes as the CUDA allocator does
    "perplexity": {"soundness.check"},
}


def modules(path):
    """Every module of phase1 that the file at `path` imports, anywhere in it, by its dotted name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "phase1":
            names = [f"{node.module}.{a.name}" for a in node.names]
            yield from (name if is_module(name) else node.module for name in names)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("phase1."))


def libraries(path):
    """Every library that the file at `path` imports, in either form and anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def is_module(name):
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imports(path):
    return {name.split(".")[1] for name in modules(path) if "." in name}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part != "__init__":
        assert imports(path) <= MAY_IMPORT[part] | {part}


@pytest.mark.parametrize("path", sorted((PACKAGE / "measure").rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_wings_of_measure_know_each_other_only_by_the_step_they_share(path):
    wing = path.relative_to(PACKAGE / "measure").parts[0].removesuffix(".py")
    inside = {name.removeprefix("phase1.measure.") for name in modules(path) if name.startswith("phase1.measure.")}
    others = {name for name in inside if name.split(".")[0] != wing}
    assert wing == "__init__" or others <= WINGS[wing]


def test_no_command_imports_another():
    for path in (PACKAGE / "commands").glob("*.py"):
        assert not any(name.startswith("phase1.commands") for name in modules(path))


def test_one_place_decides_where_models_run():
    choose = [path.name for path in PACKAGE.rglob("*.py") if '"cuda" if' in path.read_text()]
    assert choose == ["device.py"]


def test_no_private_name_crosses_a_file():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("phase1"):
                assert not [a.name for a in node.names if a.name.startswith("_") and not a.name.endswith("__")], path


def test_only_its_user_imports_the_part_for_transformers():
    for path in PACKAGE.rglob("*.py"):
        assert path.name == "hf.py" or "transformers" not in libraries(path), path
        assert path.name in ("hf.py", "lm_eval.py") or not {"phase1.hf", "phase1.lm_eval"} & set(modules(path)), path


@pytest.mark.parametrize(
    "line", ["import transformers.utils as u", "from transformers import X", "from transformers.utils import X"]
)
def test_every_form_of_an_import_is_seen(tmp_path, line):
    (tmp_path / "a.py").write_text(f"def f():\n    try:\n        {line}\n    except ImportError:\n        pass\n")
    assert list(libraries(tmp_path / "a.py")) == ["transformers"]


def test_no_module_imports_the_scripts():
    assert not any(
        "scripts" in path.read_text().split("import")[0]
        for path in PACKAGE.rglob("*.py")
        if "import scripts" in path.read_text()
    )


@pytest.mark.parametrize("module", ["phase1.cli", "phase1.runs", "phase1.errors", "phase1.commands"])
def test_starting_the_command_line_loads_no_heavy_library(module):
    heavy = ["torch", "numpy", "scipy", "pydantic", "datasets", "tokenizers", "matplotlib", "pandas", "tqdm"]
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_public_names_load_nothing_until_they_are_used():
    code = """
import sys, phase1
assert not [m for m in sys.modules if m.startswith("phase1.") or m.split(".")[0] in ("torch", "numpy", "pydantic")]
assert set(phase1.__all__) <= set(dir(phase1))
assert phase1.Key.__module__ == "phase1.roster" and "torch" not in sys.modules
assert phase1.load_model.__module__ == "phase1.training.checkpoint" and "torch" in sys.modules
assert all(getattr(phase1, name) is getattr(phase1, name) for name in phase1.__all__)
try:
    phase1.no_such_name
except AttributeError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "module 'phase1' has no attribute 'no_such_name'"


@pytest.mark.parametrize(
    "path",
    sorted(path for part in ("records", "stats", "checks", "tables", "plots", "page") for path in (PACKAGE / part).glob("*.py")),
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_work_on_result_files_imports_no_torch(path):
    assert "torch" not in libraries(path)


def test_work_on_result_files_loads_no_torch():
    parts = ["records.json_schema", "records.journal", "stats.scaling", "stats.perplexity_ratio"]
    parts += [f"checks.{name}" for name in ("memory", "throughput", "perplexity", "controls", "regression", "limits")]
    parts += ["tables.console", "plots", "commands.tables", "commands.compare", "commands.report"]
    code = f"import sys, importlib; [importlib.import_module('phase1.' + p) for p in {parts}]; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
