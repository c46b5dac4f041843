"""No reference number is forgotten."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
FILE = "masked-prediction.json"


def cases_of(tree: ast.AST) -> Iterator[str]:
    """The cases that a test module asks the file for by name."""
    names = {"MASKED"} | {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and FILE in ast.unparse(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
            whole = node.value.id in names if isinstance(node.value, ast.Name) else f"{FILE}')" in ast.unparse(node.value)
            if whole:
                yield node.slice.value


def test_every_case_of_masked_prediction_is_in_a_test():
    told = {*json.loads((TESTS / "vectors" / FILE).read_text())} - {"_about"}
    sources = [path.read_text(encoding="utf-8") for path in sorted(TESTS.rglob("*.py"))]
    used = {case for source in sources if FILE in source or "MASKED" in source for case in cases_of(ast.parse(source))}
    assert len(told) == 78
    assert used == told
