"""Descriptions a minute by batch size: descgen's `describe`, and transformers' own `generate` with an adapter of the same shape, base in 4 bits.

    python bench/gpu/generate.py unsloth llama WORK
    python bench/gpu/generate.py plain llama WORK
"""
import argparse, json
from pathlib import Path

from measure import device, forget_peak, has_gpu, keep, now, peak_gb, turn
from models import model_folder, read_rows

SIZES, NEW, ROUNDS = (1, 8, 32, 128), 128, 2 # batch sizes, tokens of a description, of which the faster counts
EACH = 1 # batches in a measurement

def timed(write, titles, sizes, new):
    "Descriptions a minute and peak memory for each batch size; `write` describes a batch"
    found = {}
    write(titles[:2], 8) # warms up
    for size in sizes:
        seconds = []
        for _ in range(ROUNDS):
            forget_peak(); start = now()
            write((titles*(1 + size//len(titles)))[:size*EACH], size)
            seconds.append(now() - start)
        found[size] = {"a minute": 60*size*EACH/min(seconds), "tokens a second": new*size*EACH/min(seconds), "gb": peak_gb()}
    return found

def without_end(model, tokenizer):
    "No text ends early: every description has the full length, so that all do the same work"
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(1000)
    model.generation_config.eos_token_id = 1000
    model.generation_config.suppress_tokens = [1000]

def unsloth_side(args):
    "descgen, as the notebook describes"
    import unsloth
    from descgen.inference import Sampling, describe
    from descgen.formatting import template_parts
    from descgen.model import LoraSettings, add_lora, load_model
    model, tokenizer = load_model(str(model_folder(args.model, args.work, args.small)), 2048, not args.small, "bfloat16")
    model, parts = add_lora(model, LoraSettings(lora_dropout=0)), template_parts(tokenizer)
    without_end(model, tokenizer)
    def write(titles, size): describe(model, tokenizer, titles, parts, Sampling(args.new, batch_size=size), progress=False)
    with turn(): return timed(write, [r["title"] for r in read_rows(args.rows)], args.sizes, args.new)

def plain_side(args):
    "transformers and PEFT, padded on the left, with the same sampling"
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from descgen.formatting import chat_messages
    from descgen.model import TARGETS
    source = model_folder(args.model, args.work, args.small)
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, device_map={"": 0} if has_gpu() else None, quantization_config=None if args.small else four)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")).eval()
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    without_end(model, tokenizer)
    def write(titles, size):
        texts = [tokenizer.apply_chat_template(chat_messages(t), tokenize=False, add_generation_prompt=True) for t in titles]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        with torch.no_grad(): model.generate(**batch, do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=args.new, pad_token_id=tokenizer.pad_token_id)
    with turn(): return timed(write, [r["title"] for r in read_rows(args.rows)], args.sizes, args.new)

SIDES = {"unsloth": unsloth_side, "plain": plain_side}
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("side", choices=SIDES); parser.add_argument("model", choices=["llama", "embedded"]); parser.add_argument("work", type=Path)
    parser.add_argument("--rows", type=Path, default=Path("data/sample.jsonl")); parser.add_argument("--small", action="store_true", help="a tiny model, for a try without a GPU")
    args = parser.parse_args()
    args.sizes, args.new = ((1, 2), 4) if args.small else (SIZES, NEW)
    print(json.dumps(keep(f"generate-{args.side}-{args.model}", SIDES[args.side](args))))
