"""The modelling code of an encoder as one file that needs only torch and transformers."""

from __future__ import annotations

import ast
import importlib
import inspect

CORE = (
    "mmssl.types",
    "mmssl.model.attention",
    "mmssl.model.recompute",
    "mmssl.model.transformer",
    "mmssl.model.positions",
    "mmssl.model.configuration",
    "mmssl.model.encoder",
    "mmssl.model.backbone",
)
MODELS = ("mmssl.model.modeling", "mmssl.model.tasks")


def flatten(*features_modules: str) -> str:
    """Source of the core's model files and the modalities' features, each once, imports gathered, our own left out.

    Raises: ValueError if one of them imports something that a stranger's machine lacks, or two define the same name.
    """
    imports: set[str] = set()
    bodies, homes = [], {}
    for name in dict.fromkeys((*CORE, *features_modules, *MODELS)):
        source = inspect.getsource(importlib.import_module(name))
        lines = source.splitlines()
        tree = ast.parse(source)
        drop: set[int] = set()
        for defined in _defined(tree):
            if homes.setdefault(defined, name) != name:
                raise ValueError(f"{homes[defined]} and {name} both define {defined}, and model code is one file; rename one")
        for i, node in enumerate(tree.body):
            docstring = i == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if docstring or isinstance(node, ast.Import | ast.ImportFrom):
                drop.update(range(node.lineno - 1, (node.end_lineno or node.lineno)))
            if isinstance(node, ast.Import | ast.ImportFrom) and not _ours(node, name):
                imports.add(ast.unparse(node))
        bodies.append("\n".join(line for i, line in enumerate(lines) if i not in drop).strip())
    imports.discard("from __future__ import annotations")
    head = '"""Encoder trained with mmssl (Apache-2.0). Made by its export; needs torch and transformers only."""\n\n'
    head += "from __future__ import annotations\n\n" + "\n".join(sorted(imports))
    return head + "\n\n\n" + "\n\n\n".join(bodies) + "\n"


def _defined(tree: ast.Module) -> set[str]:
    """Names at the top of a module, imports left out."""
    found = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    targets = [t for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
    targets += [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
    return found | {leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}


def _ours(node: ast.Import | ast.ImportFrom, where: str) -> bool:
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    tops = {name.split(".")[0] for name in names}
    if tops & {"mmssl", "modalities"}:
        return True
    strangers = tops - {"torch", "transformers"} - set(__import__("sys").stdlib_module_names)
    if strangers:
        raise ValueError(f"{where} imports {', '.join(sorted(strangers))}; model code may need torch and transformers only")
    return False
