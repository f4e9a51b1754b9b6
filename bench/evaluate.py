"""`descgen evaluate` on another file: the time of the whole command.

    python -m bench evaluate ADAPTER ROWS.jsonl
"""
import subprocess
import sys
from pathlib import Path

from .markdown import circumstances, markdown_table
from .measure import ROOT, interleaved, medians, save_result, seconds

def add_options(parser):
    parser.add_argument("adapter", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--rounds", type=int, default=1)

def run(args):
    words = ["evaluate", "--adapter", args.adapter.resolve(), "--data", args.rows.resolve()]
    command = [sys.executable, "-c", "from descgen.cli import app; app()", *map(str, words)]
    def evaluate():
        return seconds(
            lambda: subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL))
    found = interleaved({"seconds": evaluate}, args.rounds)
    save_result(args.results, "evaluate", medians(found), found, args.rounds)

def tables(read):
    record = read("evaluate")
    if not record:
        return {}
    minutes, rest = divmod(round(record["summary"]["seconds"]), 60)
    table = markdown_table(["command", "time"], [["`descgen evaluate`", f"{minutes} min {rest} s"]])
    return {"evaluate": [circumstances(record, "torch"), "", *table]}
