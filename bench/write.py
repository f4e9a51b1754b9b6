"""Writing on a CPU: descgen's `complete` beside transformers' `generate` with PEFT, and the two parts that make the difference.

    python bench/write.py ROWS.jsonl

The embedded model in 16 bits with an untrained adapter, the same titles and batch for both, each text of full length; interleaved, medians of three rounds.
"""
import json, statistics, sys, time

import unsloth # before transformers and peft
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from descgen.formatting import prompt_ids, template_parts
from descgen.inference import _left_pad, _sampling_processor, _uniform_noise, complete, Sampling, TOP_K
from descgen.attention import decode_attention
from descgen.model import add_lora, EMBEDDED, embedded_model, load_model, LoraSettings, TARGETS

ROWS, NEW, ROUNDS = 32, 64, 3 # titles, tokens of each, rounds

def seconds(act):
    "How long something takes"
    start = time.perf_counter(); act()
    return time.perf_counter() - start

def interleaved(ways):
    "Median seconds of each way, after one round to warm up"
    for act in ways.values(): act()
    took = [{name: seconds(act) for name, act in ways.items()} for _ in range(ROUNDS)]
    return {name: statistics.median(t[name] for t in took) for name in ways}

def parts():
    "Attention of one new token a row among 150, for thirty layers; and drawing a token of 49,152"
    q, k, v = (torch.randn(ROWS, heads, n, 64).bfloat16() for heads, n in ((9, 1), (3, 150), (3, 150)))
    mask, scores, dice = torch.arange(150).expand(ROWS, 1, 1, 150) > 20, torch.randn(ROWS, 49152), _uniform_noise(ROWS, 1, 0)
    filters, ids = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(TOP_K), TopPLogitsWarper(0.9)]), torch.zeros(ROWS, 1).long()
    draw = _sampling_processor(dice, 1, 0.7, 0.9)
    return interleaved({"attention, PyTorch": lambda: [F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True) for _ in range(30)],
        "attention, descgen": lambda: [decode_attention(q, k, v, mask, 1/8) for _ in range(30)],
        "drawing, transformers": lambda: torch.multinomial(filters(ids, scores.clone()).softmax(-1), 1), "drawing, descgen": lambda: draw(ids, scores.clone()).argmax(-1)})

def plain():
    "transformers and PEFT alone"
    folder = embedded_model()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")).eval()

def texts(path):
    "The same titles written by both"
    model, tokenizer = load_model(EMBEDDED)
    mine, theirs, template = add_lora(model, LoraSettings(lora_dropout=0)), plain(), template_parts(tokenizer)
    for m in (mine, theirs): m.generation_config.suppress_tokens = [tokenizer.eos_token_id]
    with open(path, encoding="utf-8") as f: prompts = [prompt_ids(json.loads(line)["title"], tokenizer, template) for line, _ in zip(f, range(ROWS))]
    batch = _left_pad(prompts, tokenizer, "cpu")
    def usual():
        with torch.no_grad(): theirs.generate(**batch, do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=NEW, pad_token_id=tokenizer.pad_token_id)
    return interleaved({"texts, transformers and PEFT": usual, "texts, descgen": lambda: complete(mine, tokenizer, prompts, Sampling(NEW, batch_size=ROWS), progress=False)})

if __name__ == "__main__":
    with torch.no_grad(): found = parts()
    found |= texts(sys.argv[1])
    print(f"{ROWS} titles, {NEW} tokens each; seconds, medians of {ROUNDS}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, took in found.items(): print(f"{name:32s} {took:8.4f}")
