"""How long a large catalogue takes on a GPU: an epoch of training, and a description for each row.

    python -m bench gpu-hours trn.json    # without a GPU: counts the tokens of a sample of the file's rows

The times follow from this count and from the speeds that gpu-compiled, gpu-write and processes have measured.
"""
import itertools
import statistics
from pathlib import Path

from ..markdown import markdown_table, place
from ..measure import save_result
from .write import LABELS, MANY

ROWS = 1_360_000 # of AmazonTitles, about, without rows that have no description and without duplicates
EVERY, MAX_LENGTH = 100, 2048 # lines; tokens of a row that are kept

def add_options(parser):
    parser.add_argument("file", type=Path, help="JSON Lines with title and content")

def read_sample(path):
    "Rows with a content of 20 to 20,000 characters, from every hundredth line"
    import json
    with open(path, encoding="utf-8") as f:
        rows = [json.loads(line) for line in itertools.islice(f, 0, None, EVERY)]
    return [row for row in rows if 20 <= len(row["content"]) <= 20_000]

def row_lengths(rows):
    "Tokens of each row with Llama's tokenizer and chat template, prompt included"
    import unsloth # before transformers
    from descgen.formatting import encode_rows, pin_date, set_eos_and_pad, template_parts
    from .models import llama_tokenizer
    tokenizer = llama_tokenizer()
    pin_date(tokenizer)
    parts = template_parts(tokenizer)
    examples, _ = encode_rows(rows, set_eos_and_pad(tokenizer, parts), parts, MAX_LENGTH, "all")
    return [len(example["input_ids"]) for example in examples]

def run(args):
    lengths = row_lengths(read_sample(args.file))
    save_result(args.results, "gpu-hours", {"tokens_per_row": statistics.mean(lengths), "rows": len(lengths)}, {}, 1)

# Tables

def minutes(seconds):
    "Whole minutes"
    return f"{seconds/60:,.0f} minutes"

def training_times(tokens_per_row, speeds):
    "For each way the time of an epoch"
    tokens = ROWS*tokens_per_row
    measured = {way: s for way, s in speeds["summary"].items() if s["runs"]}
    return [[f"train: {way}", minutes(tokens/s["tokens_per_second"])] for way, s in measured.items()]

def writing_times(read):
    "For each way that was measured with large batches, the time of a description per row"
    rows = []
    for way, label in LABELS.items():
        record = read(f"gpu-write-{way}-llama") or {"summary": {}}
        batches = [(size, found) for size, found in record["summary"].items() if int(size) >= MANY]
        if batches:
            size, fastest = max(batches, key=lambda batch: batch[1]["per_minute"])
            rows.append([f"write: {label}, batches of {size}", minutes(60*ROWS/fastest["per_minute"])])
    return rows

def file_times(read):
    "For each number of GPUs the time that `descgen generate` takes for a description per row"
    record = read("processes-write-llama") or {"summary": {}}
    return [[f"write: descgen generate on {n} GPU{'s' if int(n) > 1 else ''}, claims included",
             minutes(ROWS/found["titles_per_second"])] for n, found in record["summary"].items()]

def tables(read):
    counted, speeds = read("gpu-hours"), read("gpu-compiled-speed-llama")
    if not (counted and speeds):
        return {}
    tokens = counted["summary"]["tokens_per_row"]
    n, times = counted["summary"]["rows"], [*training_times(tokens, speeds), *writing_times(read), *file_times(read)]
    lines = [f"{place(speeds['machine'])}, {tokens:.0f} tokens per row (mean of {n:,} rows).", ""]
    return {"gpu-hours": lines + markdown_table(["", f"{ROWS:,} rows"], times)}
