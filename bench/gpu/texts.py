"""Greedy texts of an adapter, written in several ways and precisions: how many of them are equal.

    python -m bench gpu-texts ADAPTER                      # all ways; vLLM's only where it is installed
    python -m bench gpu-texts ADAPTER --ways vllm-float32

All are compared with transformers' `generate` on the merged model in float32, one title at a time. The merged model
is exported in float32, so that all ways have the same weights, also if they round them. Each way is a
process of its own. In 16 bits two tokens that are nearly as likely change places, so a text can differ from there on;
in float32 the texts should be equal, unless two tokens are so near that the order of additions decides. So the table
has the largest gap where texts first differ: the difference of the two largest logits in the first way.
"""
import importlib.util
import statistics
from pathlib import Path

from ..markdown import circumstances, markdown_table, number
from ..measure import print_result, run_child, save_result
from .card import CARD, SAMPLE, device, has_gpu
from .models import read_rows

FIRST = "transformers-float32"
WAYS = (FIRST, "transformers-bfloat16", "descgen-float32", "descgen-bfloat16", "vllm-float32", "vllm-bfloat16")

def add_options(parser):
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--titles", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rows", type=Path, default=SAMPLE)
    parser.add_argument("--worker", choices=WAYS, help="only write the texts of this way")

def make_prompts(tokenizer, args):
    "The prompts of some titles, without sources"
    from descgen.formatting import prompt_ids, template_parts
    parts = template_parts(tokenizer)
    return [prompt_ids(row["title"], tokenizer, parts) for row in read_rows(args.rows)[:args.titles]]

def load_tokenizer(folder):
    "The tokenizer, with its end token set as in training"
    from transformers import AutoTokenizer
    from descgen.formatting import set_eos_and_pad, template_parts
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return set_eos_and_pad(tokenizer, template_parts(tokenizer))

def merged_folder(adapter):
    "The merged model in float32"
    from descgen.export import export
    folder = adapter.parent/"merged-float32"
    if not folder.exists():
        export(adapter, "merged", folder, "float32")
    return folder

def write_transformers(args, dtype):
    "`generate` on the merged model, one title at a time"
    import torch
    from transformers import AutoModelForCausalLM
    folder = merged_folder(args.adapter)
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device()).eval()
    texts, gaps = [], []
    for prompt in make_prompts(tokenizer, args):
        ids = torch.tensor([prompt], device=device())
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, repetition_penalty=1.0,
            max_new_tokens=args.new_tokens, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            return_dict_in_generate=True, output_logits=True)
        texts.append(out.sequences[0, len(prompt):].tolist())
        likeliest = torch.cat(out.logits).topk(2).values.float()
        gaps.append((likeliest[:, 0] - likeliest[:, 1]).tolist())
    return texts, gaps

def write_descgen(args, dtype):
    "descgen with base and adapter"
    from descgen.describer import Describer
    from descgen.inference import Sampling, complete
    if not has_gpu(): # try what a GPU does
        from descgen import decoding, static_decoding
        decoding.decode = static_decoding.decode_static
    own = Describer(args.adapter, 0, load_in_4bit=False, dtype=dtype)
    sampling = Sampling(args.new_tokens, greedy=True, batch_size=args.titles)
    return complete(own.model, own.tokenizer, make_prompts(own.tokenizer, args), sampling, progress=False), None

def write_vllm(args, dtype):
    "vLLM on the merged model"
    from descgen.inference import Sampling
    from descgen.vllm import VllmModel
    folder = merged_folder(args.adapter)
    tokenizer = load_tokenizer(folder)
    model = VllmModel(folder, dtype=dtype, gpu_memory_utilization=0.3)
    sampling = Sampling(args.new_tokens, greedy=True)
    return model.complete(tokenizer, make_prompts(tokenizer, args), sampling, None, False), None

WRITERS = {"transformers": write_transformers, "descgen": write_descgen, "vllm": write_vllm}

def first_difference(a, b):
    "The number of equal tokens at the beginning"
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))

def compare(texts, expected, gaps):
    "How many texts are equal, after how many tokens the others differ, and the largest gap there"
    different = {i: first_difference(a, b) for i, (a, b) in enumerate(zip(texts, expected, strict=True)) if a != b}
    found = [gaps[i][at] for i, at in different.items()]
    return {"texts": len(texts), "equal": len(texts) - len(different),
        "median_first_difference": statistics.median(different.values()) if different else None,
        "largest_gap": max(found, default=None)}

def is_possible(way): return not way.startswith("vllm") or importlib.util.find_spec("vllm") is not None

def run(args):
    if args.worker:
        import unsloth # before transformers
        name, dtype = args.worker.split("-")
        texts, gaps = WRITERS[name](args, dtype)
        return print_result({"texts": [list(map(int, ids)) for ids in texts], "gaps": gaps})
    found, summary, gaps = {}, {}, None
    for way in dict.fromkeys([FIRST, *filter(is_possible, args.ways)]):
        words = [args.adapter.resolve(), "--worker", way, "--titles", args.titles, "--new-tokens", args.new_tokens]
        try:
            result = run_child("gpu-texts", *words, "--rows", args.rows.resolve(), HF_HUB_OFFLINE="1")
        except SystemExit as e:
            print(f"{way} failed: {str(e)[-2000:]}", flush=True)
            continue
        found[way], gaps = result["texts"], gaps or result["gaps"]
        summary[way] = compare(found[way], found[FIRST], gaps)
        save_result(args.results, "gpu-texts", summary, found)

# Tables

def tables(read):
    record = read("gpu-texts")
    if not record:
        return {}
    rows = []
    for way, s in record["summary"].items():
        first, gap = s["median_first_difference"], s.get("largest_gap")
        rows.append([way.replace("-", ", "), f"{s['equal']} of {s['texts']}", number(first, ".0f"), number(gap, ".4f")])
    head = ["", "equal to transformers in float32", "others differ after so many tokens (median)",
        "largest gap of the two largest logits there"]
    return {"gpu-texts": [circumstances(record, *CARD), "", *markdown_table(head, rows)]}
