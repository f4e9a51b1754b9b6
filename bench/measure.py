"""Shared by all subjects: time, rounds, child processes, peak memory, the machine, and results as JSON files."""
import json
import os
import platform
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT/"bench"/"results"
SCRATCH = ROOT/"outputs"/"bench" # made files, logs and unfinished results
NOTEBOOK = ROOT/"fine_tune_llama3.ipynb"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "unsloth", "bitsandbytes", "xformers", "polars",
            "datasets", "tokenizers", "rensa", "papermill")

def seconds(act):
    "How long a function takes"
    start = time.perf_counter()
    act()
    return time.perf_counter() - start

def interleaved(ways, rounds, alternate=False):
    "The value of each way in each round; the ways take turns, if asked every other round in reverse order"
    found = []
    for i in range(rounds):
        names = list(ways)
        if alternate and i % 2:
            names.reverse()
        found.append({name: ways[name]() for name in names})
        print(f"round {i + 1} of {rounds}: {found[-1]}", file=sys.stderr, flush=True)
    return found

def medians(rounds):
    "The median of each way's numbers over rounds"
    return {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}

def peak_memory_gb():
    "The largest resident memory of this process so far, files mapped into memory included"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024/1e9

def run_child(subject, *words, python=sys.executable, **env):
    "What a subject prints as its last line, JSON, in a process of its own"
    command = [str(python), "-m", "bench", subject, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | env)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])

def print_result(result):
    "The last line that `run_child` reads; libraries may print before it"
    print("\n" + json.dumps(result), flush=True)

def measure_parts(path, parts):
    "The results of several functions, by name; kept in a file until all are there, so an interrupted call continues"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, act in parts.items():
        if name not in found:
            found[name] = act()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=1), encoding="utf-8")
    path.unlink()
    return found

def processor():
    "The processor's name"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

def gpu():
    "The name of the first GPU, or None"
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return names[0].strip() if names else None

def machine():
    "Processor, cores, GPU, memory and system"
    memory = os.sysconf("SC_PAGE_SIZE")*os.sysconf("SC_PHYS_PAGES")
    return {"processor": processor(), "cores": os.cpu_count(), "gpu": gpu(),
            "memory_gb": round(memory/1e9, 1), "system": platform.system()}

def versions():
    "Versions of Python and of the packages that matter, where they are installed"
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

def save_result(
    folder, # of the results
    name, # subject, with its variant: "train-float32"
    summary, # the figures of the tables
    raw=None, # what was measured in every round
    rounds=1, # number of rounds
    statistic="median", # of the rounds, in the summary
    where=None, # `machine` and `versions`, if it was measured elsewhere
):
    "Write `name`.json with the command, the date, the machine, the versions and the figures"
    where = where or {"machine": machine(), "versions": versions()}
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]] # no path of this machine
    record = {"name": name, "command": "python -m bench " + shlex.join(words),
              "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
              **where, "rounds": rounds,
              "statistic": statistic, "summary": summary, "raw": raw}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder/f"{name}.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{path}: {json.dumps(summary, ensure_ascii=False)}", flush=True)
    return record

def read_result(folder, name):
    "A result, or None"
    path = folder/f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

def read_jsonl(path):
    "The rows of a JSON Lines file"
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]
