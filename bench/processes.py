"""Training and writing in several processes beside one: time, losses and adapters.

    python -m bench processes                                       # on a CPU: the embedded model in float32
    python -m bench processes --model WORK/llama --accumulation 8   # on GPUs: Llama's shape, one process per GPU
    python -m bench processes --model WORK/llama --titles 16384     # describing titles instead of training

Each number of processes trains the same recipe for a few steps and for more. The difference of the two times is that of
the steps between, without the start. The numbers take turns. On a CPU the processes share its cores. With `--titles`
each process describes so many titles with the adapter of one step. The first third of them does not count, because
programs are compiled; the partial files tell when the others were finished. Each round is written at once.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from .markdown import circumstances, markdown_table
from .measure import ROOT, interleaved, medians, save_result

COMMON = dict(eval_rows=2, eval_steps=10**6, save_steps=10**6, lora_dropout=0, gradient_checkpointing=False,
    compile=False, overwrite=True)
CPU = COMMON | dict(bf16=False, max_length=512, per_device_train_batch_size=2, gradient_accumulation_steps=4)
GPU = COMMON | dict(load_in_4bit=False, max_length=1024, per_device_train_batch_size=16, optim="adamw_torch_fused",
    logging_steps=4)

def add_options(parser):
    parser.add_argument("--model", type=Path, help="a folder; else the embedded model")
    parser.add_argument("--numbers", type=int, nargs="+", default=[1, 2],
        help="of processes; the first is compared with")
    parser.add_argument("--steps", type=int, nargs=2, default=[4, 12])
    parser.add_argument("--accumulation", type=int, help="gradient_accumulation_steps (default: 4; with --model 1)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--titles", type=int, help="that each process describes")
    parser.add_argument("--data", type=Path, default=ROOT/"data"/"sample.jsonl")

def make_values(args):
    "The recipe but for steps and folder"
    values = GPU | {"model_id": str(args.model.resolve())} if args.model else dict(CPU)
    if args.accumulation or args.model:
        values["gradient_accumulation_steps"] = args.accumulation or 1
    return values | {"data_path": str(args.data.resolve())}

def run_command(words, n):
    "Run Python with some words to its end; its messages if it fails"
    from descgen.processes import process_environment
    env = process_environment(n) | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{words} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")

# Training

def train(values, n, steps, work):
    "Train in n processes; the trainer's seconds and losses"
    import yaml
    folder = work/f"{n}-{steps}"
    path = work/f"{n}-{steps}.yaml"
    path.write_text(yaml.safe_dump(values | {"max_steps": steps, "output_dir": str(folder)}), encoding="utf-8")
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", n]
    run_command(["-m", *launcher, "-m", "descgen.processes", path], n)
    history = json.loads((folder/"manifest.json").read_text(encoding="utf-8"))["history"]
    took = next(entry["train_runtime"] for entry in history if "train_runtime" in entry)
    return {"seconds": took, "losses": [float(entry["loss"]) for entry in history if entry.get("loss") is not None]}

def train_pair(values, n, steps, work):
    "Seconds per step between a short and a long training, and the losses of the long one"
    short, long = (train(values, n, count, work) for count in steps)
    return {"seconds": (long["seconds"] - short["seconds"])/(steps[1] - steps[0]), "whole": long["seconds"],
        "losses": long["losses"]}

def largest_difference(a, b):
    "Of the weights of two adapters"
    from safetensors.torch import load_file
    first, second = (load_file(folder/"adapter"/"adapter_model.safetensors") for folder in (a, b))
    return max((first[name].float() - second[name].float()).abs().max().item() for name in first)

# Writing

def partial_paths(output, n):
    "The files into which `descgen generate` writes finished texts, one per process"
    from descgen.batches import output_paths
    paths = output_paths(output)
    return [paths["partial"]] if n == 1 else [paths["processes"]/f"part-{rank}.jsonl" for rank in range(n)]

def follow_lines(path, ended):
    "The lines of a file while it is written; it need not exist yet"
    while not path.exists():
        if ended.wait(0.05):
            return
    with open(path, "rb") as f:
        while True:
            is_last = ended.is_set() # nothing is written any more
            if (line := f.readline()).endswith(b"\n"):
                yield line
            elif is_last:
                return
            else: # the end so far, or the beginning of a line
                f.seek(-len(line), os.SEEK_CUR)
                ended.wait(0.05)

def watch_texts(path, ended, found):
    "Append when texts were finished, and how many, for each entry of a partial file"
    for line in follow_lines(path, ended):
        if line.startswith(b'{"window"'):
            found.append((time.perf_counter(), json.loads(line)["n_lines"]))

def texts_per_second(found, titles):
    "After a third of the titles: until then programs are compiled"
    total, counts = 0, []
    for moment, n in found:
        total += n
        counts.append((moment, total))
    begin, before = next(pair for pair in counts if pair[1] >= titles/3)
    end, last = counts[-1]
    return (last - before)/(end - begin)

@contextmanager
def watched(output, n):
    "The entries of each process while an output is written"
    ended, found = threading.Event(), [[] for _ in range(n)]
    threads = [threading.Thread(target=watch_texts, args=(path, ended, entries))
               for path, entries in zip(partial_paths(output, n), found)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        ended.set()
        for thread in threads:
            thread.join()

def write(adapter, titles, n, work):
    "Titles per second of `descgen generate` in n processes"
    folder = Path(tempfile.mkdtemp(dir=work))
    (folder/"titles.txt").write_text("\n".join(titles), encoding="utf-8")
    start, output = time.perf_counter(), folder/"texts.jsonl"
    with watched(output, n) as found:
        run_command(["-c", "from descgen.cli import app; app()", "generate", "--adapter", adapter, "--input",
            folder/"titles.txt", "--output", output, "--processes", n, "--no-verify"], n)
    rates = [texts_per_second(entries, len(titles)/n) for entries in found]
    shown = " + ".join(f"{rate:.1f}" for rate in rates)
    print(f"{n}: {shown} titles per second, {time.perf_counter() - start:.0f} s in all", flush=True)
    return sum(rates)

def make_titles(path, count):
    "So many different titles, from those of the data"
    from .measure import read_jsonl
    known = [row["title"] for row in read_jsonl(path)]
    return [f"{title} {i}" for i in range(1 + count//len(known)) for title in known][:count]

def measure_writing(args, values, work):
    "Titles per second of each number of processes, in rounds of which every other one is reversed"
    train(values, 1, 1, work)
    # a process has the same batches for each n
    ways = {str(n): partial(write, work/"1-1"/"adapter", make_titles(args.data, args.titles*n), n, work)
            for n in args.numbers}
    rounds, name = [], f"processes-write-{args.model.name if args.model else 'embedded'}"
    for i in range(args.rounds):
        rounds += interleaved(dict(reversed(ways.items())) if i % 2 else ways, 1)
        rates = medians(rounds)
        save_result(args.results, name, {n: {"titles_per_second": rates[n]} for n in ways}, rounds, i + 1)

# Both

def summarize(rounds, numbers):
    "Medians over rounds, and what they are beside those of the first number"
    summary, first = {}, numbers[0]
    for n in numbers:
        found = [r[str(n)] for r in rounds]
        losses = zip(found[0]["losses"], rounds[0][str(first)]["losses"])
        summary[str(n)] = {
            "seconds_per_step": statistics.median(r["seconds"] for r in found),
            "whole": statistics.median(r["whole"] for r in found),
            "loss_difference": max((abs(a - b) for a, b in losses), default=0.)}
    return summary

def run(args):
    values, work = make_values(args), Path(tempfile.mkdtemp(prefix="processes-"))
    if args.titles:
        return measure_writing(args, values, work)
    if args.model: # kernels are compiled, and the first training of a number would pay for it
        for n in args.numbers:
            train(values, n, 1, work)
    ways = {str(n): partial(train_pair, values, n, args.steps, work) for n in args.numbers}
    rounds = interleaved(ways, args.rounds, alternate=True)
    folders = [work/f"{n}-{args.steps[1]}" for n in args.numbers]
    summary = summarize(rounds, args.numbers)
    for n, folder in zip(args.numbers, folders):
        summary[str(n)]["adapter_difference"] = largest_difference(folders[0], folder)
    variant = f"-{args.model.name}-{values['gradient_accumulation_steps']}" if args.model else ""
    save_result(args.results, f"processes{variant}", summary, rounds, args.rounds)

# Tables

def process_table(record):
    "Each number of processes beside the first"
    found, rows = record["summary"], []
    first = next(iter(found.values()))
    for n, s in found.items():
        rows.append([n, f"{s['seconds_per_step']:.2f} s", f"{first['seconds_per_step']/s['seconds_per_step']:.2f}",
            f"{s['whole']:.0f} s", f"{s['loss_difference']:.1e}", f"{s['adapter_difference']:.1e}"])
    head = ["processes", "per step", "times one", "longest training", "largest difference of a loss", "of a weight"]
    return [circumstances(record, "torch", "transformers", "trl", "accelerate"), "", *markdown_table(head, rows)]

def writing_table(record):
    "Descriptions per minute of each number of processes beside the first"
    rates = {n: s["titles_per_second"] for n, s in record["summary"].items()}
    first = next(iter(rates.values()))
    rows = [[n, f"{60*rate:,.0f}", f"{rate/first:.2f}"] for n, rate in rates.items()]
    return [circumstances(record, "torch", "transformers"), "", *markdown_table(
        ["processes", "descriptions per minute", "times one"], rows)]

def tables(read):
    kinds = {"processes": process_table, "processes-llama-8": process_table, "processes-write-llama": writing_table}
    return {name: table(record) for name, table in kinds.items() if (record := read(name))}
