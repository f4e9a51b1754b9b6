"""Training with the model sharded over GPUs by FSDP2: losses, speed and memory per card beside one GPU.

    python -m bench fsdp WORK            # Llama 3.1 8B's shape with random weights, on one GPU and on two
    python -m bench fsdp WORK --small    # a tiny shape, in one process and in two on a CPU

Both ways train the same few steps through the same path: one GPU is FSDP with one process. A step has as many packs on
one GPU as on two, in batches of the same size. The model is made in WORK, 16 GB. WORK also keeps the log of each
training. The result is written again after each number of GPUs. CUDA_VISIBLE_DEVICES chooses the GPUs.
"""
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from .markdown import circumstances, markdown_table
from .measure import ROOT, peak_memory_gb, run_child, save_result

START = time.monotonic()
VALUES = dict(warmup_steps=0, lr_scheduler_type="constant", lora_dropout=0, logging_steps=1, eval_rows=2,
    eval_steps=10**6, save_steps=10**6, overwrite=True)
GPU = dict(bf16=True, max_length=1024, per_device_train_batch_size=4, learning_rate=3e-4)
SMALL = dict(bf16=False, max_length=128, per_device_train_batch_size=4, learning_rate=3e-2)
MARK = "bench fsdp" # in the lines of a training that are shown

def add_options(parser):
    parser.add_argument("work", type=Path, help="folder for the model, the logs and the adapters")
    parser.add_argument("--small", action="store_true", help="a tiny shape on a CPU")
    parser.add_argument("--numbers", type=int, nargs="+", default=[1, 2],
        help="of processes; the first is compared with")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--data", type=Path, default=ROOT/"data"/"sample.jsonl")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a training (default: 600)")
    parser.add_argument("--recipe", type=Path, help="train it as one of the processes; for this command's own use")

def say(text):
    "Show what happens, with the seconds since this process started"
    place = f", process {os.environ['RANK']}" if "RANK" in os.environ else ""
    print(f"{MARK}{place}, {time.monotonic() - START:.0f} s: {text}", file=sys.stderr, flush=True)

# As one of the processes of a training

def step_clock():
    "A callback that keeps the seconds of each step"
    import torch
    from transformers import TrainerCallback
    def now():
        "The time when the GPU has finished"
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()
    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds = []
        def on_step_begin(self, args, state, control, **kw):
            "Start the clock"
            self.start = now()
        def on_step_end(self, args, state, control, **kw):
            "Stop it"
            self.seconds.append(now() - self.start)
            say(f"step {state.global_step} of {state.max_steps} took {self.seconds[-1]:.2f} s, peak {memory():.1f} GB")
    return Clock()

def memory():
    "Peak memory of this process: of its GPU, or on a CPU its resident memory, in GB"
    import torch
    return torch.cuda.max_memory_allocated()/1e9 if torch.cuda.is_available() else peak_memory_gb()

def count_tokens(module):
    "A list that gets the number of tokens of each batch that the trainer of a module makes"
    counts, usual = [], module.collate
    def collate(packs):
        "A batch; its tokens are counted"
        counts.append(sum(len(pack["input_ids"]) for pack in packs))
        return usual(packs)
    module.collate = collate
    return counts

def train_as_one(path):
    "Train a recipe as one of the processes, and write what this process measured beside its log"
    import descgen.train
    from descgen import processes
    clock, counts, usual = step_clock(), count_tokens(descgen.train), processes.train
    def train(*args):
        "Train with a clock"
        *others, callbacks = args
        say("training starts")
        return usual(*others, [*callbacks, clock])
    processes.train = train
    say("loading data and model")
    processes.main([str(path)])
    measured = {"seconds": clock.seconds, "tokens": counts, "memory_gb": memory()}
    path.with_suffix(f".rank-{os.environ['RANK']}.json").write_text(json.dumps(measured), encoding="utf-8")

# Starting a training

def environment(n, small):
    "Variables of a process: only the first `n` of the visible GPUs, or none"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n)))
    devices = "" if small else ",".join(visible.split(",")[:n])
    threads = {"OMP_NUM_THREADS": "1"} if small else {}
    return threads | {"CUDA_VISIBLE_DEVICES": devices, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}

def follow(process, log):
    "Copy what a process prints into a file, and show its marked lines"
    for line in process.stdout:
        log.write(line)
        log.flush()
        if MARK in line: # a progress bar may stand before it
            sys.stderr.write(f"  {line[line.index(MARK):]}")
    return process.wait()

