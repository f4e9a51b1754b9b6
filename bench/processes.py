"""Training and writing in several processes beside one: time, losses and adapters.

    python -m bench processes                                     # on a CPU: the embedded model in float32
    python -m bench processes --model WORK/llama --titles 2048    # on GPUs: Llama's shape, one process per GPU

Each number of processes trains the same recipe for a few steps and for more. The difference of the two times is that of
the steps between, without the start. The numbers take turns. On a CPU the processes share its cores. With `--titles`
they also describe so many titles, and five times as many, with the adapter of the longest training.
"""
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from .markdown import circumstances, markdown_table, number
from .measure import ROOT, interleaved, save_result

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
    parser.add_argument("--titles", type=int, help="to describe")
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

def write(adapter, titles, n, work):
    "Seconds of `descgen generate` in n processes"
    path, out = work/f"titles-{len(titles)}.txt", work/f"texts-{n}-{len(titles)}.jsonl"
    path.write_text("\n".join(titles), encoding="utf-8")
    start = time.perf_counter()
    run_command(["-c", "from descgen.cli import app; app()", "generate", "--adapter", adapter, "--input", path,
        "--output", out, "--processes", n, "--overwrite", "--no-verify"], n)
    return time.perf_counter() - start

def write_pair(adapter, n, args, work):
    "Titles per second between few and five times as many titles"
    from .measure import read_jsonl
    known = [row["title"] for row in read_jsonl(args.data)]
    titles = [f"{title} {i}" for i in range(1 + 5*args.titles//len(known)) for title in known]
    few, many = (write(adapter, titles[:count], n, work) for count in (args.titles, 5*args.titles))
    return 4*args.titles/(many - few)

# Both

def summarize(rounds, numbers, written):
    "Medians over rounds, and what they are beside those of the first number"
    from statistics import median
    summary, first = {}, numbers[0]
    for n in numbers:
        found = [r[str(n)] for r in rounds]
        losses = zip(found[0]["losses"], rounds[0][str(first)]["losses"])
        summary[str(n)] = {
            "seconds_per_step": median(r["seconds"] for r in found),
            "whole": median(r["whole"] for r in found),
            "loss_difference": max((abs(a - b) for a, b in losses), default=0.),
            "titles_per_second": written.get(str(n))}
    return summary

def run(args):
    values, work = make_values(args), Path(tempfile.mkdtemp(prefix="processes-"))
    if args.model: # kernels are compiled, and the first training of a number would pay for it
        for n in args.numbers:
            train(values, n, 1, work)
    ways = {str(n): partial(train_pair, values, n, args.steps, work) for n in args.numbers}
    rounds = interleaved(ways, args.rounds, alternate=True)
    folders = [work/f"{n}-{args.steps[1]}" for n in args.numbers]
    written = {str(n): write_pair(folders[0]/"adapter", n, args, work) for n in args.numbers if args.titles}
    summary = summarize(rounds, args.numbers, written)
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
        rate, of_first = s["titles_per_second"], first["titles_per_second"]
        rows.append([n, f"{s['seconds_per_step']:.2f} s", f"{first['seconds_per_step']/s['seconds_per_step']:.2f}",
            f"{s['whole']:.0f} s", f"{s['loss_difference']:.1e}", f"{s['adapter_difference']:.1e}",
            number(rate and 60*rate, ",.0f"), number(rate and rate/of_first, ".2f")])
    head = ["processes", "per step", "times one", "longest training", "largest difference of a loss", "of a weight",
        "descriptions per minute", "times one"]
    return [circumstances(record, "torch", "transformers", "trl", "accelerate"), "", *markdown_table(head, rows)]

def tables(read):
    names = ("processes", "processes-llama-1", "processes-llama-8")
    return {name: process_table(record) for name in names if (record := read(name))}
