"""What no kernel may say, because a compiler is known to translate it wrongly."""

import ast
from pathlib import Path

import pytest

import phase1.ops

KERNELS = [path for path in Path(phase1.ops.__file__).parent.rglob("*.py") if "@triton.jit" in path.read_text()]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_nothing_is_transposed_in_a_kernel(path):
    """Triton 3.4 to 3.7.0 miscompiles transposed accumulators on Hopper."""
    assert "tl.trans(" not in path.read_text()


def handed_on(source: str) -> list[str]:
    """Names that a loop sets to another name which had the same value before it, as in `b = a = 0; loop: a, b = b, new`."""
    found = []
    for function in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)):
        pairs = [(t, v, in_loop) for node, in_loop in _assignments(function, False) for t, v in _pairs(node)]
        start = {t: v for t, v, in_loop in reversed(pairs) if not in_loop}
        found += [t for t, v, in_loop in pairs if in_loop and t != v and t in start and start[t] == start.get(v)]
    return found


def _assignments(node: ast.AST, in_loop: bool):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Assign):
            yield child, in_loop
        yield from _assignments(child, in_loop or isinstance(child, (ast.For, ast.While)))


def _pairs(node: ast.Assign):
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from ((ast.unparse(t), ast.unparse(v)) for t, v in zip(target.elts, node.value.elts))
        else:
            yield ast.unparse(target), ast.unparse(node.value)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_loop_hands_on_values_that_start_equal(path):
    """Triton 3.6 to 3.9 makes one value of them."""
    assert handed_on(path.read_text()) == []


@pytest.mark.parametrize(
    "body, names",
    [
        ("    c, b, a = zero, zero, zero\n    for i in range(n):\n        c, b, a = b, a, load(i)", ["c", "b"]),
        ("    b = tl.zeros([4])\n    a = tl.zeros([4])\n    while i < n:\n        if i:\n            b = a\n        a = load(i)", ["b"]),
        ("    b, a = load(0), load(1)\n    for i in range(n):\n        b, a = a, load(i)", []),
        ("    b, a = zero, zero\n    for i in range(n):\n        b, a = a + load(i), load(i)", []),
    ],
)
def test_the_search_finds_them(body, names):
    assert handed_on(f"def kernel(n):\n{body}\n") == names
