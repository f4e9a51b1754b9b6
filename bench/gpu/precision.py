"""Does bf16 swallow small adapters on this card, and what mends it? The same adapter weights, judged in float32 and in what Unsloth computes.

    python bench/gpu/precision.py unsloth llama 4 WORK     # trains a small adapter; Unsloth as it comes, and with base and adapter rounded once
    python bench/gpu/precision.py plain llama 4 WORK       # the same weights in float32, and in transformers' and PEFT's bf16; reads what the first wrote
    python bench/gpu/precision.py speed llama 4 WORK       # training steps in both ways, interleaved
"""
import argparse, json, statistics
from contextlib import nullcontext
from pathlib import Path

from measure import device, forget_peak, keep, now, peak_gb, turn
from models import model_folder, read_rows

WAYS = ("stock", "added once")
STEPS, AFTER, LR, BATCH, OTHERS = 24, (4, 24), 2e-4, 16, 64

def batches(tokenizer, path):
    "Batches to train on, over all tokens, and batches of other rows to judge by, over completion tokens; padded on the right"
    from descgen.formatting import encode_rows, pin_date, set_eos_and_pad, template_parts
    pin_date(tokenizer)
    parts, rows = template_parts(tokenizer), read_rows(path)
    pad = set_eos_and_pad(tokenizer, parts).pad_token_id
    train, _ = encode_rows(rows[OTHERS:], tokenizer, parts, 512, "all")
    others, _ = encode_rows(rows[:OTHERS], tokenizer, parts, 512, "completion")
    cut = lambda examples: [pad_batch(examples[i:i + BATCH], pad) for i in range(0, len(examples), BATCH)]
    return cut(train)[:STEPS], cut(sorted(others, key=lambda e: len(e["input_ids"])))

def pad_batch(examples, pad):
    import torch
    width = max(len(e["input_ids"]) for e in examples)
    filled = {k: [e[k] + [fill]*(width - len(e[k])) for e in examples] for k, fill in (("input_ids", pad), ("labels", -100))}
    return {k: torch.tensor(v, device=device()) for k, v in filled.items()}

def autocast(on=True):
    import torch
    return torch.autocast(device(), torch.bfloat16) if on else nullcontext()

def mean_loss(model, batches, bf16=True):
    "Nats a token over all batches, as a test loss is measured"
    import torch
    model.eval()
    total = count = 0
    with torch.no_grad(), autocast(bf16):
        for b in batches:
            n = (b["labels"][:, 1:] != -100).sum().item()
            total += model(**b, use_cache=False).loss.item()*n; count += n
    return total/count

def adapter(model): return {n: p for n, p in sorted(model.named_parameters()) if "lora_" in n}

def put(model, values):
    import torch
    with torch.no_grad():
        for n, p in adapter(model).items(): p.copy_(values[n])

def learn(model, batches, bf16=True):
    "Train by hand with plain AdamW, so that every side does the same; the adapter after some of the steps, and the losses on the way"
    import torch
    model.train()
    optimizer, kept, losses = torch.optim.AdamW(adapter(model).values(), lr=LR, weight_decay=0), {}, []
    for i, b in enumerate(batches, 1):
        with autocast(bf16): loss = model(**b, use_cache=False).loss
        loss.backward()
        optimizer.step(); optimizer.zero_grad(); losses.append(loss.item())
        if i in AFTER: kept[i] = {n: p.detach().clone() for n, p in adapter(model).items()}
    return kept, losses

def gradient(model, batch, bf16=True):
    import torch
    model.train()
    model.zero_grad()
    with autocast(bf16): loss = model(**batch, use_cache=False).loss
    loss.backward()
    found = torch.cat([p.grad.float().flatten().cpu() for p in adapter(model).values()])
    model.zero_grad()
    return found

def cosine(a, b): return (a.double() @ b.double()/(a.double().norm()*b.double().norm())).item()

def unpacked(weight):
    "A weight's values, out of 4 bits if it is in them"
    if getattr(weight, "quant_state", None) is None: return weight.data
    from unsloth.kernels.utils import fast_dequantize
    return fast_dequantize(weight.data, weight.quant_state)

