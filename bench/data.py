"""The data stage: from a file of two million rows to the split, to the index of sources and to the first training step.

    python -m bench data                            # about an hour on two cores; interrupted, it resumes
    python -m bench data --rows 20000 --rounds 1    # a short look
    python -m bench data --child limit PATH CACHE   # one measurement

The ways take turns. Each is a process of its own with a cache of its own. Seconds are those of the work, after
the imports; memory is the peak of the process, mapped files included.
"""
import ast
import json
import os
import random
import shutil
import statistics
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

from .catalogue import ROWS, add_words_option, make_catalogue
from .markdown import circumstances, markdown_table
from .measure import (NOTEBOOK, SCRATCH, interleaved, measure_parts, peak_memory_gb, print_result, read_jsonl,
    run_child, save_result)

RECIPE = dict(min_chars=20, max_chars=20_000) # of all ways
# or a hundredth of the lines: a file with many more counts as one in another encoding
BAD_LINES = 1000
NOT_COUNTED = ("load_model", "row_losses") # cells that load the model or measure its loss
PAIRS = 4 # of limit and descgen, with nothing else running
GROUNDED = {"sources": 2, "targets": "supported"} # of a start with sources
TITLES = 1000 # of each kind, to find sources of

def add_options(parser):
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--rounds", type=int, default=3)
    add_words_option(parser)
    parser.add_argument("--child", nargs=3, metavar=("NAME", "PATH", "CACHE"),
        help="one measurement in this process")

# The ways: each gets a catalogue and an empty cache folder

def limit(path, cache):
    "One pass of polars that only parses"
    import polars as pl
    start = time.perf_counter()
    lines = pl.scan_ndjson(path, schema={k: pl.String for k in ("uid", "title", "content")})
    sizes = [pl.col(name).str.len_bytes().sum() for name in ("title", "content")]
    rows, *_ = lines.select(pl.len(), *sizes).collect(engine="streaming").row(0)
    return {"seconds": time.perf_counter() - start, "rows": rows}

def load_usual(path, cache):
    "The rows of the usual length, by `datasets`"
    from datasets import disable_progress_bars, load_dataset
    disable_progress_bars()
    rows = load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
    return rows.filter(
        lambda r: RECIPE["min_chars"] <= len(r["content"].strip()) <= RECIPE["max_chars"])

def usual(path, cache):
    "load_dataset, filter, map, train_test_split, as the documentation shows them"
    import datasets # before the clock starts
    start = time.perf_counter()
    rows = load_usual(path, cache)
    rows = rows.map(lambda r: {"title": r["title"].strip(), "content": r["content"].strip()})
    split = rows.train_test_split(test_size=0.05, seed=42)
    return {"seconds": time.perf_counter() - start,
            "rows": len(split["train"]) + len(split["test"])}

def descgen(path, cache, near_up_to=0):
    "load_data with cleaning and a search for exact duplicates, its default for two million rows"
    from datasets import disable_progress_bars
    from descgen.dataset import DataSettings, load_data
    disable_progress_bars()
    settings = DataSettings(near_up_to=near_up_to, **RECIPE)
    start = time.perf_counter()
    data = load_data(path, settings, cache)
    return {"seconds": time.perf_counter() - start, "rows": len(data.train) + len(data.test),
            "funnel": data.funnel.labelled(), "changed": data.changed}

def near(path, cache):
    "The same with a search for near-duplicates"
    return descgen(path, cache, near_up_to=10**9)

def usual_start(path, cache):
    "All rows formatted, tokenised and packed by TRL, up to the first batch"
    import datasets
    import trl
    from transformers import AutoTokenizer
    from descgen.model import embedded_model
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    def texts(batch):
        pairs = zip(batch["title"], batch["content"])
        return {"text": [chat_text(tokenizer, title, content) for title, content in pairs]}
    def ids(batch):
        encoded = tokenizer(batch["text"], add_special_tokens=False,
            truncation=True, max_length=1024)
        return {"input_ids": encoded.input_ids}
    start = time.perf_counter()
    rows = load_usual(path, cache).train_test_split(test_size=0.05, seed=42)["train"]
    rows = rows.map(texts, batched=True, remove_columns=rows.column_names)
    rows = rows.map(ids, batched=True, remove_columns=["text"])
    packs = trl.pack_dataset(rows, 1024, strategy="bfd")
    packs.shuffle(seed=42)[:16]
    return {"seconds": time.perf_counter() - start, "rows": len(rows)}

def chat_text(tokenizer, title, content):
    "An example in the words of the chat template"
    messages = [{"role": "user", "content": f"DESCRIBE ABOUT THE PRODUCT.\nTitle: {title}"},
                {"role": "assistant", "content": content}]
    return tokenizer.apply_chat_template(messages, tokenize=False)

