"""Keeping runs: the list of 1,000, a comparison, and `descgen run` beside plain Papermill.

    python -m bench runs                     # copies of outputs/runs/latest
    python -m bench runs outputs/runs/ID

Each command is a process of its own. The runs of the last part are short ones of recipes/cpu.yaml, alternating:
`descgen run` adds the same seconds to a run of any length.
"""
import shutil
import subprocess
import tempfile
from pathlib import Path

from .markdown import circumstances, markdown_table
from .measure import ROOT, interleaved, medians, save_result, seconds

SHORT = "-f recipes/cpu.yaml -p max_steps 1 -p eval_rows 2 -p n_titles 1 -p max_new_tokens 4".split()

def add_options(parser):
    parser.add_argument("run", type=Path, nargs="?", default=Path("outputs/runs/latest"),
                        help="a finished run's folder")
    parser.add_argument("--runs", type=int, default=1000, help="copies of its manifest in the list")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=5, help="short runs of each kind")

def command_seconds(*words):
    "How long a command takes; an error if it fails"
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return seconds(lambda: subprocess.run(words, check=True, cwd=ROOT, **quiet))

def copy_runs(run, root, n):
    "Runs with the manifest of a real one and another rank each; the first and the last have all its files"
    from descgen.files import write_manifest
    from descgen.manifest import read_manifest
    manifest = read_manifest(run).model_dump(by_alias=True, exclude_none=True)
    for i in range(n):
        folder = root/f"20261125T{i:06d}Z-copy-{i:08x}"
        if i in (0, n - 1):
            shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
        write_manifest(folder, manifest | {"given": manifest["given"] | {"r": i + 1}})
    names = sorted(f.name for f in root.iterdir())
    return names[0], names[-1]

def time_commands(args, folder):
    "Seconds of the commands that only read, in every round"
    root = ["--root", str(folder/"runs")]
    one, other = copy_runs(args.run.resolve(), folder/"runs", args.runs)
    words = {"descgen --help": ["--help"], f"descgen runs, of {args.runs:,}": ["runs", *root],
             "descgen diff A B": ["diff", one, other, *root],
             "descgen diff A B --page": ["diff", one, other,
                 "--page", str(folder/"page.html"), *root]}
    ways = {name: (lambda w=w: command_seconds("descgen", *w)) for name, w in words.items()}
    return interleaved(ways, args.rounds)

def time_pairs(args, folder):
    "Seconds of short runs by Papermill and by `descgen run`, after one that does not count"
    def papermill():
        work = tempfile.mkdtemp(dir=folder)
        given = ["fine_tune_llama3.ipynb", f"{work}/out.ipynb",
                 *SHORT, "-p", "output_dir", f"{work}/run"]
        return command_seconds("papermill", *given)
    def descgen_run():
        return command_seconds("descgen", "run", "--root", str(folder/"short"), *SHORT)
    if args.pairs:
        papermill()
    return interleaved(
        {"papermill": papermill, "descgen run": descgen_run}, args.pairs, alternate=True)

def summarize_pairs(pairs, run_seconds):
    "Medians, and how much longer `descgen run` takes"
    more = [p["descgen run"] - p["papermill"] for p in pairs]
    return {"seconds": medians(pairs), "pairs": len(pairs),
            "least_more": min(more), "most_more": max(more),
            "run_minutes": run_seconds/60, "second_of_run": 1/run_seconds}

def run(args):
    from descgen.manifest import read_manifest
    folder = Path(tempfile.mkdtemp())
    try:
        commands, pairs = time_commands(args, folder), time_pairs(args, folder)
    finally:
        shutil.rmtree(folder)
    run_seconds = read_manifest(args.run.resolve()).minutes*60
    summary = {"commands": medians(commands),
               "pairs": summarize_pairs(pairs, run_seconds) if pairs else None}
    save_result(args.results, "runs", summary, {"commands": commands, "pairs": pairs}, args.rounds)

def pairs_table(pairs):
    "Short runs beside plain Papermill"
    took = pairs["seconds"]
    more = f"{pairs['least_more']:+.1f} to {pairs['most_more']:+.1f} s"
    share = f"{pairs['second_of_run']:.1%} of {pairs['run_minutes']:.1f} minutes"
    head = ["pairs", "Papermill", "`descgen run`",
            "difference in a pair", "one second, of `make run`"]
    row = [pairs["pairs"], f"{took['papermill']:.1f} s",
           f"{took['descgen run']:.1f} s", more, share]
    return markdown_table(head, [row])

def tables(read):
    record = read("runs")
    if not record:
        return {}
    s = record["summary"]
    rows = [[name, f"{took:.2f}"] for name, took in s["commands"].items()]
    commands = markdown_table(["command", "seconds"], rows)
    lines = [circumstances(record), "", *commands]
    if s["pairs"]:
        lines += ["", *pairs_table(s["pairs"])]
    return {"runs": lines}
