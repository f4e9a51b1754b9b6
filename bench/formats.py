"""Reading each file format beside polars' own reader, which only parses.

    python -m bench formats                            # a few minutes on two cores
    python -m bench formats --rows 20000 --rounds 1    # a short look

The same rows in each format. Every measurement is a process of its own, and the formats take turns. descgen
parses, numbers and checks each record, and rejects what holds no row.
"""
import gzip
import statistics
import tempfile
import time
from pathlib import Path

from .catalogue import add_words_option, make_catalogue
from .markdown import circumstances, markdown_table
from .measure import interleaved, peak_memory_gb, print_result, run_child, save_result

ROWS = 140_538
FORMATS = {"JSON Lines": "rows.jsonl", "CSV": "rows.csv",
           "CSV, .gz": "rows.csv.gz", "JSON array": "rows.json",
           "Parquet": "rows.parquet"}

def add_options(parser):
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--rounds", type=int, default=3)
    add_words_option(parser)
    parser.add_argument("--child", nargs=2, metavar=("READER", "PATH"),
        help="one measurement in this process")

def write_formats(folder, rows, words):
    "The same catalogue in every format"
    import polars as pl
    make_catalogue(folder/"rows.jsonl", rows, words)
    schema = {"uid": pl.String, "title": pl.String, "content": pl.String}
    table = pl.read_ndjson(folder/"rows.jsonl", schema=schema)
    table.write_csv(folder/"rows.csv")
    table.write_parquet(folder/"rows.parquet")
    table.write_json(folder/"rows.json")
    with gzip.open(folder/"rows.csv.gz", "wb", 1) as out:
        out.write((folder/"rows.csv").read_bytes())

def read_by_polars(path):
    "Number of rows"
    import polars as pl
    readers = {".jsonl": pl.read_ndjson, ".json": pl.read_json, ".parquet": pl.read_parquet}
    return readers.get(Path(path).suffix, pl.read_csv)(path).height

def read_by_descgen(path):
    "Number of rows"
    from descgen.data import inspect_file, read_parts
    return sum(parse()[0].height for parse in read_parts(inspect_file(path)))

READERS = {"descgen": read_by_descgen, "polars": read_by_polars}

def measure(reader, path):
    "Seconds, rows and memory of a reader"
    import polars, descgen.data # before the clock starts
    start = time.perf_counter()
    rows = READERS[reader](path)
    return {"seconds": time.perf_counter() - start, "rows": rows, "memory_gb": peak_memory_gb()}

def measure_all(folder, rounds):
    "Every reader with every format in every round"
    def measured(path):
        return {reader: run_child("formats", "--child", reader, path) for reader in READERS}
    ways = {name: (lambda path=folder/file: measured(path)) for name, file in FORMATS.items()}
    return interleaved(ways, rounds)

def summarize(found, megabytes, rows):
    "The figures of the table, by format"
    summary = {}
    for name in found[0]:
        took = {reader: statistics.median(r[name][reader]["seconds"] for r in found)
                for reader in READERS}
        memory = max(r[name]["descgen"]["memory_gb"] for r in found)
        summary[name] = {"megabytes": megabytes[name], "descgen": took["descgen"],
                         "rows_per_second": rows/took["descgen"],
                         "memory_gb": memory, "polars": took["polars"]}
    return summary

def run(args):
    if args.child:
        return print_result(measure(*args.child))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_formats(folder, args.rows, args.words)
        megabytes = {name: (folder/file).stat().st_size/1e6 for name, file in FORMATS.items()}
        found = measure_all(folder, args.rounds)
    summary = {"rows": args.rows, "formats": summarize(found, megabytes, args.rows)}
    save_result(args.results, f"formats-{args.rows}", summary, found, args.rounds)

def tables(read):
    record = read(f"formats-{ROWS}")
    if not record:
        return {}
    s = record["summary"]
    head = ["format", "size", "descgen", "rows per second", "memory", "polars alone"]
    rows = []
    for name, f in s["formats"].items():
        rows.append([name, f"{f['megabytes']:,.0f} MB",
                     f"{f['descgen']:.1f} s", f"{f['rows_per_second']:,.0f}",
                     f"{f['memory_gb']:.2f} GB", f"{f['polars']:.1f} s"])
    about = f"{s['rows']:,} rows, one thread of Python. {circumstances(record, 'polars')}"
    return {"formats": [about, "", *markdown_table(head, rows)]}
