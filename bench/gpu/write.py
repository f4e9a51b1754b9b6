"""Writing descriptions on a GPU by batch size: descgen beside transformers' `generate`.

    python -m bench gpu-write all llama WORK       # these three, which take turns on the card
    python -m bench gpu-write descgen llama WORK   # base in 4 bits, with an adapter
    python -m bench gpu-write static llama WORK    # `generate` in 16 bits, adapter merged: dynamic and static cache
    python -m bench gpu-write plain llama WORK     # `generate` with PEFT, base in 4 bits
    python -m bench gpu-write vllm llama WORK      # vLLM, if it is installed: 16 bits, adapter merged
    python -m bench gpu-write descgen llama WORK --sources 2

Each text has as many tokens as every other one. descgen and PEFT sample, as users do; the merged model is greedy, which
is faster. The fastest round counts. Sides that are started together load and compile at once, and measure one after the
other: round by round and batch by batch.
"""
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..markdown import circumstances, markdown_table, number
from ..measure import NOTEBOOK, ROOT, save_result
from .card import (CARD, GPU_SCRATCH, add_model_options, card_lock, has_gpu, peak_gb, reset_peak,
    synchronized_time)
from .models import model_folder, read_rows, with_sources

NEW_TOKENS = 128 # of a description
TITLES = 2048 # with batches of at least `MANY`; smaller batches get as many titles as they hold
MANY = 128
SMALL_SIZES, SMALL_TITLES = (1, 2), 5
ALL_SIDES = ("descgen", "static", "plain") # all but vLLM, which is not among descgen's requirements

def add_options(parser):
    parser.add_argument("side", choices=["all", *ALL_SIDES, "vllm"])
    add_model_options(parser)
    parser.add_argument("--rounds", type=int, default=2, help="the fastest counts")
    parser.add_argument("--sources", type=int, default=0, help="in each prompt of descgen")
    parser.add_argument("--sizes", type=int, nargs="+", help="batch sizes (default: all of the side)")
    parser.add_argument("--suffix", help="of the result's name, to keep it beside that of another card: h100")
    parser.add_argument("--profile", action="store_true",
        help="also the operations that take most time, for the smallest and the largest batch")

@dataclass(frozen=True)
class Way:
    "A way to write descriptions"
    write:object # (rows, batch size, new tokens)
    sizes:tuple # of its batches

@dataclass
class Found:
    "What was measured with one batch size"
    titles:int
    seconds:list = field(default_factory=list)
    memory_gb:float = 0.
    failed:str|None = None
    profile:list|None = None

# The sides

class NeverEnds:
    "A tokenizer whose end token no model writes"
    def __init__(self, tokenizer):
        self.eos_token_id, self.pad_token_id = -1, tokenizer.pad_token_id

def descgen_ways(source, args):
    "descgen, as the notebook describes"
    import unsloth # before transformers
    from descgen import decoding, static_decoding
    from descgen.formatting import prompt_ids, template_parts
    from descgen.inference import Sampling, complete
    from descgen.model import LoraSettings, add_lora, load_model
    if not has_gpu():
        decoding.decode = static_decoding.decode_static # try what a GPU does
    model, tokenizer = load_model(str(source), 2048, not args.small, "bfloat16")
    model, parts = add_lora(model, LoraSettings(lora_dropout=0)), template_parts(tokenizer)
    model.eval()
    def write(rows, size, new_tokens):
        prompts = [prompt_ids(row["title"], tokenizer, parts, row.get("sources", ())) for row in rows]
        found = complete(model, NeverEnds(tokenizer), prompts,
            Sampling(new_tokens, batch_size=size), progress=False)
        return tokenizer.batch_decode(found)
    return {"descgen": Way(write, (1, 8, 32, 128, 512, 1024, 2048))}

def load_plain(source, in_4_bits):
    "A model with an adapter by transformers and PEFT"
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from descgen.model import TARGETS
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                             bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16,
                                                device_map={"": 0} if has_gpu() else None,
                                                quantization_config=nf4 if in_4_bits else None)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(base, config).eval()

