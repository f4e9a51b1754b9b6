"""How dense the code is: a table for people, not a test.

    python tests/style_report.py
"""
import ast, json, statistics
from pathlib import Path

ROOT = Path(__file__).parents[1]

def code_lines(text):
    "Lines that hold code"
    return [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]

def measure_modules():
    "Figures over the exported modules"
    lines, nodes, comprehensions, functions = [], 0, 0, []
    for path in sorted((ROOT/"descgen").glob("*.py")):
        if path.name == "_modidx.py":
            continue
        text = path.read_text(encoding="utf-8")
        lines += code_lines(text)
        for node in ast.walk(ast.parse(text)):
            nodes += 1
            comprehensions += isinstance(node,
                (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp))
            if isinstance(node, ast.FunctionDef):
                functions.append(node.end_lineno - node.lineno + 1)
    widths = sorted(map(len, lines))
    return {"code lines": len(lines),
        "95th percentile of line length": widths[int(.95*len(widths))],
        "share of lines over 120 columns, %": round(
            100*sum(w > 120 for w in widths)/len(widths), 1),
        "AST nodes per line": round(nodes/len(lines), 1),
        "comprehensions per 100 lines": round(100*comprehensions/len(lines), 1),
        "function length, median": statistics.median(functions),
        "function length, 90th percentile": sorted(functions)[int(.9*len(functions))]}

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

if __name__ == "__main__":
    for name, value in (measure_modules() | measure_notebooks()).items():
        print(f"{value:>8}  {name}")
