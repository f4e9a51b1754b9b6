"""What the measurements share: whose turn it is on the GPU, time, memory, the card's own rate, and results kept in files."""
import fcntl, json, os, platform, statistics, sys, time
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path: sys.path.append(str(ROOT))
KEPT = Path("outputs/bench/gpu")

def has_gpu():
    import torch
    return torch.cuda.is_available()

def device(): return "cuda" if has_gpu() else "cpu"

@contextmanager
def turn():
    "Measure alone: other processes of this bench may load their libraries meanwhile, and wait"
    KEPT.mkdir(parents=True, exist_ok=True)
    with open(KEPT/".turn", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield

def now():
    "Seconds, when the GPU has done what it was given"
    import torch
    if has_gpu(): torch.cuda.synchronize()
    return time.perf_counter()

def forget_peak():
    import gc, torch
    gc.collect()
    if has_gpu(): torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()

def peak_gb():
    import torch
    return torch.cuda.max_memory_allocated()/1e9 if has_gpu() else 0.

def matmul_rate(n=8192, repeats=20):
    "What this card does at best: bf16 operations a second of a large product of random matrices, median"
    import torch
    if not has_gpu(): n, repeats = 512, 3
    a, b = (torch.randn(n, n, device=device(), dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(repeats + 3):
        start = now(); a @ b; seconds.append(now() - start)
    return 2*n**3/statistics.median(seconds[3:])

def flop_per_token(config):
    "Operations a token that LoRA training cannot do without: each matrix forward, and backward to its input; neither attention's products nor recomputing count"
    c, kv = config, config.num_key_value_heads*config.head_dim
    layer = c.hidden_size*(2*c.num_attention_heads*c.head_dim + 2*kv + 3*c.intermediate_size)
    return 4*(c.num_hidden_layers*layer + c.hidden_size*c.vocab_size)

def machine():
    "The card and the versions, for a table's head"
    import torch
    def of(name):
        try: return f"{name} {version(name)}"
        except PackageNotFoundError: return f"no {name}"
    card = torch.cuda.get_device_name() if has_gpu() else f"no GPU ({platform.machine()})"
    return f"{card}, Python {platform.python_version()}, " + ", ".join(map(of, ("torch", "transformers", "trl", "peft", "unsloth", "bitsandbytes", "xformers")))

def keep(name, result):
    "Write a result where the tables are made from"
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT/f"{name}.json").write_text(json.dumps(result, indent=1))
    return result

def kept(name):
    path = KEPT/f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}
