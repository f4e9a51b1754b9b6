"""What the data stage costs, beside the usual way and beside the limit, in one run and interleaved.

    python bench/data.py              # about forty minutes on two cores: writes its tables into bench/README.md; interrupted, it goes on where it was
    python bench/data.py --rows 140538 --rounds 1   # a look at a sixteenth of the size; prints only

Each measurement is a process of its own with a cache of its own. Times are those of the work, from after the imports; memory is the peak of the process,
what it maps from the disk included. Of several rounds the median is told.
"""
import argparse, json, os, platform, re, shutil, statistics, subprocess, sys, tempfile, time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from make_catalogue import ROWS, make_catalogue

HERE = Path(__file__).parent
RECIPE = dict(min_chars=20, max_chars=20_000) # of both

def limit(path, cache):
    "One pass of polars that only parses"
    import polars as pl
    start = time.perf_counter()
    lines = pl.scan_ndjson(path, schema={k: pl.String for k in ("uid", "title", "content")})
    n, *_ = lines.select(pl.len(), pl.col("title").str.len_bytes().sum().alias("t"), pl.col("content").str.len_bytes().sum()).collect(engine="streaming").row(0)
    return {"seconds": time.perf_counter() - start, "rows": n}

def usual(path, cache):
    "load_dataset, filter, map, train_test_split, as the documentation shows them"
    from datasets import disable_progress_bars, load_dataset
    disable_progress_bars()
    start = time.perf_counter()
    rows = load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
    rows = rows.filter(lambda r: RECIPE["min_chars"] <= len(r["content"].strip()) <= RECIPE["max_chars"])
    rows = rows.map(lambda r: {"title": r["title"].strip(), "content": r["content"].strip()})
    split = rows.train_test_split(test_size=0.05, seed=42)
    return {"seconds": time.perf_counter() - start, "rows": len(split["train"]) + len(split["test"])}

def descgen(path, cache, near_up_to=0):
    "load_data, with its cleaning and its search for exact copies: what it does by itself with a file of two million rows"
    from datasets import disable_progress_bars
    from descgen.dataset import DataSettings, load_data
    disable_progress_bars()
    start = time.perf_counter()
    data = load_data(path, DataSettings(near_up_to=near_up_to, **RECIPE), cache)
    return {"seconds": time.perf_counter() - start, "rows": len(data.train) + len(data.test), "funnel": asdict(data.funnel), "changed": data.changed}

def near(path, cache): return descgen(path, cache, near_up_to=10**9)

def _tokenizer():
    from transformers import AutoTokenizer
    from descgen.model import embedded_model
    return AutoTokenizer.from_pretrained(embedded_model())

def usual_start(path, cache):
    "The same, then everything formatted, tokenised and packed, up to the first batch"
    import datasets, trl
    tokenizer = _tokenizer()
    start = time.perf_counter()
    datasets.disable_progress_bars()
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
    rows = rows.filter(lambda r: RECIPE["min_chars"] <= len(r["content"].strip()) <= RECIPE["max_chars"])
    rows = rows.train_test_split(test_size=0.05, seed=42)["train"]
    def texts(batch): return {"text": [tokenizer.apply_chat_template([{"role": "user", "content": f"DESCRIBE ABOUT THE PRODUCT.\nTitle: {t}"},
        {"role": "assistant", "content": c}], tokenize=False) for t, c in zip(batch["title"], batch["content"])]}
    rows = rows.map(texts, batched=True, remove_columns=rows.column_names)
    rows = rows.map(lambda b: {"input_ids": tokenizer(b["text"], add_special_tokens=False, truncation=True, max_length=1024).input_ids}, batched=True, remove_columns=["text"])
    packs = trl.pack_dataset(rows, 1024, strategy="bfd")
    packs.shuffle(seed=42)[:16]
    return {"seconds": time.perf_counter() - start, "rows": len(rows)}