def kill_tree(pid):
    "Kill a process and those that it started, which have groups of their own"
    import psutil
    root = psutil.Process(pid)
    for process in [*root.children(recursive=True), root]:
        with suppress(psutil.NoSuchProcess):
            process.kill()

def run_logged(command, path, env, timeout):
    "Run a command to its end; if it fails or takes too long, its last lines are shown"
    with open(path, "w", encoding="utf-8") as log:
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=os.environ | env, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace")
        timer = threading.Timer(timeout, kill_tree, (process.pid,))
        timer.start()
        try:
            status = follow(process, log)
        finally:
            timer.cancel()
    if status:
        raise SystemExit(f"{path.read_text(encoding='utf-8')[-8000:]}\nThe training ended with {status}. Log: {path}")

def train(args, model, n):
    "Train with `n` processes; what each measured, and the losses"
    path, folder = args.work/f"fsdp-{n}.yaml", args.work/f"fsdp-{n}"
    usual = SMALL if args.small else GPU
    values = VALUES | usual | {"model_id": str(model), "data_path": str(args.data.resolve()),
        "max_steps": args.steps, "gradient_accumulation_steps": max(args.numbers), "output_dir": str(folder)}
    path.write_text(json.dumps(values, indent=1), encoding="utf-8") # JSON is YAML
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT/"recipes"/"fsdp.yaml",
        "--num_processes", n, "--main_process_port", 0]
    command = [*launcher, "-m", "bench", "fsdp", args.work, "--recipe", path]
    run_logged(command, args.work/f"fsdp-{n}.log", environment(n, args.small), args.timeout)
    history = json.loads((folder/"manifest.json").read_text(encoding="utf-8"))["history"]
    ranks = [json.loads(path.with_suffix(f".rank-{i}.json").read_text(encoding="utf-8")) for i in range(n)]
    return {"losses": [float(entry["loss"]) for entry in history if entry.get("loss") is not None],
        "test_losses": [entry["test_loss"] for entry in history if "test_loss" in entry], "ranks": ranks}

# The result

def summarize_way(found, first, batches):
    "Losses beside those of the first way, speed without the first step, and memory; `batches` per process and step"
    ranks, steps = found["ranks"], len(found["losses"])
    tokens = sum(sum(rank["tokens"][batches:batches*steps]) for rank in ranks)
    seconds = max(sum(rank["seconds"][1:]) for rank in ranks)
    pairs = [*zip(found["losses"], first["losses"]), *zip(found["test_losses"], first["test_losses"])]
    return {"losses": found["losses"], "test_losses": found["test_losses"],
        "loss_difference": max(abs(a - b) for a, b in pairs),
        "tokens_per_second": tokens/seconds, "seconds_per_step": seconds/(steps - 1),
        "memory_gb": [rank["memory_gb"] for rank in ranks]}

def model_folder(args):
    "The folder of the model, made by a process of its own"
    name = "llama-8b"
    say(f"making the model in {args.work}")
    words = ["--small"] if args.small else []
    return run_child("gpu-models", name, args.work, *words, **environment(1, args.small))["folder"]

def run(args):
    args.work = args.work.resolve()
    if args.recipe:
        return train_as_one(args.recipe)
    args.work.mkdir(parents=True, exist_ok=True)
    model, found, summary = model_folder(args), {}, {}
    for n in args.numbers:
        say(f"training with {n} {'process' if n == 1 else 'processes'}, log in {args.work/f'fsdp-{n}.log'}")
        found[str(n)] = train(args, model, n)
        summary[str(n)] = summarize_way(found[str(n)], found[str(args.numbers[0])], max(args.numbers)//n)
        save_result(args.results, "fsdp-small" if args.small else "fsdp", summary, found)
    say("finished")

# Tables

def way_row(n, way):
    "A line of the table"
    memory = way["memory_gb"]
    return [n, f"{way['losses'][0]:.3f}", f"{way['losses'][-1]:.3f}", f"{way['loss_difference']:.1e}",
        f"{max(memory):.1f} GB", f"{way['seconds_per_step']:.2f} s", f"{way['tokens_per_second']:,.0f}"]

def fsdp_table(record):
    "Each number of GPUs beside the first"
    head = ["GPUs", "loss of the first step", "of the last", "largest difference of a loss", "peak memory per GPU",
        "per step", "tokens per second"]
    rows = [way_row(n, way) for n, way in record["summary"].items()]
    return [circumstances(record, "torch", "transformers", "accelerate", "peft"), "", *markdown_table(head, rows)]

def tables(read):
    return {"fsdp": fsdp_table(record)} if (record := read("fsdp")) else {}
