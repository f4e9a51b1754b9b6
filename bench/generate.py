"""Describing a file of titles on a CPU: descgen's `generate` beside the ways that others would take.

    python -m bench generate ROWS.jsonl --adapter DIR

All ways write the same titles, greedily. Each has a process of its own:

- **seed**: one title at a time with transformers' `generate` and PEFT, as the seed's README does.
- **batches**: the same in padded batches of 16 in the order of the file.
- **continuous**: transformers' `generate_batch`, if it runs on this machine.
- **llama16**, **llama8**: llama-cpp-python on the adapter's export as GGUF in 16 and 8 bits, one title at a time
  (`--llama-python`: the Python of an environment that has it). The weights are not repacked: with repacked ones
  llama.cpp crashes on some processors.
- **descgen**: `descgen.batches.generate`, with its files.

The limits: the weights are read once for each step of a full batch, at the rate at which memory is copied; the products
with the weights take as long as a large product of as many operations. In float32, the texts of descgen and of the
seed's loop are compared. How memory grows with the number of titles is measured with a tiny random model and short
texts, because the embedded model would take hours. An interrupted call continues with the next part.
"""
import json
import os
import subprocess
import sys
import time
from contextlib import redirect_stdout
from functools import partial
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

from .gpu.card import matmul_rate
from .markdown import circumstances, markdown_table
from .measure import (SCRATCH, measure_parts, medians, peak_memory_gb, print_result, read_jsonl,
    run_child, save_result, seconds)

WAYS = ("seed", "batches", "continuous", "llama16", "llama8", "descgen")
LLAMAS = ("llama16", "llama8")
IN_A_BATCH = 16 # of the way "batches"
SHORT = 2 # tokens of a text, if memory is measured

def add_options(parser):
    parser.add_argument("rows", type=Path)
    parser.add_argument("--adapter", type=Path, required=True, help="of the embedded model, trained without sources")
    parser.add_argument("--titles", type=int, default=200)
    parser.add_argument("--equal-titles", type=int, default=200, help="titles compared in float32")
    parser.add_argument("--memory-titles", type=int, nargs="*", default=[1_000, 100_000],
                        help="numbers of titles for which the peak memory is measured")
    parser.add_argument("--new-tokens", type=int, default=128, help="most tokens of a text")
    parser.add_argument("--batch-size", type=int, default=64, help="of descgen")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--llama-python", type=Path, help="a Python with llama-cpp-python")
    parser.add_argument("--way", choices=[*WAYS, "memory"], help="only this way, in this process")
    parser.add_argument("--dtype", default="bfloat16")

def load_peer(args):
    "The adapter on its base with transformers and PEFT alone, and the prompts"
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from descgen.formatting import prompt_ids, template_parts
    from descgen.model import embedded_model
    base = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=getattr(torch, args.dtype))
    model = PeftModel.from_pretrained(base, str(args.adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.adapter)
    parts = template_parts(tokenizer)
    titles = [row["title"] for row in read_jsonl(args.rows)[:args.titles]]
    return model, tokenizer, [prompt_ids(title, tokenizer, parts) for title in titles]

def write_padded(model, tokenizer, prompts, args):
    "The new tokens of a batch, up to the end token"
    import torch
    width = max(map(len, prompts))
    ids = [[tokenizer.pad_token_id]*(width - len(p)) + p for p in prompts]
    mask = [[0]*(width - len(p)) + [1]*len(p) for p in prompts]
    with torch.no_grad():
        out = model.generate(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), do_sample=False,
                             max_new_tokens=args.new_tokens, pad_token_id=tokenizer.pad_token_id,
                             eos_token_id=tokenizer.eos_token_id)
    return [cut_at_end(row, tokenizer.eos_token_id) for row in out[:, width:].tolist()]

def cut_at_end(ids, end):
    "Token ids before the end token"
    return ids[:ids.index(end)] if end in ids else ids

def timed_texts(write, tokenizer):
    "Seconds, texts and number of tokens of a way"
    start = time.perf_counter()
    completions = write()
    took = time.perf_counter() - start
    texts = [tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
             for ids in completions]
    return {"seconds": took, "texts": texts, "tokens": sum(map(len, completions))}

def run_seed(args):
    model, tokenizer, prompts = load_peer(args)
    write_padded(model, tokenizer, prompts[:1], args)
    return timed_texts(lambda: [write_padded(model, tokenizer, [prompt], args)[0] for prompt in prompts], tokenizer)

def run_batches(args):
    model, tokenizer, prompts = load_peer(args)
    write_padded(model, tokenizer, prompts[:2], args)
    def write():
        found = []
        for start in range(0, len(prompts), IN_A_BATCH):
            found += write_padded(model, tokenizer, prompts[start:start + IN_A_BATCH], args)
        return found
    return timed_texts(write, tokenizer)