def descgen_start(path, cache):
    "The main notebook with its defaults and a tiny model, cell by cell, until the first step; loading the model and the base model's own answers and test loss do not count"
    import matplotlib.pyplot, nbformat, pandas, py3langid.langid, trl, unsloth
    from transformers import TrainerCallback
    from descgen import train
    from descgen.model import tiny_model
    os.environ["XDG_CACHE_HOME"] = cache # prepared sets
    work = tempfile.mkdtemp()
    class Reached(Exception): "The first step"
    class Stop(TrainerCallback):
        def on_step_begin(self, *args, **kw): raise Reached
    session, total, cells = {"__name__": "__main__"}, 0., {}
    for cell in nbformat.read(HERE.parent/"fine_tune_llama3.ipynb", 4).cells:
        if cell.cell_type != "code" or "google.colab" in cell.source: continue
        start = time.perf_counter()
        source = cell.source.replace("test_examples, resume_from)", "test_examples, resume_from, [Stop()])")
        session["Stop"] = Stop
        try: exec(source, session)
        except Reached: stopped = True
        else: stopped = False
        seconds = time.perf_counter() - start
        if "parameters" in cell.metadata.get("tags", []):
            session |= {"data_path": str(path), "model_id": tiny_model(work), "output_dir": f"{work}/run"}
        elif "load_model(" not in source and "loss_before" not in source: total += seconds; cells[source.strip().split("\n")[-1][:60]] = round(seconds, 2)
        if stopped: break
    shutil.rmtree(work)
    return {"seconds": total, "cells": cells, "rows": len(session["data"].train)}

def spoilt(path, cache):
    "A thousand bad lines among all: are exactly these set aside?"
    import random
    from descgen.dataset import DataSettings, load_data
    bad = Path(cache)/"bad.json"
    n = sum(1 for _ in open(path, "rb"))
    at, kinds = set(random.Random(42).sample(range(1, n + 1), 1000)), [b"{", b"[1]\n", b'{"title": "x"}\n', b'{"title": 5, "content": "y"}\n', b'{"title": "\xff", "content": "y"}\n']
    with open(path, "rb") as f, open(bad, "wb") as out:
        for i, line in enumerate(f, 1): out.write(kinds[i % 5].rstrip(b"\n") + b"\n" if i in at else line)
    start = time.perf_counter()
    data = load_data(bad, DataSettings(**RECIPE), cache)
    seconds = time.perf_counter() - start
    found = {json.loads(l)["line"] for l in open(data.rejected)}
    return {"seconds": seconds, "rows": len(data.train) + len(data.test), "right": found == at, "found": len(found)}

