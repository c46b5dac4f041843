"""Which file may import which. Read from the source, so that an import inside a function counts as well."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from mmssl.hub.flatten import CORE, MODELS

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("mmssl", "modalities")
    for path in sorted((ROOT / package).rglob("*.py"))
}

# Lowest floor first: a module imports from its own floor or from those below. `mmssl/__init__.py` is the front door.
FLOORS = [
    ["types", "errors", "random", "files", "redaction", "masks", "crops", "stage", "allocator"],
    ["schedules", "registry", "distributed", "batch_ops", "lars"],
    ["model"],
    ["losses", "parts"],
    ["methods"],
    ["config"],
    ["data"],
    ["hub"],
    ["evaluate"],
    ["training", "report"],
    ["finetune"],
    ["cli", "__main__"],
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def imports(name: str) -> set[str]:
    """Modules that a module imports, wherever in its source; `from package import module` gives the module."""
    path, found = FILES[name], set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {i if i in FILES else str(node.module) for i in inner}
    return found


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in ("mmssl", "modalities", "recipes", "tools", "tests")}


def test_the_source_was_found():
    assert len(FILES) > 40
    assert "mmssl.losses" in imports("mmssl.methods.data2vec2")  # `from mmssl import losses`
    assert "mmssl.training.pretrain" in imports("mmssl.cli.pretrain")  # within a function


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("mmssl.")])
def test_imports_go_down(name):
    own = FLOOR[name.split(".")[1]]
    for other in ours(imports(name)) - {"mmssl"}:
        assert FLOOR[other.split(".")[1]] <= own, f"{name} imports {other} from a floor above"


@pytest.mark.parametrize("folder", ["methods", "losses", "parts", "model"])
def test_siblings_of_a_floor_are_met_through_their_package_or_within_it(folder):
    for name in FILES:
        if name.split(".")[1:2] == [folder]:
            beside = {n for n in FLOORS[FLOOR[folder]] if n != folder}
            assert not {other.split(".")[1] for other in ours(imports(name)) - {"mmssl"}} & beside


def test_no_method_imports_another():
    methods = {name for name in FILES if name.startswith("mmssl.methods.")} - {
        f"mmssl.methods.{shared}" for shared in ("method", "normal", "families", "several")
    }
    for name in methods:
        assert not imports(name) & methods, name


@pytest.mark.parametrize("name", [n for n in FILES if n.split(".")[0] == "mmssl"])
def test_the_core_imports_no_modality(name):
    assert not {other for other in imports(name) if other.split(".")[0] in ("modalities", "recipes", "tools", "tests")}


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("modalities")])
def test_a_modality_imports_types_random_model_and_registry_and_no_other_modality(name):
    own = ".".join(name.split(".")[:2])
    for other in ours(imports(name)):
        allowed = ("mmssl.types", "mmssl.random", "mmssl.masks", "mmssl.crops", "mmssl.model", "mmssl.registry", own)
        assert any(other == a or other.startswith(f"{a}.") for a in allowed), f"{name} imports {other}"


@pytest.mark.parametrize("name", [*CORE, *MODELS, *(n for n in FILES if n.startswith("modalities") and n.endswith("features"))])
def test_exported_model_code_needs_torch_and_transformers_only(name):
    for other in imports(name):
        top = other.split(".")[0]
        inside = other in ("mmssl.types", "mmssl.random") or other.startswith("mmssl.model.")
        assert inside or top in {"torch", "transformers", *sys.stdlib_module_names}, f"{name} imports {other}"


def test_the_auto_classes_know_our_model_whatever_was_imported_first():
    """Loading them registers it, which imports files that may be in the midst of being imported."""
    code = (
        "import {first}\nfrom transformers import AutoModel\nfrom mmssl.model.configuration import MmsslConfig\n"
        "config = MmsslConfig(hidden_size=8, depth=1, heads=2, image_size=8, patch_size=4)\n"
        "assert type(AutoModel.from_config(config)).__name__ == 'MmsslModel'"
    )
    for first in ("mmssl.model.backbone", "mmssl.model.tasks"):
        done = subprocess.run([sys.executable, "-c", code.format(first=first)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]


HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not HUGE.is_file() or "[never]" in HUGE.read_text(), reason="this kernel gives no huge pages")
@pytest.mark.parametrize("first", ["torch", "mmssl"])
def test_large_tensors_lie_in_huge_pages(first):
    code = f"import {first}, mmssl, torch; x = torch.ones(2**24); print(open('/proc/self/smaps_rollup').read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (kilobytes,) = (int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("AnonHugePages"))
    assert kilobytes > 2**15  # half of the tensor
