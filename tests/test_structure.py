"""Imports go from lower to higher chapters, and no chapter uses another's private names."""
import ast, json, re
from pathlib import Path

import pytest

from conftest import ROOT

def chapters():
    "Module names in the order of their chapters"
    found = []
    for path in sorted((ROOT/"nbs").glob("[0-9]*.ipynb")):
        sources = ["".join(c["source"])
                   for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]
        found += [m[1] for s in sources if (m := re.search(r"default_exp (\w+)", s))]
    return found

def imports_of(module):
    "Pairs of another module and a name that this one imports from it"
    tree = ast.parse((ROOT/"descgen"/f"{module}.py").read_text(encoding="utf-8"))
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    named = [(n, (n.module or "").removeprefix("descgen").lstrip("."))
             for n in nodes if n.level or (n.module or "").startswith("descgen.")]
    return [(other, a.name) for node, other in named for a in node.names if other]

@pytest.mark.parametrize("module", chapters())
def test_imports_go_from_low_to_high(module):
    order = chapters()
    later = [other for other, _ in imports_of(module) if order.index(other) >= order.index(module)]
    assert later == []

@pytest.mark.parametrize("module", chapters())
def test_no_private_name_is_imported(module):
    assert [name for _, name in imports_of(module) if name.startswith("_")] == []

NOTEBOOKS = [*sorted((ROOT/"nbs").glob("*.ipynb")), ROOT/"fine_tune_llama3.ipynb"]

@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_have_no_path_of_a_machine(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    outputs = json.dumps([cell.get("outputs", []) for cell in cells])
    assert "site-packages" not in outputs and f"{ROOT}/" not in outputs
