"""What keeping runs costs: the command's start, a list of 1,000 runs, the difference of two with its page, and `descgen run` beside plain Papermill.

    python bench/runs.py                     # copies of outputs/runs/latest
    python bench/runs.py outputs/runs/ID

Each command is a process of its own; medians. The runs of the last part are short ones of recipes/cpu.yaml, alternating: what they differ by is a matter of seconds, whatever a run's length.
"""
import json, shutil, statistics, subprocess, sys, tempfile, time
from pathlib import Path

from descgen.files import write_manifest
from descgen.manifest import read_manifest

RUNS, ROUNDS, PAIRS = 1000, 5, 5
SHORT = "-f recipes/cpu.yaml -p max_steps 1 -p eval_rows 2 -p n_titles 1 -p max_new_tokens 4".split()

def seconds(*words):
    "How long a command takes; an error where it fails"
    start = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start

def registry(run, root):
    "A folder of runs, each with the manifest of a real one and another rank; first and last with all files, whose hashes `diff` compares"
    record = read_manifest(run).model_dump(by_alias=True, exclude_none=True)
    for i in range(RUNS):
        folder = root/f"20261125T{i:06d}Z-copy-{i:08x}"
        if i in (0, RUNS - 1): shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
        write_manifest(folder, record | {"given": record["given"] | {"r": i + 1}})
    return [f.name for f in sorted(root.iterdir())]

def commands(run, tmp):
    "Median seconds of the commands that only read"
    one, *_, other = registry(run, tmp/"runs")
    where = ["--root", str(tmp/"runs")]
    ways = {"descgen --help": ["--help"], f"descgen runs, of {RUNS:,}": ["runs", *where], "descgen diff A B": ["diff", one, other, *where],
            "descgen diff A B --page": ["diff", one, other, "--page", str(tmp/"page.html"), *where]}
    took = [{name: seconds("descgen", *words) for name, words in ways.items()} for _ in range(ROUNDS)]
    return {name: statistics.median(t[name] for t in took) for name in ways}

def pairs(tmp):
    "Seconds of short runs by `papermill` and by `descgen run`, alternating which is first, after one that nobody counts"
    ways = {"papermill": lambda i: seconds("papermill", "fine_tune_llama3.ipynb", str(tmp/f"{i}.ipynb"), *SHORT, "-p", "output_dir", str(tmp/str(i))),
            "descgen run": lambda i: seconds("descgen", "run", "--root", str(tmp/"short"), *SHORT)}
    ways["papermill"]("warm")
    took = []
    for i in range(PAIRS):
        took += [{name: ways[name](i) for name in list(ways)[::1 if i % 2 else -1]}]
        print(*(f"{name} {s:.1f} s" for name, s in sorted(took[-1].items())), sep=", ", file=sys.stderr)
    return took

if __name__ == "__main__":
    run, tmp = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/runs/latest").resolve(), Path(tempfile.mkdtemp())
    try:
        for name, s in commands(run, tmp).items(): print(f"{name:28} {s:.2f} s")
        took, real = pairs(tmp), read_manifest(run).minutes*60
        for name in took[0]: print(f"{name + ', short':28} {statistics.median(t[name] for t in took):.1f} s")
        more = statistics.median(t["descgen run"] - t["papermill"] for t in took)
        print(f"{'descgen run more':28} {more:+.1f} s: {more/real:+.1%} of this run's {real/60:.1f} minutes")
    finally: shutil.rmtree(tmp)