def run_continuous(args):
    from transformers import GenerationConfig
    model, tokenizer, prompts = load_peer(args)
    model = model.merge_and_unload()
    settings = GenerationConfig(do_sample=False, max_new_tokens=args.new_tokens,
                                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    def write():
        outputs = model.generate_batch(prompts, generation_config=settings, progress_bar=False)
        in_order = sorted(outputs.values(), key=lambda out: int(out.request_id.rsplit("_", 1)[-1]))
        return [cut_at_end(list(out.generated_tokens), tokenizer.eos_token_id) for out in in_order]
    return timed_texts(write, tokenizer)

LLAMA = """
import json, sys, time
import llama_cpp, llama_cpp.llama_cpp as functions
gguf, prompts, n, threads = json.load(sys.stdin)
default = functions.llama_model_default_params
def without_repacking():
    params = default()
    params.use_extra_bufts = False
    return params
functions.llama_model_default_params = without_repacking
llama = llama_cpp.Llama(gguf, n_ctx=1024, n_threads=threads, verbose=False)
llama.create_completion(prompts[0], max_tokens=4, temperature=0)
start = time.perf_counter()
outs = [llama.create_completion(p, max_tokens=n, temperature=0) for p in prompts]
took = time.perf_counter() - start
print(json.dumps({"seconds": took, "texts": [o["choices"][0]["text"].strip() for o in outs],
                  "tokens": sum(o["usage"]["completion_tokens"] for o in outs)}))
"""

def run_llama(args, dtype):
    from descgen.export import export
    _, _, prompts = load_peer(args)
    with redirect_stdout(sys.stderr), TemporaryDirectory() as folder:
        export(args.adapter, "gguf", Path(folder)/"gguf", dtype)
        given = json.dumps([str(Path(folder)/"gguf"/"model.gguf"), prompts, args.new_tokens, os.cpu_count()])
        done = subprocess.run([str(args.llama_python), "-c", LLAMA], input=given, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"llama.cpp ended with {done.returncode}: {done.stderr[-500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])

def run_llama16(args): return run_llama(args, "float16")

def run_llama8(args): return run_llama(args, "q8_0")

def load_describer(args, adapter):
    "An adapter, without sources"
    from descgen.describer import Describer
    return Describer(adapter, sources=0, load_in_4bit=False, dtype=args.dtype)

def batch_settings(args):
    "Greedy texts that are not checked"
    from descgen.batches import BatchSettings
    from descgen.inference import Sampling
    return BatchSettings(Sampling(args.new_tokens, greedy=True, batch_size=args.batch_size), verify=False)

def run_descgen(args):
    from descgen.batches import generate
    settings = batch_settings(args)
    with redirect_stdout(sys.stderr), TemporaryDirectory() as folder:
        describer = load_describer(args, args.adapter)
        titles = [row["title"] for row in read_jsonl(args.rows)[:args.titles]]
        describer.describe(titles[:2], settings.sampling, progress=False)
        output = Path(folder)/"out.jsonl"
        took = seconds(lambda: generate(describer, titles, output, settings))
        rows = read_jsonl(output)
    return {"seconds": took, "texts": [row["text"] for row in rows], "tokens": sum(row["tokens"] for row in rows),
            "gb": peak_memory_gb()}

def tiny_adapter(folder):
    "A new adapter of a tiny random model"
    from descgen.checkpoints import save_adapter
    from descgen.model import LoraSettings, add_lora, load_model, tiny_model
    base = tiny_model(folder/"base")
    model, tokenizer = load_model(base, dtype="float32")
    return save_adapter(add_lora(model, LoraSettings(r=2)), tokenizer, folder/"adapter", base, "float32")

def write_titles(rows, n, path):
    "A file of so many different titles"
    titles = cycle(row["title"] for row in read_jsonl(rows))
    with open(path, "w", encoding="utf-8") as file:
        for number, title in zip(range(n), titles):
            file.write(json.dumps({"uid": str(number), "title": f"{title} {number}"}) + "\n")
    return path

def run_memory(args):
    from descgen.batches import generate
    with redirect_stdout(sys.stderr), TemporaryDirectory() as folder:
        folder = Path(folder)
        describer = load_describer(args, tiny_adapter(folder))
        titles = write_titles(args.rows, args.titles, folder/"titles.jsonl")
        outcome = generate(describer, titles, folder/"out.jsonl", batch_settings(args))
    return {"rows": outcome.described, "gb": peak_memory_gb()}

def copy_rate():
    "Bytes per second read and written by a copy that exceeds the caches"
    import torch
    source = torch.ones(2**27)
    target = torch.empty_like(source)
    took = min(seconds(lambda: target.copy_(source)) for _ in range(5))
    return 2*source.nbytes/took

def weight_bytes():
    "Size of the embedded model's weights, in 16 bits"
    from descgen.model import embedded_model
    return sum(path.stat().st_size for path in Path(embedded_model()).glob("*.safetensors"))

def reading_seconds(args, tokens):
    "The weights read once for each step of a full batch, at the rate of a copy"
    return tokens/args.batch_size*weight_bytes()/copy_rate()

def product_seconds(tokens):
    "The products with all weights for each token, two operations for two bytes, at the rate of a large product"
    return tokens*weight_bytes()/matmul_rate(2048)

def measure(args, way, **options):
    "A way in a process of its own; None if it does not run on this machine"
    values = {"titles": args.titles, "new_tokens": args.new_tokens, "batch_size": args.batch_size,
              "dtype": "bfloat16", **options}
    words = [str(word) for name, value in values.items() for word in ("--" + name.replace("_", "-"), value)]
    if args.llama_python:
        words += ["--llama-python", args.llama_python]
    try:
        return run_child("generate", args.rows, "--adapter", args.adapter, "--way", way, *words)
    except SystemExit as e:
        if way not in ("continuous", *LLAMAS):
            raise
        print(f"{way} does not run here: {str(e).splitlines()[-1]}", flush=True)

def equal_share(args):
    "The share of titles with equal texts of descgen and of the seed's loop, in float32"
    found = [measure(args, way, dtype="float32", titles=args.equal_titles)["texts"] for way in ("seed", "descgen")]
    return sum(a == b for a, b in zip(*found))/len(found[0])

def memory_by_titles(args):
    "Number of titles → peak memory in GB, with texts of few tokens"
    return {str(n): measure(args, "memory", titles=n, new_tokens=SHORT)["gb"] for n in args.memory_titles}

def rate(args, way):
    "Descriptions per minute and tokens of a way, and peak memory of descgen; None if it does not run on this machine"
    found = measure(args, way)
    if found:
        return {"per_minute": 60*len(found["texts"])/found["seconds"], "tokens": found["tokens"], "gb": found.get("gb")}

def parts(args):
    "What is measured: names, and functions that do it"
    ways = [way for way in WAYS if way not in LLAMAS or args.llama_python]
    timed = {f"{way} {number}": partial(rate, args, way) for number in range(args.rounds) for way in ways}
    return {"memory": lambda: memory_by_titles(args),
            "equal": lambda: equal_share(args) if args.equal_titles else None, **timed}

def run(args):
    if args.way:
        return print_result(globals()[f"run_{args.way}"](args))
    found = measure_parts(SCRATCH/f"generate-{args.titles}.json", parts(args))
    rounds = [{way: one["per_minute"] for way in WAYS if (one := found.get(f"{way} {number}"))}
              for number in range(args.rounds)]
    tokens = found["descgen 0"]["tokens"]
    summary = {"titles": args.titles, "new_tokens": args.new_tokens, "batch_size": args.batch_size, "tokens": tokens,
               "per_minute": medians(rounds), "reading_limit": 60*args.titles/reading_seconds(args, tokens),
               "product_limit": 60*args.titles/product_seconds(tokens),
               "equal": found["equal"], "equal_titles": args.equal_titles,
               "gb": found["descgen 0"]["gb"], "growth_gb": found["memory"]}
    save_result(args.results, "generate", summary, rounds, args.rounds)

LABELS = {"seed": "one title at a time: transformers and PEFT",
          "batches": "padded batches of 16 in the order of the file",
          "continuous": "transformers' `generate_batch`",
          "llama16": "llama-cpp-python, one title at a time, 16 bits", "llama8": "the same in 8 bits",
          "descgen": "`descgen generate`"}

def tables(read):
    record = read("generate")
    if not record:
        return {}
    s = record["summary"]
    speeds = s["per_minute"] | {"reading the weights": s["reading_limit"], "the products": s["product_limit"]}
    ratios = {way: [f"{speed/speeds[other]:.1f} ×" for other in ("seed", "batches")] for way, speed in speeds.items()}
    rows = [[LABELS.get(way, f"limit: {way}"), f"{speed:,.1f}", *ratios[way]]
            for way, speed in speeds.items()]
    equal = "" if s["equal"] is None else (
        f"Of {s['equal_titles']} titles in float32, {s['equal']:.1%} of the texts equal those of the first way. ")
    sizes = ", ".join(f"{gb:.2f} GB for {int(n):,} titles" for n, gb in s["growth_gb"].items())
    memory = f"Peak memory of descgen: {s['gb']:.2f} GB; with a tiny model and texts of {SHORT} tokens {sizes}. "
    about = (f"{s['titles']} titles, greedy, at most {s['new_tokens']} tokens each, batches of {s['batch_size']} "
             f"in descgen. {equal}{memory}{circumstances(record, 'torch', 'transformers')}")
    head = ["", "descriptions per minute", "against one at a time", "against batches of 16"]
    return {"generate": [about, "", *markdown_table(head, rows)]}
