"""Does bf16 round small adapters away? The same weights in float32, Unsloth's way and descgen's.

    python -m bench gpu-precision unsloth llama 4 WORK    # trains small adapters by Unsloth and by descgen; judges both
    python -m bench gpu-precision plain llama 4 WORK      # the same weights in float32 and in transformers' bf16
    python -m bench gpu-precision speed llama 4 WORK      # training steps in both ways, interleaved

The second reads what the first wrote to WORK. "Unsloth" computes as Unsloth does; "descgen" with the functions of
`descgen.layers`, which round the sum of base and adapter once.
"""
import statistics
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from ..markdown import circumstances, markdown_table, number
from ..measure import save_result
from .card import (CARD, add_model_options, card_lock, device, has_gpu, peak_gb, reset_peak,
    synchronized_time)
from .models import model_folder, read_rows

WAYS = ("unsloth", "descgen")
RATE = 2e-4
FORCED_START, FORCED_NEW = 48, 32 # tokens given, and written one at a time

@dataclass(frozen=True)
class Amounts:
    "How much of everything"
    steps: int = 24 # of training
    kept_after: tuple = (4, 24) # steps after which an adapter is judged
    batch: int = 16
    judged_rows: int = 64

SMALL = Amounts(steps=2, kept_after=(1, 2), batch=2, judged_rows=8)

def add_options(parser):
    parser.add_argument("side", choices=["unsloth", "plain", "speed"])
    parser.add_argument("model", choices=["llama", "embedded"])
    parser.add_argument("bits", type=int, choices=[4, 16])
    add_model_options(parser, with_model=False)
    parser.add_argument("--rounds", type=int, default=8, help="of training steps in `speed`")

@contextmanager
def products_of(way):
    "Unsloth's own products or descgen's; without a GPU, as it is"
    from descgen.layers import patch_functions, unsloth_replacements
    stock_again = {new: old for old, new in unsloth_replacements().items()} if has_gpu() else {}
    if has_gpu():
        patch_functions(unsloth_replacements() if way == "descgen" else stock_again)
    try:
        yield
    finally:
        if has_gpu():
            patch_functions(stock_again)

# Batches

def pad_batch(examples, pad):
    "Examples as a rectangle, padded on the right"
    import torch
    width = max(len(e["input_ids"]) for e in examples)
    filled = {key: [e[key] + [fill]*(width - len(e[key])) for e in examples]
              for key, fill in (("input_ids", pad), ("labels", -100))}
    return {k: torch.tensor(v, device=device()) for k, v in filled.items()}

def make_batches(tokenizer, path, amounts):
    "Batches to train on, over all tokens, and batches of other rows to judge by, over completion tokens"
    from descgen.formatting import encode_rows, pin_date, set_eos_and_pad, template_parts
    pin_date(tokenizer)
    parts, rows, n = template_parts(tokenizer), read_rows(path), amounts.judged_rows
    pad = set_eos_and_pad(tokenizer, parts).pad_token_id
    train, _ = encode_rows(rows[n:], tokenizer, parts, 512, "all")
    judged, _ = encode_rows(rows[:n], tokenizer, parts, 512, "completion")
    def cut(examples):
        starts = range(0, len(examples), amounts.batch)
        return [pad_batch(examples[i:i + amounts.batch], pad) for i in starts]
    return cut(train)[:amounts.steps], cut(sorted(judged, key=lambda e: len(e["input_ids"])))

def rows_to_force(batches):
    "The first tokens of rows that are longer, as a rectangle"
    import torch
    n, found = FORCED_START + FORCED_NEW, []
    for batch in batches:
        ends = [(labels != -100).nonzero().max().item() + 1 for labels in batch["labels"]]
        found += [ids[:n] for ids, end in zip(batch["input_ids"], ends) if end > n]
    return torch.stack(found)[:16]

# Training and judging

def autocast(on=True):
    import torch
    return torch.autocast(device(), torch.bfloat16) if on else nullcontext()

def mean_loss(model, batches, bf16=True):
    "Nats per token over all batches, as a test loss is measured"
    import torch
    model.eval()
    total = count = 0
    with torch.no_grad(), autocast(bf16):
        for batch in batches:
            n = (batch["labels"][:, 1:] != -100).sum().item()
            total += model(**batch, use_cache=False).loss.item()*n
            count += n
    return total/count

