"""Writing descriptions on a CPU: descgen beside transformers' `generate` with PEFT.

    python -m bench write ROWS.jsonl

The embedded model in 16 bits with an untrained adapter. Both write the same titles in the same batch, each text
at full length, in turn. Then the two parts that differ: attention of one token, and sampling.
"""
from pathlib import Path

from .markdown import circumstances, markdown_table
from .measure import interleaved, medians, read_jsonl, save_result, seconds

PROMPT = 150 # tokens that a new token attends to
VOCABULARY = 49_152

def add_options(parser):
    parser.add_argument("rows", type=Path)
    parser.add_argument("--titles", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of each text")
    parser.add_argument("--rounds", type=int, default=3)

def attention_ways(n):
    "Attention of one new token of each text, for thirty layers"
    import torch
    import torch.nn.functional as F
    from descgen.attention import decode_attention
    shapes = ((9, 1), (3, PROMPT), (3, PROMPT)) # heads and tokens of query, key and value
    q, k, v = (torch.randn(n, heads, tokens, 64).bfloat16() for heads, tokens in shapes)
    mask = torch.arange(PROMPT).expand(n, 1, 1, PROMPT) > 20
    def pytorch():
        for _ in range(30):
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    def descgen():
        for _ in range(30):
            decode_attention(q, k, v, mask, 1/8)
    return {"peer": pytorch, "descgen": descgen}

def sampling_ways(n):
    "Sampling one token of each text"
    import torch
    from transformers import (LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper,
        TopPLogitsWarper)
    from descgen.inference import TOP_K, _sampling_processor, _uniform_noise
    scores, ids = torch.randn(n, VOCABULARY), torch.zeros(n, 1).long()
    filters = LogitsProcessorList(
        [TemperatureLogitsWarper(0.7), TopKLogitsWarper(TOP_K), TopPLogitsWarper(0.9)])
    sample = _sampling_processor(_uniform_noise(n, 1, 0), 1, 0.7, 0.9)
    return {"peer": lambda: torch.multinomial(filters(ids, scores.clone()).softmax(-1), 1),
            "descgen": lambda: sample(ids, scores.clone()).argmax(-1)}

def load_peer():
    "The embedded model with transformers and PEFT alone"
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from descgen.model import TARGETS, embedded_model
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.bfloat16)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()

def text_ways(args):
    "The same titles written by both"
    import torch
    from descgen.formatting import prompt_ids, template_parts
    from descgen.inference import Sampling, _left_pad, complete
    from descgen.model import EMBEDDED, LoraSettings, add_lora, load_model
    model, tokenizer = load_model(EMBEDDED)
    model, peer = add_lora(model, LoraSettings(lora_dropout=0)), load_peer()
    for each in (model, peer):
        each.generation_config.suppress_tokens = [tokenizer.eos_token_id]
    titles = [row["title"] for row in read_jsonl(args.rows)[:args.titles]]
    parts = template_parts(tokenizer)
    prompts = [prompt_ids(title, tokenizer, parts) for title in titles]
    batch = _left_pad(prompts, tokenizer, "cpu")
    def generate():
        with torch.no_grad():
            peer.generate(**batch, do_sample=True, temperature=0.7,
                          top_p=0.9, max_new_tokens=args.new_tokens,
                          pad_token_id=tokenizer.pad_token_id)
    sampling = Sampling(args.new_tokens, batch_size=args.titles)
    def describe():
        complete(model, tokenizer, prompts, sampling, progress=False)
    return {"peer": generate, "descgen": describe}

def time_ways(ways, rounds):
    "Seconds of each way in each round, after one round to warm up"
    for act in ways.values():
        act()
    return interleaved({name: (lambda act=act: seconds(act)) for name, act in ways.items()}, rounds)

def run(args):
    import unsloth # before transformers and peft
    import torch
    with torch.no_grad():
        found = {"attention": time_ways(attention_ways(args.titles), args.rounds),
                 "sampling": time_ways(sampling_ways(args.titles), args.rounds)}
    found["texts"] = time_ways(text_ways(args), args.rounds)
    summary = {"titles": args.titles, "new_tokens": args.new_tokens,
               "threads": torch.get_num_threads(),
               "seconds": {name: medians(rounds) for name, rounds in found.items()}}
    save_result(args.results, "write", summary, found, args.rounds)

def short(took):
    "Seconds with two digits, or with tenths"
    return f"{took:.1f}" if took >= 1 else f"{took:#.2g}"

def tables(read):
    record = read("write")
    if not record:
        return {}
    s = record["summary"]
    labels = {"texts": "the texts",
              "attention": "attention of one token of each text, thirty layers",
              "sampling": "sampling one token of each text"}
    rows = []
    for key, label in labels.items():
        took = s["seconds"][key]
        rows.append([label, short(took["peer"]), short(took["descgen"])])
    about = (f"{s['titles']} titles, {s['new_tokens']} tokens each, "
             f"in seconds. {circumstances(record, 'torch')}")
    return {"write": [about, "", *markdown_table(["", "transformers and PEFT", "descgen"], rows)]}
