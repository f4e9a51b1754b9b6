"""How dense the code is: a table for people, not a test.

    python tests/style_report.py            # all modules and notebooks
    python tests/style_report.py --files    # each module
"""
import ast, json, statistics, sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

def code_lines(text):
    "Lines that hold code"
    return [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]

def module_paths():
    "The exported modules"
    paths = sorted((ROOT/"descgen").glob("*.py"))
    return [path for path in paths if path.name != "_modidx.py"]

def measure(paths):
    "Figures over the code of the files"
    lines, nodes = [], []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        lines += code_lines(text)
        nodes += ast.walk(ast.parse(text))
    widths = sorted(map(len, lines))
    n_too_wide = sum(width > 120 for width in widths)
    n_comprehensions = sum(isinstance(node, COMPREHENSIONS) for node in nodes)
    return {
        "code lines": len(lines),
        "95th percentile of line length": widths[int(.95*len(widths))],
        "share of lines over 120 columns, %": round(100*n_too_wide/len(widths), 1),
        "AST nodes per line": round(len(nodes)/len(lines), 1),
        "comprehensions per 100 lines": round(100*n_comprehensions/len(lines), 1)}

def measure_functions(paths):
    "Lengths of the functions in the files"
    lengths = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                lengths.append(node.end_lineno - node.lineno + 1)
    return {
        "function length, median": statistics.median(lengths),
        "function length, 90th percentile": sorted(lengths)[int(.9*len(lengths))]}

def measure_notebooks():
    "Figures over the notebooks"
    books = [json.loads(p.read_text(encoding="utf-8"))["cells"]
             for p in sorted((ROOT/"nbs").glob("*.ipynb"))]
    outputs = [sum(bool(c.get("outputs")) for c in cells) for cells in books]
    pictures = sum(
        any("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", []))
        for cells in books)
    return {"notebooks": len(books),
            "cells with a stored output, per notebook": round(statistics.mean(outputs), 1),
            "notebooks with a picture": pictures}

def print_files():
    "The figures of each module: code lines, 95th percentile, share over 120, nodes, comprehensions"
    for path in module_paths():
        values = "".join(f"{value:>8}" for value in measure([path]).values())
        print(f"{values}  {path.name}")

def print_table():
    "The figures of all modules and notebooks"
    paths = module_paths()
    found = measure(paths) | measure_functions(paths) | measure_notebooks()
    for name, value in found.items():
        print(f"{value:>8}  {name}")

if __name__ == "__main__":
    if "--files" in sys.argv[1:]:
        print_files()
    else:
        print_table()