def save_base(model, source, folder):
    "The base as Unsloth computes with it, in an ordinary folder"
    from safetensors.torch import save_file
    folder.mkdir(parents=True, exist_ok=True)
    weights = {n: unpacked(p).to("cpu").contiguous() for n, p in model.named_parameters() if n != "lm_head.weight"}
    save_file(weights, folder/"model.safetensors", metadata={"format": "pt"})
    (folder/"config.json").write_text((Path(source)/"config.json").read_text())

def captured(model, batch):
    "What three of the middle layer's products are given, in one evaluation"
    from unsloth.kernels import utils
    from descgen.layers import patch_functions
    stock, seen, first = utils.matmul_lora, [], 7*(model.config.num_hidden_layers//2)
    def record(X, *args, **kw):
        seen.append((X.clone(), *args[:5]) if first <= len(seen) < first + 7 else None)
        return stock(X, *args, **kw)
    patch_functions({stock: record})
    mean_loss(model, [batch])
    patch_functions({record: stock})
    return {name: seen[first + i] for name, i in (("q_proj", 0), ("gate_proj", 4), ("down_proj", 6))}

def addmm(X, W, W_quant, A, B, s):
    "The large product added onto the small one, as a processor would do it in one rounding"
    from unsloth.kernels.utils import fast_dequantize
    rows = X.reshape(-1, X.shape[-1])
    delta = ((rows @ A.to(X.dtype).t()) @ B.to(X.dtype).t())*s
    return delta.addmm_(rows, fast_dequantize(W, W_quant).t()).view(*X.shape[:-1], -1)

def left_of(added, base, exact):
    "How much of an addition is left: regression of what was added on what should have been"
    return ((added - base)*exact).sum().item()/exact.square().sum().item()

def come_through(X, W, W_quant, A, B, s):
    "How much of an adapter's addition is left, in each way"
    import torch
    from unsloth.kernels import utils
    from added_once import added_once
    base = X.double() @ utils.fast_dequantize(W, W_quant).double().t()
    exact = (X.double() @ A.double().t() @ B.double().t())*s
    def of(f): return left_of(f(X, W, W_quant, A, B, s).double(), base, exact)
    with torch.no_grad():
        found = {"stock": of(utils.matmul_lora), "addmm": of(addmm)}
        with added_once(): found["added once"] = of(utils.matmul_lora)
    return found | {"addition, in half units in the last place": (exact.abs()/(base.abs()*2**-9)).median().item()}

def long_rows(batches, start=48, new=32):
    "The first tokens of rows that are longer, as a rectangle"
    import torch
    ends = lambda b: [(labels != -100).nonzero().max().item() + 1 for labels in b["labels"]]
    return torch.stack([ids[:start + new] for b in batches for ids, end in zip(b["input_ids"], ends(b)) if end > start + new])[:16]

def forced(rows, nats):
    "What makes `generate` write these rows, and keeps the nats that each token would have cost"
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList
    class Forced(LogitsProcessor):
        def __call__(self, seen, scores):
            target = rows[:, seen.shape[1], None]
            nats.append(-scores.float().log_softmax(-1).gather(1, target).mean().item())
            return torch.full_like(scores, -1e9).scatter(1, target, 0)
    return LogitsProcessorList([Forced()])

def decode_loss(model, ids, start=48):
    "Nats a token where each token comes from the step by step path of `generate`, and milliseconds a step"
    import torch
    from unsloth import FastLanguageModel
    FastLanguageModel.for_inference(model)
    found, new, said = {}, ids.shape[1] - start, set(ids.flatten().tolist())
    never = next(i for i in range(1000, 10**6) if i not in said) # nothing ends these rows early
    for name, sets in {"one at a time": ids[:4].split(1), "sixteen": [ids]}.items():
        total, seconds = [], []
        for rows in sets:
            nats, begin = [], now()
            model.generate(input_ids=rows[:, :start], attention_mask=torch.ones_like(rows[:, :start]), max_new_tokens=new, do_sample=False,
                use_cache=True, logits_processor=forced(rows, nats), pad_token_id=0, eos_token_id=never)
            total += nats[1:] # the first comes from the prompt's pass
            seconds.append(now() - begin)
        found |= {name: statistics.mean(total), f"{name}, ms a step": min(seconds)*1000/new}
    FastLanguageModel.for_training(model)
    return found

def train_both(model, train, others):
    "An adapter trained in each way, from the same beginning"
    from added_once import added_once
    first = {n: p.detach().clone() for n, p in adapter(model).items()}
    found, adapters = {}, {"first": first}
    for way in WAYS:
        put(model, first)
        with added_once(way != "stock"): after, found[f"losses, {way}"] = learn(model, train)
        adapters |= {f"{way} {i}": a for i, a in after.items()}
    return found, adapters

def judge(model, adapters, others, batch):
    "Each adapter's loss and gradient in each way"
    from added_once import added_once
    found, grads = {}, {}
    for name in [n for n in adapters if n != "first"]:
        put(model, adapters[name])
        for way in WAYS:
            with added_once(way != "stock"):
                found[f"loss of {name}, {way}"], grads[f"{name}, {way}"] = mean_loss(model, others), gradient(model, batch)
        found[f"gradients of {name}, cosine"] = cosine(*[grads[f"{name}, {way}"] for way in WAYS])
    return found, grads

def decode_both(model, ids):
    "Step by step losses and times in each way; each three times, of which the last is kept"
    from added_once import added_once
    found = {}
    for way in WAYS*3:
        with added_once(way != "stock"): found[f"decoding, {way}"] = decode_loss(model, ids)
    return found

def unsloth_side(args):
    "Train with Unsloth in both ways; losses of each adapter in both ways, gradients, what comes through, decoding"
    import unsloth, torch
    from descgen.model import LoraSettings, add_lora, load_model
    source, work = model_folder(args.model, args.work, args.small), args.work/f"{args.model}-{args.bits}"
    model, tokenizer = load_model(str(source), 2048, args.bits == 4, "bfloat16")
    train, others = batches(tokenizer, args.rows)
    save_base(model, source, work/"base")
    model = add_lora(model, LoraSettings(lora_dropout=0, gradient_checkpointing=False))
    found = {"before": mean_loss(model, others)}
    losses, adapters = train_both(model, train, others)
    judged, grads = judge(model, adapters, others, train[0])
    torch.save({"adapters": {k: {n: p.cpu() for n, p in a.items()} for k, a in adapters.items()}, "grads": grads, "ids": long_rows(others).cpu()}, work/"unsloth.pt")
    put(model, adapters[f"stock {AFTER[0]}"])
    through = {name: come_through(*given) for name, given in captured(model, others[-1]).items()} if device() == "cuda" else {}
    return found | losses | judged | {"come through": through} | decode_both(model, long_rows(others))

def plain_model(base, dtype):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM
    from descgen.model import TARGETS
    model = LlamaForCausalLM.from_pretrained(base, dtype=dtype).to(device())
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0, target_modules=TARGETS, task_type="CAUSAL_LM"))

