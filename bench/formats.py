"""How fast each format of a catalogue is read, beside polars' own reader, which only parses.

    python bench/formats.py                 # a few minutes on two cores: writes its table into bench/README.md
    python bench/formats.py --rows 50000 --rounds 1   # a look; prints only

The same rows in each format; every measurement is a process of its own, the formats take turns, and of several rounds the median is told. descgen checks each record, numbers it and rejects what holds no row.
"""
import argparse, json, os, platform, resource, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import polars as pl

from make_catalogue import make_catalogue

HERE = Path(__file__).parent
FORMATS = {"JSON Lines": "rows.jsonl", "CSV": "rows.csv", "CSV, .gz": "rows.csv.gz", "JSON array": "rows.json", "Parquet": "rows.parquet"}

def write_formats(folder, rows):
    "The same catalogue in every format"
    import gzip
    make_catalogue(folder/"rows.jsonl", rows)
    table = pl.read_ndjson(folder/"rows.jsonl", schema={"uid": pl.String, "title": pl.String, "content": pl.String})
    table.write_csv(folder/"rows.csv")
    table.write_parquet(folder/"rows.parquet")
    table.write_json(folder/"rows.json")
    with gzip.open(folder/"rows.csv.gz", "wb", 1) as out: out.write((folder/"rows.csv").read_bytes())

def measure(who, path):
    "Seconds, rows and memory of one reader"
    start = time.perf_counter()
    if who == "polars":
        read = {".jsonl": pl.read_ndjson, ".json": pl.read_json, ".parquet": pl.read_parquet}.get(Path(path).suffix, pl.read_csv)
        rows = read(path).height
    else:
        from descgen.data import inspect_file, read_parts
        start = time.perf_counter()
        rows = sum(parse()[0].height for parse in read_parts(inspect_file(path)))
    return {"seconds": time.perf_counter() - start, "rows": rows, "memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024/1e9}

def run_apart(who, path):
    "The same in a process of its own"
    said = subprocess.run([sys.executable, __file__, "--measure", who, path], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(HERE.parent)})
    return json.loads(said.stdout.splitlines()[-1])

def table(found, rows):
    "Medians as a Markdown table"
    lines = [f"{rows:,} rows, {len(found['CSV']['descgen'])} rounds, medians, one thread of Python. {os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, polars {pl.__version__}.", "",
        "| format | size | descgen | rows per second | memory | polars alone |", "|---|---|---|---|---|---|"]
    for name, by in found.items():
        mine, theirs = (statistics.median(m["seconds"] for m in by[who]) for who in ("descgen", "polars"))
        lines.append(f"| {name} | {by['megabytes']:,.0f} MB | {mine:.1f} s | {rows/mine:,.0f} | {max(m['memory_gb'] for m in by['descgen']):.2f} GB | {theirs:.1f} s |")
    return "\n".join(lines)

def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--rows", type=int, default=562_154)
    args.add_argument("--rounds", type=int, default=3)
    args.add_argument("--measure", nargs=2)
    args = args.parse_args()
    if args.measure: return print(json.dumps(measure(*args.measure)))
    with tempfile.TemporaryDirectory() as folder:
        write_formats(Path(folder), args.rows)
        found = {name: {"megabytes": (Path(folder)/file).stat().st_size/1e6, "descgen": [], "polars": []} for name, file in FORMATS.items()}
        for _ in range(args.rounds):
            for name, file in FORMATS.items():
                for who in ("descgen", "polars"):
                    found[name][who].append(run_apart(who, str(Path(folder)/file)))
                    print(name, who, found[name][who][-1], flush=True)
    text = table(found, args.rows)
    print(text)
    readme = HERE/"README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition("<!-- formats -->\n")
    if args.rounds > 1: readme.write_text(f"{before}<!-- formats -->\n{text}\n<!-- /formats -->{rest.partition('<!-- /formats -->')[2]}", encoding="utf-8")

if __name__ == "__main__": main()
