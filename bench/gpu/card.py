"""Shared by the subjects on a GPU: one process at a time, time and memory on the card, and the card's own rate."""
import fcntl
import gc
import os
import statistics
import time
from contextlib import contextmanager
from pathlib import Path

from ..measure import ROOT, SCRATCH

os.environ.setdefault("HF_HUB_OFFLINE", "1")
GPU_SCRATCH = SCRATCH/"gpu" # logs, compiled code, executed notebooks
SAMPLE = ROOT/"data"/"sample.jsonl"
# versions that a table names
CARD = ("torch", "transformers", "trl", "peft", "unsloth", "bitsandbytes", "xformers")

def add_model_options(parser, with_model=True, models=("llama", "embedded")):
    "The options that most subjects on a GPU have"
    if with_model:
        parser.add_argument("model", choices=models)
    parser.add_argument("work", type=Path, help="folder of the models")
    parser.add_argument("--rows", type=Path, default=SAMPLE)
    parser.add_argument("--small", action="store_true",
        help="a tiny model, for a try without a GPU")

def has_gpu():
    import torch
    return torch.cuda.is_available()

def device():
    return "cuda" if has_gpu() else "cpu"

@contextmanager
def card_lock():
    "Measure alone: other processes of this bench load their libraries meanwhile, and wait"
    GPU_SCRATCH.mkdir(parents=True, exist_ok=True)
    with open(GPU_SCRATCH/".lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield

def synchronized_time():
    "Seconds, when the GPU has finished its work"
    import torch
    if has_gpu():
        torch.cuda.synchronize()
    return time.perf_counter()

def reset_peak():
    "Free what can be freed, and measure the peak from here; returns the GB that are still in use"
    import torch
    gc.collect()
    if not has_gpu():
        return 0.
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()/1e9

def peak_gb():
    import torch
    return torch.cuda.max_memory_allocated()/1e9 if has_gpu() else 0.

def matmul_rate(n=None, repeats=20):
    "What the card or processor can do: bf16 operations per second in a large product of random matrices, median"
    import torch
    n = n or (8192 if has_gpu() else 512)
    a, b = (torch.randn(n, n, device=device(), dtype=torch.bfloat16) for _ in range(2))
    took = []
    for _ in range(repeats + 3):
        start = synchronized_time()
        a @ b
        took.append(synchronized_time() - start)
    return 2*n**3/statistics.median(took[3:])

def flop_per_token(config):
    """Operations per token that LoRA training needs at least: each matrix forward, and backward to its input

    Attention's products and recomputing do not count."""
    c = config
    key_value = 2*c.num_key_value_heads*c.head_dim
    layer = c.hidden_size*(2*c.num_attention_heads*c.head_dim + key_value + 3*c.intermediate_size)
    return 4*(c.num_hidden_layers*layer + c.hidden_size*c.vocab_size)
