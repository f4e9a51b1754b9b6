"""Writing descriptions on a GPU by batch size: descgen beside transformers' `generate` with PEFT.

    python -m bench gpu-write descgen llama WORK
    python -m bench gpu-write plain llama WORK
    python -m bench gpu-write descgen llama WORK --sources 2

The base is in 4 bits and has an adapter.
"""
from ..markdown import circumstances, markdown_table
from ..measure import NOTEBOOK, save_result
from .card import (CARD, add_model_options, card_lock, has_gpu, peak_gb, reset_peak,
    synchronized_time)
from .models import model_folder, read_rows, with_sources

SIZES, NEW_TOKENS = (1, 8, 32, 128), 128 # batch sizes; tokens of a description

def add_options(parser):
    parser.add_argument("side", choices=["descgen", "plain"])
    add_model_options(parser)
    parser.add_argument("--rounds", type=int, default=2, help="the fastest counts")
    parser.add_argument("--sources", type=int, default=0, help="in each prompt of descgen")

def time_batches(write, rows, args):
    "Seconds of each round and peak memory for each batch size"
    write(rows[:2], 8) # warms up
    found = {}
    for size in (1, 2) if args.small else SIZES:
        batch = (rows*(1 + size//len(rows)))[:size]
        found[str(size)] = {"seconds": [], "memory_gb": 0.}
        for _ in range(args.rounds):
            reset_peak()
            start = synchronized_time()
            write(batch, size)
            found[str(size)]["seconds"].append(synchronized_time() - start)
            found[str(size)]["memory_gb"] = max(peak_gb(), found[str(size)]["memory_gb"])
    return found

def never_end(model, tokenizer):
    "No text ends early, so that every description has the same length"
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(1000)
    model.generation_config.eos_token_id = 1000
    model.generation_config.suppress_tokens = [1000]

def descgen_writer(source, args):
    "descgen, as the notebook describes"
    import unsloth # before transformers
    from descgen.formatting import template_parts
    from descgen.inference import Sampling, describe
    from descgen.model import LoraSettings, add_lora, load_model
    model, tokenizer = load_model(str(source), 2048, not args.small, "bfloat16")
    model, parts = add_lora(model, LoraSettings(lora_dropout=0)), template_parts(tokenizer)
    never_end(model, tokenizer)
    def write(rows, size):
        titles, sources = [row["title"] for row in rows], [row.get("sources", []) for row in rows]
        describe(model, tokenizer, titles, parts,
            Sampling(args.new_tokens, batch_size=size), sources, progress=False)
    return write

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

def plain_writer(source, args):
    "transformers and PEFT, padded on the left, with the same sampling"
    import torch
    from transformers import AutoTokenizer
    from descgen.formatting import chat_messages
    model, tokenizer = (load_plain(source, not args.small),
                        AutoTokenizer.from_pretrained(source, padding_side="left"))
    never_end(model, tokenizer)
    def write(rows, size):
        texts = [tokenizer.apply_chat_template(chat_messages(row["title"]),
            tokenize=False, add_generation_prompt=True)
                 for row in rows]
        batch = tokenizer(texts, return_tensors="pt", padding=True,
            add_special_tokens=False).to(model.device)
        with torch.no_grad():
            model.generate(**batch, do_sample=True, temperature=0.7,
                           top_p=0.9, max_new_tokens=args.new_tokens,
                           pad_token_id=tokenizer.pad_token_id)
    return write

WRITERS = {"descgen": descgen_writer, "plain": plain_writer}

def summarize(found, new_tokens):
    "Descriptions per minute and tokens per second, by batch size"
    summary = {}
    for size, f in found.items():
        rate = int(size)/min(f["seconds"])
        summary[size] = {"per_minute": 60*rate, "tokens_per_second": new_tokens*rate,
                         "memory_gb": f["memory_gb"]}
    return summary

def run(args):
    args.new_tokens = 4 if args.small else NEW_TOKENS
    write = WRITERS[args.side](model_folder(args.model, args.work, args.small), args)
    rows = read_rows(args.rows)
    if args.sources:
        from descgen.recipe import read_defaults
        rows = with_sources(rows, args.sources, read_defaults(NOTEBOOK)["source_chars"])
    with card_lock():
        found = time_batches(write, rows, args)
    side = args.side + ("-sources" if args.sources else "")
    name = f"gpu-write-{side}-{args.model}{'-small' if args.small else ''}"
    save_result(args.results, name, summarize(found, args.new_tokens),
        found, args.rounds, "fastest")

LABELS = {"descgen": "descgen", "descgen-sources": "descgen, two sources in each prompt",
          "plain": "transformers + PEFT"}

def tables(read):
    records = {side: record for side in LABELS if (record := read(f"gpu-write-{side}-llama"))}
    if not records:
        return {}
    first = next(iter(records.values()))
    rows = []
    for size in first["summary"]:
        found = [record["summary"][size]["per_minute"] for record in records.values()]
        rows.append([size, *(f"{n:,.0f}" for n in found)])
    table = markdown_table(["batch", *(LABELS[side] for side in records)], rows)
    return {"gpu-write": [circumstances(first, *CARD), "", *table]}