def adapter_of(model):
    "The adapter's parameters by name"
    return {n: p for n, p in sorted(model.named_parameters()) if "lora_" in n}

def set_adapter(model, values):
    import torch
    with torch.no_grad():
        for name, p in adapter_of(model).items():
            p.copy_(values[name])

def copy_adapter(model):
    return {name: p.detach().clone() for name, p in adapter_of(model).items()}

def train_by_hand(model, batches, kept_after, bf16=True):
    "Plain AdamW, so that every side does the same; the adapter after some of the steps, and the losses"
    import torch
    model.train()
    optimizer = torch.optim.AdamW(adapter_of(model).values(), lr=RATE, weight_decay=0)
    kept, losses = {}, []
    for i, batch in enumerate(batches, 1):
        with autocast(bf16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if i in kept_after:
            kept[i] = copy_adapter(model)
    return kept, losses

def gradient(model, batch, bf16=True):
    "The adapter's gradient as one vector"
    import torch
    model.train()
    model.zero_grad()
    with autocast(bf16):
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    found = torch.cat([p.grad.float().flatten().cpu() for p in adapter_of(model).values()])
    model.zero_grad()
    return found

def cosine(a, b):
    a, b = a.double(), b.double()
    return (a @ b/(a.norm()*b.norm())).item()

def train_both(model, batches, kept_after):
    "An adapter trained in each way from the same beginning, and the losses of the steps"
    first = copy_adapter(model)
    losses, adapters = {}, {"first": first}
    for way in WAYS:
        set_adapter(model, first)
        with products_of(way):
            after, losses[way] = train_by_hand(model, batches, kept_after)
        adapters |= {f"{way} {i}": adapter for i, adapter in after.items()}
    return losses, adapters

def judge_both(model, adapters, judged, batch):
    "The loss of each adapter in each way and the cosine of the two gradients; and the gradients"
    found, gradients = {}, {}
    for name in adapters:
        if name == "first":
            continue
        set_adapter(model, adapters[name])
        found[name] = {}
        for way in WAYS:
            with products_of(way):
                found[name][way] = mean_loss(model, judged)
                gradients[f"{name}, {way}"] = gradient(model, batch)
        found[name]["gradients_cosine"] = cosine(*(gradients[f"{name}, {way}"] for way in WAYS))
    return found, gradients

# How much of an adapter's addition is left after rounding

def capture_products(model, batch):
    "The arguments of three products of the middle layer, in one evaluation"
    from unsloth.kernels import utils
    from descgen.layers import patch_functions
    stock, seen, first = utils.matmul_lora, [], 7*(model.config.num_hidden_layers//2)
    def record(X, *args, **kw):
        wanted = first <= len(seen) < first + 7
        seen.append((X.clone(), *args[:5]) if wanted else None)
        return stock(X, *args, **kw)
    patch_functions({stock: record})
    mean_loss(model, [batch])
    patch_functions({record: stock})
    return {name: seen[first + i]
            for name, i in (("q_proj", 0), ("gate_proj", 4), ("down_proj", 6))}

def addmm(X, W, W_quant, A, B, s):
    "The large product added onto the small one, as a processor would do it in one rounding"
    from unsloth.kernels.utils import fast_dequantize
    rows = X.reshape(-1, X.shape[-1])
    delta = ((rows @ A.to(X.dtype).t()) @ B.to(X.dtype).t())*s
    return delta.addmm_(rows, fast_dequantize(W, W_quant).t()).view(*X.shape[:-1], -1)

def share_left(added, base, exact):
    "How much of an addition is left: regression of what was added on what should have been"
    return ((added - base)*exact).sum().item()/exact.square().sum().item()

def shares_left(X, W, W_quant, A, B, s):
    "How much of an adapter's addition is left in each way, and its size beside the base"
    import torch
    from unsloth.kernels import utils
    base = X.double() @ utils.fast_dequantize(W, W_quant).double().t()
    exact = (X.double() @ A.double().t() @ B.double().t())*s
    def share(product):
        return share_left(product(X, W, W_quant, A, B, s).double(), base, exact)
    with torch.no_grad():
        found = {"unsloth": share(utils.matmul_lora), "addmm": share(addmm)}
        with products_of("descgen"):
            found["descgen"] = share(utils.matmul_lora)
    return (
        found | {"half_units_in_the_last_place": (exact.abs()/(base.abs()*2**-9)).median().item()})

# Writing one token at a time

def force_tokens(rows, nats):
    "Makes `generate` write these rows, and keeps the nats that each token would have cost"
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList
    class Forced(LogitsProcessor):
        def __call__(self, seen, scores):
            target = rows[:, seen.shape[1], None]
            nats.append(-scores.float().log_softmax(-1).gather(1, target).mean().item())
            return torch.full_like(scores, -1e9).scatter(1, target, 0)
    return LogitsProcessorList([Forced()])

def generate_forced(model, rows, never):
    "Nats of each token after the first, which comes from the prompt's pass, and milliseconds per token"
    import torch
    start, nats, begin = rows[:, :FORCED_START], [], synchronized_time()
    new = rows.shape[1] - FORCED_START
    model.generate(input_ids=start, attention_mask=torch.ones_like(start),
                   max_new_tokens=new, do_sample=False,
                   use_cache=True, logits_processor=force_tokens(rows, nats),
                   pad_token_id=0, eos_token_id=never)
    return nats[1:], (synchronized_time() - begin)*1000/new

def decode_loss(model, ids):
    "Loss of forced texts, alone and in a batch of sixteen, and the time of a token"
    from unsloth import FastLanguageModel
    FastLanguageModel.for_inference(model)
    used = set(ids.flatten().tolist())
    never = next(i for i in range(1000, 10**6) if i not in used) # nothing ends these rows early
    found = {}
    for name, sets in {"one at a time": ids[:4].split(1), "sixteen": [ids]}.items():
        nats, took = [], []
        for rows in sets:
            each, milliseconds = generate_forced(model, rows, never)
            nats += each
            took.append(milliseconds)
        found[name] = {"loss": statistics.mean(nats), "milliseconds": min(took)}
    FastLanguageModel.for_training(model)
    return found

def decode_both(model, ids):
    "Losses and times in each way, three times in turn, of which the last counts"
    found = {}
    for way in WAYS*3:
        with products_of(way):
            found[way] = decode_loss(model, ids)
    return found

def whole_loss(model, ids):
    "The loss of the same tokens in one pass"
    import torch
    model.eval()
    with torch.no_grad():
        logits = model(ids).logits[:, FORCED_START:-1]
    nats = -logits.log_softmax(-1).gather(2, ids[:, FORCED_START + 1:, None])[..., 0]
    return {"one at a time": {"loss": nats[:4].mean().item()},
            "sixteen": {"loss": nats.mean().item()}}

# The sides

def dequantized(weight):
    "A weight's values, out of 4 bits if it is in them"
    if getattr(weight, "quant_state", None) is None:
        return weight.data
    from unsloth.kernels.utils import fast_dequantize
    return fast_dequantize(weight.data, weight.quant_state)

def save_base(model, source, folder):
    "The base as Unsloth computes with it, in an ordinary folder"
    from safetensors.torch import save_file
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: dequantized(p).to("cpu").contiguous() for name, p in model.named_parameters()
               if name != "lm_head.weight"}
    save_file(weights, folder/"model.safetensors", metadata={"format": "pt"})
    (folder/"config.json").write_text((Path(source)/"config.json").read_text())

def side_folder(args):
    return args.work/f"{args.model}-{args.bits}"

def unsloth_side(args, amounts):
    "Adapters trained in both ways; their losses in both, gradients, what is left of additions, decoding"
    import unsloth, torch
    from descgen.model import LoraSettings, add_lora, load_model
    source, folder = model_folder(args.model, args.work, args.small), side_folder(args)
    model, tokenizer = load_model(str(source), 2048, args.bits == 4, "bfloat16")
    train, judged = make_batches(tokenizer, args.rows, amounts)
    save_base(model, source, folder/"base")
    model = add_lora(model, LoraSettings(lora_dropout=0, gradient_checkpointing=False))
    before, ids = mean_loss(model, judged), rows_to_force(judged)
    training_losses, adapters = train_both(model, train, amounts.kept_after)
    losses, gradients = judge_both(model, adapters, judged, train[0])
    on_cpu = {name: {n: p.cpu() for n, p in values.items()} for name, values in adapters.items()}
    torch.save({"adapters": on_cpu, "gradients": gradients, "ids": ids.cpu()}, folder/"unsloth.pt")
    set_adapter(model, adapters[f"unsloth {amounts.kept_after[0]}"])
    products = capture_products(model, judged[-1]) if has_gpu() else {}
    shares = {name: shares_left(*given) for name, given in products.items()}
    summary = {"before": before, "losses": losses, "shares_left": shares,
               "decoding": decode_both(model, ids)}
    return summary, {"training_losses": training_losses}

def plain_model(base, dtype):
    "transformers and PEFT"
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM
    from descgen.model import TARGETS
    model = LlamaForCausalLM.from_pretrained(base, dtype=dtype).to(device())
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0,
        target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(model, config)

def judge_plain(model, written, judged, batch, bf16):
    "The same adapters' losses, and how far their gradients agree with those of each way"
    losses, cosines = {}, {}
    for name, values in written["adapters"].items():
        set_adapter(model, values)
        losses[name] = mean_loss(model, judged, bf16)
        others = {way: written["gradients"].get(f"{name}, {way}") for way in WAYS}
        if name != "first":
            own = gradient(model, batch, bf16)
            cosines[name] = {way: cosine(own, other) for way, other in others.items()}
    return losses, cosines

def plain_in(dtype, written, train, judged, args, amounts):
    "What the adapters cost in one precision, and adapters trained in it"
    import torch
    bf16 = dtype == torch.bfloat16
    model = plain_model(side_folder(args)/"base", dtype)
    losses, cosines = judge_plain(model, written, judged, train[0], bf16)
    set_adapter(model, written["adapters"]["first"])
    after, training_losses = train_by_hand(model, train, amounts.kept_after, bf16)
    own = {}
    for i, values in after.items():
        set_adapter(model, values)
        own[str(i)] = mean_loss(model, judged, bf16)
    set_adapter(model, written["adapters"][f"unsloth {amounts.kept_after[0]}"])
    decoding = whole_loss(model, written["ids"].to(device()))
    summary = {"losses": losses, "gradients_cosine": cosines,
               "trained_here": own, "decoding": decoding}
    return summary, training_losses

def plain_side(args, amounts):
    "The same weights in float32, and in bf16 by transformers and PEFT; one model at a time, for memory"
    import torch
    from transformers import AutoTokenizer
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    tokenizer = AutoTokenizer.from_pretrained(model_folder(args.model, args.work, args.small))
    train, judged = make_batches(tokenizer, args.rows, amounts)
    written = torch.load(side_folder(args)/"unsloth.pt")
    summary, raw = {}, {}
    with card_lock():
        for kind, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
            summary[kind], raw[kind] = plain_in(dtype, written, train, judged, args, amounts)
    return summary, {"training_losses": raw}

def time_steps(model, batch, rounds):
    "Seconds of a training step in each way, interleaved; the first three do not count"
    import torch
    optimizer, took = (torch.optim.AdamW(adapter_of(model).values(), lr=RATE),
                       {way: [] for way in WAYS})
    model.train()
    for i in range(rounds + 3):
        for way in WAYS if i % 2 else WAYS[::-1]:
            with products_of(way):
                start = synchronized_time()
                with autocast():
                    loss = model(**batch, use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if i > 2:
                    took[way].append(synchronized_time() - start)
    return took

def full_pack(packs, length=512, parts=2):
    "Random tokens in the shape of so many packs of 1,024, each of so many examples"
    import torch
    n = packs*parts
    ids = torch.randint(1000, 40000, (1, n*length), device=device())
    batch = dict(input_ids=ids, labels=ids,
        position_ids=torch.arange(length, device=device()).repeat(n)[None])
    if has_gpu():
        batch["packed_seq_lengths"] = torch.full((n,), length, dtype=torch.int32)
    return batch

def speed_side(args, amounts):
    "Tokens per second in each way, with the seed's settings and with the fastest"
    import unsloth
    from descgen.model import LoraSettings, add_lora, load_model
    source, batch = (model_folder(args.model, args.work, args.small),
                     full_pack(1 if args.small else 16))
    summary, raw = {"tokens_per_second": {}, "memory_gb": {}}, {}
    for name, dropout, checkpointing in (("seed", 0.05, True), ("fast", 0, False)):
        model, _ = load_model(str(source), 2048, args.bits == 4, "bfloat16")
        model = add_lora(
            model, LoraSettings(lora_dropout=dropout, gradient_checkpointing=checkpointing))
        with card_lock():
            reset_peak()
            raw[name] = time_steps(model, batch, args.rounds)
            if name == "fast" and has_gpu():
                ids = batch["input_ids"][0, :16*80].view(16, 80)
                summary["decoding"] = decode_both(model, ids)
        tokens = batch["input_ids"].numel()
        summary["tokens_per_second"][name] = {way: tokens/statistics.median(took)
            for way, took in raw[name].items()}
        summary["memory_gb"][name] = peak_gb()
        del model
    return summary, raw

SIDES = {"unsloth": unsloth_side, "plain": plain_side, "speed": speed_side}

def run(args):
    summary, raw = SIDES[args.side](args, SMALL if args.small else Amounts())
    name = f"gpu-precision-{args.side}-{args.model}-{args.bits}{'-small' if args.small else ''}"
    save_result(args.results, name, summary, raw, args.rounds if args.side == "speed" else 1)

# Tables

BASES = [("llama", 4), ("llama", 16), ("embedded", 4), ("embedded", 16)]
LABELS = {"unsloth": "Unsloth", "descgen": "descgen"}

def four(value):
    return number(value, ".4f")

def adapter_label(name):
    "`unsloth 4` for people"
    way, steps = name.split()
    return f"{LABELS.get(way, way)}, {steps} steps"

def loss_rows(label, mine, plain):
    "The same adapters, judged in every way; before training first"
    exact, bf16 = (plain.get(kind, {"losses": {}, "trained_here": {}})
                   for kind in ("float32", "bf16"))
    get = lambda found, name: four(found["losses"].get(name))
    rows = [[label, "before", get(exact, "first"), four(mine["before"]), "", get(bf16, "first")]]
    for name, losses in mine["losses"].items():
        judged = [four(losses[way]) for way in WAYS]
        rows.append([label, adapter_label(name), get(exact, name), *judged, get(bf16, name)])
    for steps, loss in exact["trained_here"].items():
        rows.append([label, f"float32, {steps} steps", four(loss), "", "", ""])
    return rows

def decoding_rows(label, mine, plain, speed):
    "The forced text's loss token by token, and the time of a token in the speed measurement"
    rows = []
    for name in ("one at a time", "sixteen"):
        exact = plain.get("float32", {}).get("decoding", {}).get(name, {}).get("loss")
        cells = []
        for way in WAYS:
            timed = speed.get("decoding", {}).get(way, {}).get(name, {}).get("milliseconds")
            suffix = f" ({timed:.1f} ms)" if timed else ""
            cells.append(four(mine["decoding"][way][name]["loss"]) + suffix)
        rows.append([label, name, four(exact), *cells])
    return rows

def cost_rows(label, speed):
    "Training tokens per second in both ways"
    rows = []
    for name, found in speed.get("tokens_per_second", {}).items():
        more = found["descgen"]/found["unsloth"] - 1
        rows.append([label, name, *(f"{found[way]:,.0f}" for way in WAYS), f"{more:+.1%}"])
    return rows

def share_rows(label, mine):
    "What is left of an adapter's addition"
    keys = ("unsloth", "addmm", "descgen", "half_units_in_the_last_place")
    return [[label, name, *(f"{found[k]:.3f}" for k in keys)]
            for name, found in mine["shares_left"].items()]

def tables(read):
    rows, about = {"losses": [], "shares": [], "decoding": [], "costs": []}, None
    for model, bits in BASES:
        records = [read(f"gpu-precision-{side}-{model}-{bits}") for side in SIDES]
        mine, plain, speed = (record["summary"] if record else {} for record in records)
        if not mine:
            continue
        label, about = f"{model}, {bits} bits", about or circumstances(records[0], *CARD)
        rows["losses"] += loss_rows(label, mine, plain)
        rows["shares"] += share_rows(label, mine)
        rows["decoding"] += decoding_rows(label, mine, plain, speed)
        rows["costs"] += cost_rows(label, speed)
    if not about:
        return {}
    heads = {"losses": ["base", "adapter trained by", "float32",
                        "Unsloth", "descgen", "transformers + PEFT, bf16"],
             "shares": ["base", "matrix", "Unsloth",
                        "addmm that begins at 1 times the addition", "descgen",
                        "addition in half units"],
             "decoding": ["base", "rows", "float32, in one pass", "Unsloth", "descgen"],
             "costs": ["base", "settings", "Unsloth", "descgen", "difference"]}
    found = {f"gpu-precision {name}": markdown_table(head, rows[name])
             for name, head in heads.items()}
    found["gpu-precision losses"] = [about, "", *found["gpu-precision losses"]]
    return found