def measure(name, path, cache):
    "Seconds, rows and peak memory of one of the above in a process of its own"
    child = subprocess.Popen([sys.executable, __file__, "--child", name, str(path), str(cache)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    out = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status: raise RuntimeError(f"{name} failed: run  python {__file__} --child {name} {path} {cache}")
    result = json.loads(out.splitlines()[-1]) | {"gb": usage.ru_maxrss/1e6}
    print(f"{name:14} {result['seconds']:8.1f} s {result['gb']:6.2f} GB {result['rows']:>12,} rows", file=sys.stderr)
    return result

def one_round(path, names):
    "Each named measurement once, a fresh cache for each; `again` is descgen's second run in the same cache"
    found = {}
    for name in names:
        cache = tempfile.mkdtemp(dir=path.parent)
        try:
            found[name] = measure(name, path, cache)
            if name in ("descgen", "descgen_start"): found[f"{name} again"] = measure(name, path, cache)
        finally: shutil.rmtree(cache)
    return found

def median(rounds, name, what="seconds"): return statistics.median(r[name][what] for r in rounds)

def machine():
    return f"{os.cpu_count()} cores ({platform.machine()}), {platform.system()}, Python {platform.python_version()}, " + ", ".join(
        f"{p} {version(p)}" for p in ("polars", "datasets", "rensa", "tokenizers"))

def tables(found, n):
    "The tables of bench/README.md"
    from descgen.dataset import Funnel
    rounds, growth, bad, start, usual_start = (found[k] for k in ("rounds", "growth", "bad", "start", "usual start"))
    s, gb = lambda name: median(rounds, name), lambda name: max(r[name]["gb"] for r in rounds)
    lines = [f"{n:,} rows, {len(rounds)} rounds, median seconds; memory is the largest. {machine()}.", "",
        "| | usual | descgen | limit | descgen is |", "|---|---|---|---|---|",
        f"| load to split, first run | {s('usual'):.1f} s | {s('descgen'):.1f} s | {s('limit'):.1f} s | {s('usual')/s('descgen'):.1f} × as fast as usual, {s('descgen')/s('limit'):.1f} × the limit |",
        f"| load to split, second run | | {s('descgen again'):.1f} s | | |",
        f"| peak memory | {gb('usual'):.2f} GB | {gb('descgen'):.2f} GB | {gb('limit'):.2f} GB | |",
        f"| rows out | {rounds[0]['usual']['rows']:,} | {rounds[0]['descgen']['rows']:,} (no copies) | | |",
        f"| start to first step, first run | {usual_start['seconds']:.0f} s | {median(start, 'descgen_start'):.1f} s | | |",
        f"| start to first step, second run | | {median(start, 'descgen_start again'):.1f} s | | |",
        f"| a thousand bad lines among them | | {bad['seconds']:.1f} s, {bad['found']:,} set aside, {'exactly these' if bad['right'] else 'NOT THE RIGHT ONES'} | | |", "",
        "| rows | usual | descgen | descgen again | near copies too | memory: usual, descgen, near |", "|---|---|---|---|---|---|"]
    for size, r in growth.items():
        lines.append(f"| {int(size):,} | {r['usual']['seconds']:.1f} s | {r['descgen']['seconds']:.1f} s | {r['descgen again']['seconds']:.1f} s | {r['near']['seconds']:.1f} s | "
            f"{r['usual']['gb']:.2f}, {r['descgen']['gb']:.2f}, {r['near']['gb']:.2f} GB |")
    lines += ["", "The funnel of the full file with near copies looked for:", "", "| | rows |", "|---|---|", *(f"| {k} | {v:,} |" for k, v in Funnel(**found["funnel"]).labelled().items())]
    return "\n".join(lines)

def parts(path, n, n_rounds):
    "The measurements: names, and what makes each"
    def at(size): return make_catalogue(path.parent/f"trn-{size}.json", size)
    return {"rounds": lambda: [one_round(path, ["limit", "descgen", "usual"]) for _ in range(n_rounds)],
        "growth": lambda: {str(size): one_round(at(size), ["descgen", "usual", "near"]) for size in (n//16, n//4, n)},
        "funnel": lambda: one_round(path, ["near"])["near"]["funnel"],
        "start": lambda: [one_round(path, ["descgen_start"]) for _ in range(n_rounds)],
        "usual start": lambda: one_round(path, ["usual_start"])["usual_start"],
        "bad": lambda: one_round(path, ["spoilt"])["spoilt"]}

def main(args):
    "Measure what outputs/bench/data-N.json does not hold yet, and write the tables"
    path = make_catalogue(Path(f"outputs/bench/trn-{args.rows}.json"), args.rows)
    kept = path.with_name(f"data-{args.rows}.json")
    found = json.loads(kept.read_text()) if kept.exists() else {}
    for name, make in parts(path, args.rows, args.rounds).items():
        if name not in found: found[name] = make()
        kept.write_text(json.dumps(found, indent=1))
    text = tables(found, args.rows)
    print(text)
    if args.rows == ROWS:
        readme = HERE/"README.md"
        readme.write_text(re.sub(r"(?s)(<!-- data -->\n).*?(<!-- /data -->)", lambda m: f"{m[1]}{text}\n{m[2]}", readme.read_text()))

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=ROWS); parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=3, metavar=("NAME", "PATH", "CACHE"))
    args = parser.parse_args()
    if args.child: print(json.dumps(globals()[args.child[0]](*args.child[1:])))
    else: main(args)