def descgen_start(path, cache, **parameters):
    "The main notebook with its defaults and a tiny model, cell by cell, until the first step"
    import matplotlib.pyplot, pandas, py3langid.langid, trl, unsloth # before the clock starts
    from descgen.manifest import read_manifest
    from descgen.model import tiny_model
    os.environ["XDG_CACHE_HOME"] = cache # of prepared data
    work = tempfile.mkdtemp()
    given = parameters | {"data_path": str(path), "model_id": tiny_model(work), "output_dir": f"{work}/run"}
    try:
        took = execute_until_first_step(cells_to_first_step(), given)
        rows = read_manifest(given["output_dir"]).plan["rows"]
    finally:
        shutil.rmtree(work)
    return {"seconds": sum(took.values()), "cells": took, "rows": rows}

def sources_start(path, cache):
    "The same with two sources in each prompt and supported targets"
    return descgen_start(path, cache, **GROUNDED)

def sources_index(path, cache):
    "The index of sources: its building, its size, and how fast it finds sources"
    from datasets import disable_progress_bars
    from descgen.dataset import DataSettings, load_data
    from descgen.recipe import read_defaults
    from descgen.sources import Sources, title_counts, write_sources
    disable_progress_bars()
    data = load_data(path, DataSettings(near_up_to=0, **RECIPE), cache)
    title_counts(["a title"]) # imports, before the clock starts
    chars = read_defaults(NOTEBOOK)["source_chars"]
    start = time.perf_counter()
    folder = write_sources(data.train, Path(cache)/f"sources-{uuid.uuid4().hex}", chars)
    built = {"seconds": time.perf_counter() - start, "rows": len(data.train), "build_gb": peak_memory_gb(),
             "disk_gb": sum(f.stat().st_size for f in folder.iterdir())/1e9}
    return built | query_rates(Sources(folder), data)

def query_rates(index, data):
    "Titles per second, one at a time, and training rows per second, all at once and without near-duplicates"
    from descgen.sources import training_sources
    titles = data.test.select(range(min(TITLES, len(data.test))))["title"][:]
    numbers = list(range(min(TITLES, len(data.train))))
    index.nearest(titles[:1], GROUNDED["sources"]) # opens the files
    start = time.perf_counter()
    for title in titles:
        index.nearest([title], GROUNDED["sources"])
    one_by_one = time.perf_counter() - start
    start = time.perf_counter()
    training_sources(index, numbers, GROUNDED["sources"])
    at_once = time.perf_counter() - start
    return {"titles_per_second": len(titles)/one_by_one, "training_rows_per_second": len(numbers)/at_once}

def calls(source, name):
    "Whether a cell calls a function or a method of this name"
    found = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return any(name == getattr(f, "id", getattr(f, "attr", None)) for f in found)

def cells_to_first_step():
    "The notebook's code cells up to the one that calls `train`, without the one for Colab"
    import nbformat
    cells = [c for c in nbformat.read(NOTEBOOK, 4).cells
             if c.cell_type == "code" and "google.colab" not in c.source]
    for i, cell in enumerate(cells):
        if calls(cell.source, "train"):
            return cells[:i + 1]
    raise RuntimeError("No cell of the notebook calls `train`.")

class FirstStepReached(Exception):
    "Ends a training"

def stop_first_step():
    "A context in which every trainer stops at its first step"
    from transformers import TrainerCallback, trainer
    class Stop(TrainerCallback):
        def on_step_begin(self, *args, **kw):
            raise FirstStepReached
    return patch.object(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS, Stop])

def execute_until_first_step(cells, given):
    "Seconds of each cell that counts; the last cell trains"
    session, took = {"__name__": "__main__"}, {}
    for cell in cells:
        start = time.perf_counter()
        with stop_first_step(), suppress(FirstStepReached):
            exec(cell.source, session)
            if cell is cells[-1]:
                raise RuntimeError("The training ended before its first step.")
        spent = time.perf_counter() - start
        if "parameters" in cell.metadata.get("tags", []):
            session |= given
        elif not any(calls(cell.source, name) for name in NOT_COUNTED):
            took[cell.source.strip().split("\n")[-1][:60]] = spent
    return took