def plain_judge(model, written, others, batch, kind):
    "The same adapters' losses, and how far their gradients agree"
    found = {}
    for name, values in written["adapters"].items():
        put(model, values)
        found[f"loss of {name}, {kind}"] = mean_loss(model, others, kind != "float32")
        theirs = {way: g for way in WAYS if (g := written["grads"].get(f"{name}, {way}")) is not None}
        mine = gradient(model, batch, kind != "float32") if theirs else None
        found |= {f"gradient of {name}, cosine of {kind} and {way}": cosine(mine, g) for way, g in theirs.items()}
    return found

def plain_side(args):
    "The same weights in float32, and in bf16 as transformers and PEFT compute it; and an adapter trained in each; one model at a time, for float32 takes room"
    import torch
    from transformers import AutoTokenizer
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    work = args.work/f"{args.model}-{args.bits}"
    train, others = batches(AutoTokenizer.from_pretrained(model_folder(args.model, args.work, args.small)), args.rows)
    written = torch.load(work/"unsloth.pt")
    with turn(): return judged_plainly(written, train, others, work/"base")

def judged_plainly(written, train, others, base):
    "What Unsloth's adapters cost in each precision, and adapters trained in it"
    import torch
    found = {}
    for kind, dtype in (("float32", torch.float32), ("bf16 eager", torch.bfloat16)):
        model = plain_model(base, dtype)
        found |= plain_judge(model, written, others, train[0], kind)
        put(model, written["adapters"]["first"])
        after, found[f"losses, {kind}"] = learn(model, train, kind != "float32")
        for i, values in after.items(): put(model, values); found[f"loss of {kind} {i}, {kind}"] = mean_loss(model, others, kind != "float32")
        put(model, written["adapters"][f"stock {AFTER[0]}"]); found[f"decoding, {kind}"] = whole_loss(model, written["ids"].to(device()))
    return found