def generate_writer(model, tokenizer, **options):
    "transformers' `generate`, in batches of one width, padded on the left"
    import torch
    from descgen.formatting import chat_messages
    model.generation_config.eos_token_id = -1 # no text ends early
    def encode(texts, width):
        return tokenizer(texts, return_tensors="pt", padding="max_length", max_length=width,
            add_special_tokens=False).to(model.device)
    def write(rows, size, new_tokens):
        texts = [tokenizer.apply_chat_template(chat_messages(row["title"]), tokenize=False, add_generation_prompt=True)
                 for row in rows]
        width = max(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
        found = []
        for start in range(0, len(texts), size):
            with torch.no_grad():
                ids = model.generate(**encode(texts[start:start + size], width), max_new_tokens=new_tokens,
                    pad_token_id=tokenizer.pad_token_id, **options)
            found += tokenizer.batch_decode(ids[:, width:])
        return found
    return write

def plain_ways(source, args):
    "transformers and PEFT, with the same sampling"
    from transformers import AutoTokenizer
    model, tokenizer = load_plain(source, not args.small), AutoTokenizer.from_pretrained(source, padding_side="left")
    write = generate_writer(model, tokenizer, do_sample=True, temperature=0.7, top_p=0.9)
    return {"plain": Way(write, (1, 8, 32, 128))}

def vllm_ways(source, args):
    "vLLM with a merged adapter, greedy; a batch is the titles that it gets at once"
    import torch
    from transformers import AutoTokenizer
    from descgen.formatting import prompt_ids, template_parts
    from descgen.inference import Sampling
    from descgen.vllm import VllmModel
    tokenizer, merged = AutoTokenizer.from_pretrained(source), args.work/"merged"
    load_plain(source, False).merge_and_unload().save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    torch.cuda.empty_cache()
    model, parts = VllmModel(merged, gpu_memory_utilization=0.5), template_parts(tokenizer)
    def write(rows, size, new_tokens):
        prompts, found = [prompt_ids(row["title"], tokenizer, parts) for row in rows], []
        sampling = Sampling(new_tokens, greedy=True)
        for start in range(0, len(prompts), size):
            found += model.complete(NeverEnds(tokenizer), prompts[start:start + size], sampling, None, False)
        return tokenizer.batch_decode(found)
    return {"vllm": Way(write, (1, 8, 128, 512, 1024, 2048))}

def static_ways(source, args):
    "transformers with a merged adapter, greedy: the usual cache, and the static one, which compiles its steps"
    from transformers import AutoTokenizer
    model = load_plain(source, False).merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    dynamic = generate_writer(model, tokenizer, do_sample=False)
    static = generate_writer(model, tokenizer, do_sample=False, cache_implementation="static")
    return {"merged": Way(dynamic, (1, 8, 128, 512, 1024)), "static": Way(static, (1, 8, 128, 512, 1024))}

MAKERS = {"descgen": descgen_ways, "static": static_ways, "plain": plain_ways, "vllm": vllm_ways}

# Measuring

@contextmanager
def turn():
    "The card alone; then another side has time to take it"
    with card_lock():
        yield
    time.sleep(0.2)

def titles_for(size, args):
    "How many titles are written with a batch size"
    if args.small: return SMALL_TITLES
    return max(size, TITLES if size >= MANY else 0)

def measure(way, rows, size, found, args):
    "One round of a way; the first one warms up before, and an error ends the batch size"
    try:
        with turn():
            reset_peak()
            if not found.seconds:
                way.write(rows[:size], size, args.new_tokens)
            start = synchronized_time()
            way.write(rows, size, args.new_tokens)
            found.seconds.append(synchronized_time() - start)
            found.memory_gb = max(found.memory_gb, peak_gb())
    except Exception as e:
        found.failed = f"{type(e).__name__}: {str(e).strip().splitlines()[0][:200]}"
        print(found.failed, flush=True)

def profile(write, rows, size):
    "The operations that take most time while 16 tokens are written: name, milliseconds, calls"
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record_profile
    kind = ProfilerActivity.CUDA if has_gpu() else ProfilerActivity.CPU
    with turn():
        write(rows[:size], size, 16)
        with record_profile(activities=[kind]) as recorded:
            write(rows[:size], size, 16)
    name = "self_device_time_total" if has_gpu() else "self_cpu_time_total"
    events = sorted(recorded.key_averages(), key=lambda event: -getattr(event, name))[:20]
    return [[event.key[:80], round(getattr(event, name)/1000, 2), event.count] for event in events]

def measure_ways(ways, rows, args):
    "Each way with each batch size, in rounds that take turns: {way: {size: Found}}"
    sizes = {name: SMALL_SIZES if args.small else args.sizes or way.sizes for name, way in ways.items()}
    found = {name: {size: Found(titles_for(size, args)) for size in sizes[name]} for name in ways}
    for _ in range(args.rounds):
        for size in sorted(set().union(*sizes.values())):
            for name, way in ways.items():
                one = found[name].get(size)
                if one is None or one.failed: continue
                some = (rows*(1 + one.titles//len(rows)))[:one.titles]
                measure(way, some, size, one, args)
                save(args, name, found[name])
    if args.profile:
        profile_ways(ways, rows, found, args)
    return found

def profile_ways(ways, rows, found, args):
    "Profile each way's smallest and largest batch, and save"
    for name, way in ways.items():
        done = [size for size, one in found[name].items() if one.seconds]
        for size in {min(done), max(done)} if done else ():
            some = rows*(1 + size//len(rows))
            found[name][size].profile = profile(way.write, some, size)
        save(args, name, found[name])

def summarize(found, new_tokens):
    "Descriptions per minute, tokens per second and memory, by batch size"
    summary = {}
    for size, one in found.items():
        if not one.seconds:
            continue
        rate = one.titles/min(one.seconds)
        summary[str(size)] = {"per_minute": 60*rate, "tokens_per_second": new_tokens*rate, "memory_gb": one.memory_gb}
    return summary

def save(args, way, found):
    "Write what is measured so far"
    parts = [way, args.sources and "sources", args.model, args.small and "small", args.suffix]
    name = "-".join(["gpu-write", *filter(None, parts)])
    raw = {str(size): vars(one) for size, one in found.items()}
    save_result(args.results, name, summarize(found, args.new_tokens), raw, args.rounds, "fastest")

def run_together(args):
    "Start all sides as processes of their own, with a log each, and wait for them"
    GPU_SCRATCH.mkdir(parents=True, exist_ok=True)
    words = sys.argv[sys.argv.index("all") + 1:]
    running = {}
    for side in ALL_SIDES:
        compiled = str(GPU_SCRATCH/f"compiled-write-{side}") # of two processes in one folder, one finds half a file
        with open(GPU_SCRATCH/f"gpu-write-{side}.log", "w") as log:
            running[side] = subprocess.Popen([sys.executable, "-m", "bench", "gpu-write", side, *words], cwd=ROOT,
                stdout=log, stderr=log, env=os.environ | {"UNSLOTH_COMPILE_LOCATION": compiled})
    for side, process in running.items():
        log = GPU_SCRATCH/f"gpu-write-{side}.log"
        print(f"{side}: {'done' if process.wait() == 0 else 'FAILED, see ' + log.name}", flush=True)

def run(args):
    source = model_folder(args.model, args.work, args.small)
    if args.side == "all":
        return run_together(args)
    args.new_tokens = 4 if args.small else NEW_TOKENS
    rows = read_rows(args.rows)
    if args.sources:
        from descgen.recipe import read_defaults
        rows = with_sources(rows, args.sources, read_defaults(NOTEBOOK)["source_chars"])
    measure_ways(MAKERS[args.side](source, args), rows, args)

# Tables

LABELS = {
    "descgen": "descgen",
    "descgen-sources": "descgen, two sources in each prompt",
    "static": "transformers, merged, static cache", "merged": "transformers, merged",
    "plain": "transformers + PEFT", "vllm": "vLLM, merged"}

def table_of(records, key, form, sizes):
    "A figure by batch size and way; empty where it was not measured"
    rows = []
    for size in sizes:
        figures = [record["summary"].get(size, {}).get(key) for record in records.values()]
        rows.append([size, *(number(figure, form) for figure in figures)])
    return rows

def write_tables(records):
    "Speed and memory of the ways, by batch size"
    sizes = sorted({size for record in records.values() for size in record["summary"]}, key=int)
    head = [LABELS[way] for way in records]
    rates = table_of(records, "per_minute", ",.0f", sizes)
    alone = [record["summary"].get("1") for record in records.values()]
    rates.append(["one title, ms per token", *(number(one and 60_000/one["per_minute"]/NEW_TOKENS, ".1f")
                                               for one in alone)])
    lines = [circumstances(next(iter(records.values())), *CARD), "",
             *markdown_table(["batch: descriptions per minute", *head], rates)]
    memory = [row for row in table_of(records, "memory_gb", ".1f", sizes) if any(row[1:])]
    if memory:
        lines += ["", *markdown_table(["batch: peak memory in GB", *head], memory)]
    return lines

def tables(read):
    found = {}
    for marker, suffix in {"gpu-write": "", "gpu-write h100": "-h100"}.items():
        records = {way: record for way in LABELS if (record := read(f"gpu-write-{way}-llama{suffix}"))}
        if records:
            found[marker] = write_tables(records)
    return found