def spoil(path, spoiled):
    "Copy a catalogue with bad lines in place of others; their line numbers"
    with open(path, "rb") as f:
        n = sum(1 for _ in f)
    at = set(random.Random(42).sample(range(1, n + 1), min(BAD_LINES, n//100)))
    kinds = [b"{", b"[1]", b'{"title": "x"}', b'{"title": 5, "content": "y"}',
             b'{"title": "\xff", "content": "y"}']
    with open(path, "rb") as f, open(spoiled, "wb") as out:
        for i, line in enumerate(f, 1):
            out.write(kinds[i % 5] + b"\n" if i in at else line)
    return at

def bad_lines(path, cache):
    "A thousand bad lines: are exactly these rejected?"
    from descgen.dataset import DataSettings, load_data
    spoiled = Path(cache)/"spoiled.json"
    at = spoil(path, spoiled)
    start = time.perf_counter()
    data = load_data(spoiled, DataSettings(**RECIPE), cache)
    spent = time.perf_counter() - start
    found = {r["line"] for r in read_jsonl(data.rejected)}
    return {"seconds": spent, "rows": len(data.train) + len(data.test),
            "right": found == at, "found": len(found)}

WAYS = {f.__name__: f for f in (limit, usual, descgen, near, usual_start, descgen_start,
                                sources_start, sources_index, bad_lines)}
TWICE = ("descgen", "descgen_start", "sources_start", "sources_index") # the second time in the same cache

# Rounds of them

def measure(name, path, cache):
    "One way in a process of its own"
    return run_child("data", "--child", name, path, cache)

def measure_again(name, path):
    "A way in a new cache, and descgen's second time in the same cache"
    cache = tempfile.mkdtemp(dir=path.parent)
    try:
        first = measure(name, path, cache)
        again = measure(name, path, cache) if name in TWICE else None
    finally:
        shutil.rmtree(cache)
    return {"first": first, "again": again}

def rounds_of(path, names, rounds=1):
    "The named ways in turn"
    ways = {name: (lambda name=name: measure_again(name, path)) for name in names}
    return interleaved(ways, rounds)

def parts(args, path):
    "What is measured: names, and functions that do it"
    def of_size(n):
        smaller = make_catalogue(path.parent/f"trn-{n}.json", n, args.words)
        return rounds_of(smaller, ["descgen", "usual", "near"])[0]
    sizes = (args.rows//16, args.rows//4, args.rows)
    return {
        "rounds": lambda: rounds_of(path, ["limit", "descgen", "usual"], args.rounds),
        "growth": lambda: {str(n): of_size(n) for n in sizes},
        "pairs": lambda: rounds_of(path, ["limit", "descgen"], PAIRS),
        "start": lambda: rounds_of(path, ["descgen_start", "sources_start"], args.rounds),
        "sources": lambda: rounds_of(path, ["sources_index"], args.rounds),
        "usual_start": lambda: rounds_of(path, ["usual_start"])[0],
        "bad_lines": lambda: rounds_of(path, ["bad_lines"])[0]}

def run(args):
    if args.child:
        name, path, cache = args.child
        return print_result(WAYS[name](path, cache) | {"memory_gb": peak_memory_gb()})
    path = make_catalogue(SCRATCH/f"trn-{args.rows}.json", args.rows, args.words)
    found = measure_parts(path.with_name(f"data-{args.rows}.json"), parts(args, path))
    save_result(args.results, f"data-{args.rows}", summarize(found, args.rows), found, args.rounds)

# Summary and tables

def median(rounds, name, which="first"):
    "Median seconds of a way"
    return statistics.median(r[name][which]["seconds"] for r in rounds)

def largest(rounds, name):
    "The peak memory of a way, over all rounds"
    return max(r[name]["first"]["memory_gb"] for r in rounds)

def summarize_growth(rows, found):
    "One line of the table of sizes"
    took = {name: found[name]["first"]["seconds"] for name in ("usual", "descgen", "near")}
    memory = {name: found[name]["first"]["memory_gb"] for name in took}
    return {"rows": int(rows), **took,
            "again": found["descgen"]["again"]["seconds"], "memory_gb": memory}

def summarize_pairs(pairs):
    "Limit and descgen one after the other, and their ratio"
    took = [{name: p[name]["first"]["seconds"] for name in ("limit", "descgen")} for p in pairs]
    ratios = [t["descgen"]/t["limit"] for t in took]
    middle = {name: statistics.median(t[name] for t in took) for name in ("limit", "descgen")}
    return {"each": took, "median": middle | {"ratio": statistics.median(ratios)}}

def summarize_sources(found):
    "The start with sources, and their index; memory is that of the second time, when the rows are prepared"
    start, index = found["start"], found["sources"]
    def middle(key, which="first"):
        return statistics.median(r["sources_index"][which][key] for r in index)
    names = ("seconds", "disk_gb", "rows", "titles_per_second", "training_rows_per_second")
    return {name: middle(name) for name in names} | {
        "build_gb": max(r["sources_index"]["again"]["build_gb"] for r in index),
        "start": {"first": median(start, "sources_start"), "again": median(start, "sources_start", "again")}}

def summarize(found, rows):
    "The figures of the tables"
    rounds, start = found["rounds"], found["start"]
    took = {name: median(rounds, name) for name in ("usual", "descgen", "limit")}
    full = found["growth"][str(rows)]["near"]["first"]
    return {
        "rows": rows,
        "seconds": took | {"again": median(rounds, "descgen", "again")},
        "faster_than_usual": took["usual"]/took["descgen"],
        "times_the_limit": took["descgen"]/took["limit"],
        "memory_gb": {name: largest(rounds, name) for name in took},
        "rows_out": {name: rounds[0][name]["first"]["rows"] for name in ("usual", "descgen")},
        "start": {"usual": found["usual_start"]["usual_start"]["first"]["seconds"],
                  "descgen": median(start, "descgen_start"),
                  "again": median(start, "descgen_start", "again")},
        "sources": summarize_sources(found),
        "bad_lines": found["bad_lines"]["bad_lines"]["first"],
        "pairs": summarize_pairs(found["pairs"]),
        "growth": [summarize_growth(n, r) for n, r in found["growth"].items()],
        "funnel": full["funnel"]}

def main_table(s):
    "The ways beside each other"
    took, memory, out, start, bad = (s[k]
        for k in ("seconds", "memory_gb", "rows_out", "start", "bad_lines"))
    ratios = (
        f"{s['faster_than_usual']:.1f} × as fast as usual, {s['times_the_limit']:.1f} × the limit")
    right = "exactly these" if bad["right"] else "NOT THE RIGHT ONES"
    return markdown_table(["", "usual", "descgen", "limit", "descgen is"], [
        ["load to split, first run",
         *(f"{took[k]:.1f} s" for k in ("usual", "descgen", "limit")), ratios],
        ["load to split, second run", "", f"{took['again']:.1f} s", "", ""],
        ["peak memory", *(f"{memory[k]:.2f} GB" for k in ("usual", "descgen", "limit")), ""],
        ["rows out", f"{out['usual']:,}", f"{out['descgen']:,} (no duplicates)", "", ""],
        ["start to first step, first run", f"{start['usual']:.0f} s",
         f"{start['descgen']:.1f} s", "", ""],
        ["start to first step, second run", "", f"{start['again']:.1f} s", "", ""],
        *sources_rows(s.get("sources")),
        ["a thousand bad lines", "",
         f"{bad['seconds']:.1f} s, {bad['found']:,} rejected, {right}", "", ""]])

def sources_rows(s):
    "Lines of the main table on sources; none for a result without them"
    if not s:
        return []
    cells = {"start to first step with two sources, first run": f"{s['start']['first']:.1f} s",
             "start to first step with two sources, second run": f"{s['start']['again']:.1f} s",
             f"index of {s['rows']:,} sources": f"{s['seconds']:.1f} s",
             "peak memory while it is built": f"{s['build_gb']:.2f} GB",
             "its size on disk": f"{s['disk_gb']:.2f} GB",
             "sources of titles, one title at a time": f"{s['titles_per_second']:,.0f} per second",
             "sources of training rows, a thousand at a time": f"{s['training_rows_per_second']:,.0f} per second"}
    return [[label, "", cell, "", ""] for label, cell in cells.items()]

def growth_table(s):
    "The ways at three sizes"
    head = ["rows", "usual", "descgen", "descgen again",
            "near-duplicates too", "memory: usual, descgen, near"]
    rows = []
    for g in s["growth"]:
        took = [f"{g[k]:.1f} s" for k in ("usual", "descgen", "again", "near")]
        memory = ", ".join(f"{g['memory_gb'][k]:.2f}" for k in ("usual", "descgen", "near"))
        rows.append([f"{g['rows']:,}", *took, f"{memory} GB"])
    return markdown_table(head, rows)

def pairs_table(s):
    "Limit and descgen alternating"
    pairs, middle = s["pairs"]["each"], s["pairs"]["median"]
    rows = [[i, f"{p['limit']:.1f} s", f"{p['descgen']:.1f} s", ""] for i, p in enumerate(pairs, 1)]
    last = ["median", f"{middle['limit']:.1f} s",
            f"{middle['descgen']:.1f} s", f"{middle['ratio']:.1f}"]
    return markdown_table(["pair", "limit", "descgen", "ratio"], [*rows, last])

def tables(read):
    record = read(f"data-{ROWS}")
    if not record:
        return {}
    s = record["summary"]
    about = f"{s['rows']:,} rows; memory is the largest of all rounds. "
    about += circumstances(record, "polars", "datasets", "rensa", "tokenizers")
    funnel = markdown_table(["", "rows"], [[label, f"{n:,}"] for label, n in s["funnel"].items()])
    return {"data": [about, "", *main_table(s), "", *growth_table(s)], "data funnel": funnel,
            "data pairs": pairs_table(s)}