def whole_loss(model, ids, start=48):
    "The same tokens as `decode_loss`, in one pass"
    import torch
    model.eval()
    with torch.no_grad(): nats = -model(ids).logits[:, start:-1].log_softmax(-1).gather(2, ids[:, start + 1:, None])[..., 0]
    return {"one at a time": nats[:4].mean().item(), "sixteen": nats.mean().item()}

def steps(model, batch, rounds):
    "Seconds of a training step in each way, interleaved"
    import torch
    from added_once import added_once
    optimizer, seconds = torch.optim.AdamW(adapter(model).values(), lr=LR), {w: [] for w in WAYS}
    model.train()
    for i in range(rounds + 3):
        for way in WAYS if i % 2 else WAYS[::-1]:
            with added_once(way != "stock"):
                start = now()
                with autocast(): loss = model(**batch, use_cache=False).loss
                loss.backward(); optimizer.step(); optimizer.zero_grad()
                if i > 2: seconds[way].append(now() - start)
    return seconds

def full_row(packs, length=512, parts=2):
    "One row of random tokens in the shape of so many packs of 1024, each of so many examples"
    import torch
    ids, n = torch.randint(1000, 40000, (1, packs*parts*length), device=device()), packs*parts
    return dict(input_ids=ids, labels=ids, position_ids=torch.arange(length, device=device()).repeat(n)[None],
        **({"packed_seq_lengths": torch.full((n,), length, dtype=torch.int32)} if device() == "cuda" else {}))

def speed_side(args):
    "Tokens a second in each way, at the seed's settings and at the fastest"
    import unsloth
    from descgen.model import LoraSettings, add_lora, load_model
    found, source, batch = {}, model_folder(args.model, args.work, args.small), full_row(1 if args.small else 16)
    for name, dropout, checkpointing in (("seed", 0.05, True), ("fast", 0, False)):
        model, _ = load_model(str(source), 2048, args.bits == 4, "bfloat16")
        model = add_lora(model, LoraSettings(lora_dropout=dropout, gradient_checkpointing=checkpointing))
        with turn(): forget_peak(); seconds = steps(model, batch, args.rounds)
        if name == "fast" and device() == "cuda":
            with turn(): found["decoding"] = decode_both(model, batch["input_ids"][0, :16*80].view(16, 80))
        found[name] = {w: batch["input_ids"].numel()/statistics.median(s) for w, s in seconds.items()} | {"seconds": seconds, "gb": peak_gb()}
        del model
    return found

SIDES = {"unsloth": unsloth_side, "plain": plain_side, "speed": speed_side}
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("side", choices=SIDES); parser.add_argument("model", choices=["llama", "embedded"])
    parser.add_argument("bits", type=int, choices=[4, 16]); parser.add_argument("work", type=Path)
    parser.add_argument("--rows", type=Path, default=Path("data/sample.jsonl")); parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--small", action="store_true", help="a tiny model and little of everything, for a try without a GPU")
    args = parser.parse_args()
    if args.small: STEPS, AFTER, BATCH, OTHERS = 2, (1, 2), 2, 8
    result = SIDES[args.side](args)
    keep(f"precision-{args.side}-{args.model}-{args.bits}", result)
    print(json.dumps({k: v for k, v in result.items() if not k.startswith("losses")}))
