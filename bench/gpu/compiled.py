"""Compiled training on a GPU: its speed beside Unsloth, where the time goes, and whether it learns the same.

    python -m bench gpu-compiled speed llama WORK       # Unsloth packed, descgen, descgen compiled, the same in 8 bits
    python -m bench gpu-compiled profile llama WORK     # the kernels of a step in the last three
    python -m bench gpu-compiled loss embedded WORK     # float32, compiled bf16, 8 bits: test loss, three seeds

`speed` runs all ways in one process, every other round in reverse order, with `recipes/best.yaml` and `h100.yaml`, and
every result is written at once. float32 of `loss` is transformers' own model. The warm-up is that of a way's first
round; `BREAK_EVEN_TOKENS` of `descgen.compiled` comes from it. Programs on the disk would shorten it, so
`TORCHINDUCTOR_CACHE_DIR` is a new folder.
"""
import os
import re
import statistics
import tempfile
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest.mock import patch

from ..markdown import circumstances, markdown_table, number
from ..measure import save_result
from .card import CARD, add_model_options, card_lock, device, has_gpu, matmul_rate
from .models import model_folder, read_rows
from .speed import (TOKENS, WARM, cells, make_packs, make_recipe, make_watch, measure, summarize, train_descgen,
    train_unsloth_packed)

SIDES = ["speed", "profile", "loss"]
BEFORE, PROFILED = 30, 3 # steps before those that are profiled, and their number
WAYS = { # name: changes of the recipe; None is Unsloth's own trainer
    "Unsloth, packing=True": None,
    "descgen": dict(compile=False),
    "descgen, compiled": dict(compile=True),
    "descgen, compiled, 8 bits": dict(compile=True, base_precision="fp8")}

def add_options(parser):
    parser.add_argument("side", choices=SIDES)
    add_model_options(parser)
    parser.add_argument("--rounds", type=int, default=3, help="of `speed`; seeds of `loss`")
    parser.add_argument("--suffix", help="of the result's name, to keep it beside that of another card: h100")
    parser.add_argument("--recompute", action="store_true", help="`speed` and `profile` with gradient_checkpointing")

@contextmanager
def as_on_gpu():
    "For a try without a GPU: the compiled path, without compiling"
    with ExitStack() as stack:
        if not has_gpu():
            import descgen.compiled # before `torch.compile` is replaced
            import descgen.train as stage
            stack.enter_context(patch.object(stage, "needed_to_compile", lambda recipe: None))
            stack.enter_context(patch.object(stage, "collate", partial(stage.collate, share=False)))
            stack.enter_context(patch("torch.compile", lambda function, **settings: function))
        yield

@contextmanager
def started_packs(recipe, rows):
    "Packs that other processes make, which have started, as in a long run after its layers have been compiled"
    from transformers import AutoTokenizer
    from descgen.formatting import pin_date
    packs = make_packs(recipe, rows, pin_date(AutoTokenizer.from_pretrained(recipe.model_id)))
    with packs.in_processes() as started:
        started.result()
        yield packs

def train_way(changes, recipe, rows, tokens, watch, packs, callbacks=()):
    "One of the ways once"
    if changes is None:
        return train_unsloth_packed(recipe, rows, tokens, watch)
    with as_on_gpu():
        return train_descgen(recipe.model_copy(update=changes), rows, tokens, watch, callbacks=callbacks, packs=packs)

# Speed

def break_even_tokens(way, usual):
    "Tokens after which a way has regained its longer warm-up; None if it is not faster"
    gain = 1/usual["tokens_per_second"] - 1/way["tokens_per_second"]
    return (way["warmup_seconds"] - usual["warmup_seconds"])/gain if gain > 0 else None

def summarize_ways(found):
    "The median of each way, its warm-up, and what it is beside Unsloth and descgen"
    summary = {way: summarize(runs) for way, runs in found.items()}
    for way, s in summary.items():
        done = [run for run in found[way] if "failed" not in run]
        if done:
            s["warmup_seconds"] = max(run["warmup_seconds"] for run in done)
            s["last_loss"] = next(reversed(done[0]["losses"]), None)
    measured = {way: s for way, s in summary.items() if s["runs"]}
    for way, s in measured.items():
        if "Unsloth, packing=True" in measured:
            s["times_unsloth"] = s["tokens_per_second"]/measured["Unsloth, packing=True"]["tokens_per_second"]
        if "descgen" in measured and way.startswith("descgen, "):
            s["break_even_tokens"] = break_even_tokens(s, measured["descgen"])
    return summary

def speed_side(args, recipe, rows, tokens, save):
    "Every way in each round"
    card, found = matmul_rate(), {}
    with started_packs(recipe, rows) as packs:
        for i in range(args.rounds):
            ways = list(WAYS.items())
            for way, changes in ways[::-1] if i % 2 else ways:
                run = measure(partial(train_way, changes), recipe, rows, tokens, card, packs=packs)
                found.setdefault(way, []).append(run)
                save(summarize_ways(found), found, i + 1)

# Profile

KINDS = { # the first pattern that a kernel's name contains tells its kind
    "attention": "flex|flash|fmha|attention", "fused operations": "triton_(poi|per|red)",
    "products": r"gemm|nvjet|cutlass|cublas|mm_|mm\b", "loss": "cross_entropy|fused_linear|softmax|_ce_",
    "optimizer": "adam|optim|multi_tensor", "copies": "memcpy|memset|copy|::cat"}

def kind_of(kernel):
    "What a kernel computes, by its name"
    return next((kind for kind, names in KINDS.items() if re.search(names, kernel, re.I)), "other")

def make_profiler(before):
    "A callback that profiles some steps when the card is as warm as in a long training"
    import torch
    from torch.profiler import ProfilerActivity
    from transformers import TrainerCallback
    activity = ProfilerActivity.CUDA if has_gpu() else ProfilerActivity.CPU
    class Profiler(TrainerCallback):
        profile = torch.profiler.profile(activities=[activity])
        def on_step_begin(self, args, state, control, **kw):
            if state.global_step == before:
                self.profile.start()
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == before + PROFILED:
                self.profile.stop()
    return Profiler()

def kernel_times(profile):
    "Milliseconds per step and calls per step of each kernel, the longest first"
    name = "self_device_time_total" if has_gpu() else "self_cpu_time_total"
    found = [{"kernel": e.key, "kind": kind_of(e.key), "calls": e.count/PROFILED,
              "milliseconds": getattr(e, name)/1000/PROFILED} for e in profile.key_averages()]
    return sorted(found, key=lambda k: -k["milliseconds"])

def waits(profile):
    "Each time that the GPU waits: milliseconds, and the kernels before and after it; the longest first"
    from torch.autograd import DeviceType
    events = [e for e in profile.events() if e.device_type == DeviceType.CUDA]
    found, last = [], None
    for e in sorted(events, key=lambda e: e.time_range.start):
        if last and e.time_range.start > last.time_range.end:
            found.append(((e.time_range.start - last.time_range.end)/1000, last.name, e.name))
        if not last or e.time_range.end > last.time_range.end:
            last = e
    return sorted(found, reverse=True)

def kind_times(kernels):
    "Milliseconds per step of each kind, the longest first"
    total = {}
    for k in kernels:
        total[k["kind"]] = total.get(k["kind"], 0) + k["milliseconds"]
    return dict(sorted(total.items(), key=lambda pair: -pair[1]))

def profile_way(changes, recipe, rows, packs, before):
    "Times by kind, the kernels of a way, and its waits"
    profiler = make_profiler(before)
    tokens = (before - WARM + PROFILED + 1)*recipe.per_device_train_batch_size*recipe.max_length
    train_way(changes, recipe, rows, tokens, make_watch(), packs, callbacks=[profiler])
    kernels, waited = kernel_times(profiler.profile), waits(profiler.profile)
    return kind_times(kernels) | {"waits": sum(w[0] for w in waited)/PROFILED}, kernels[:40], waited[:40]

def profile_side(args, recipe, rows, tokens, save):
    "The ways of descgen, one after the other"
    summary, raw = {}, {}
    with started_packs(recipe, rows) as packs:
        for way, changes in WAYS.items():
            if changes is None:
                continue
            summary[way], raw[way], waited = profile_way(changes, recipe, rows, packs, WARM if args.small else BEFORE)
            print(way, *waited, sep="\n")
            save(summary, raw, 1)

# Loss

STEPS, LENGTH, PACKS, RATE = 60, 512, 4, 1e-3

def make_batches(tokenizer, path, seed):
    "Batches to train on, of one shape, and batches of other rows to judge by, over completion tokens"
    from descgen.compiled import pad_batch
    from descgen.formatting import encode_rows, pin_date, set_eos_and_pad, template_parts
    from descgen.losses import collate
    from descgen.packing import pack_examples
    pin_date(tokenizer)
    parts, rows = template_parts(tokenizer), read_rows(path, seed)
    set_eos_and_pad(tokenizer, parts)
    def batches(rows):
        examples, _ = encode_rows(rows, tokenizer, parts, LENGTH, "completion")
        packs = pack_examples(examples, LENGTH)
        groups = [packs[i:i + PACKS] for i in range(0, len(packs), PACKS)]
        padded = [pad_batch(collate(group, share=False), LENGTH*PACKS) for group in groups]
        return [{k: v.to(device()) for k, v in batch.items()} for batch in padded]
    return batches(rows[64:]), batches(rows[:64])

def adapted_model(source, dtype, seed):
    "transformers' own model with a new adapter; the compiled layers use only its tensors"
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig
    from descgen.model import TARGETS
    from descgen.static_decoding import plain_class
    torch.manual_seed(seed)
    plain = plain_class(AutoConfig.from_pretrained(source)) # without what Unsloth replaces
    model = plain.from_pretrained(source, dtype=dtype).to(device())
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM"))

def plain_loss(model):
    "The loss that transformers' own model has, in float32: what the compiled layers are judged by"
    from torch.nn.functional import cross_entropy
    def loss(input_ids, labels, position_ids):
        example = (position_ids[0] == 0).cumsum(0)
        is_allowed = (example[:, None] == example).tril()[None, None]
        logits = model(input_ids=input_ids, position_ids=position_ids, attention_mask=is_allowed).logits[0]
        return cross_entropy(logits[:-1].float(), labels[0, 1:])
    return loss

def mean_loss(loss, batches):
    "Nats per completion token; with gradients, because a pass without them is another program to compile"
    total = count = 0
    for batch in batches:
        n = (batch["labels"] != -100).sum().item()
        total += loss(**batch).item()*n
        count += n
    return total/count

def train_loss(model, loss, batches, steps):
    "Train with plain AdamW; the adapter's weights"
    import torch
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0)
    for i in range(steps):
        loss(**batches[i % len(batches)]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [w.detach().float().clone() for w in weights]

def set_weights(model, values):
    import torch
    with torch.no_grad():
        for weight, value in zip([p for p in model.parameters() if p.requires_grad], values, strict=True):
            weight.copy_(value)

def losses_of_seed(source, tokenizer, path, seed, steps):
    "Test losses before and after training in each precision, measured in the same and in 16 bits"
    import torch
    from descgen.compiled import CompiledLoss
    train, judged = make_batches(tokenizer, path, seed)
    found, compiled = {}, has_gpu()
    exact = adapted_model(source, torch.float32, seed)
    start = [p.detach().clone() for p in exact.parameters() if p.requires_grad]
    half = adapted_model(source, torch.bfloat16, seed)
    ways = {"float32": (exact, plain_loss(exact)),
        "bf16": (half, CompiledLoss(half, compiled=compiled)),
        "8 bits": (half, CompiledLoss(half, fp8=True, compiled=compiled))}
    for way, (model, loss) in ways.items():
        set_weights(model, start)
        before = mean_loss(loss, judged)
        trained = train_loss(model, loss, train, steps)
        set_weights(half, trained)
        found[way] = {"before": before, "after": mean_loss(loss, judged),
            "on 16 bits": mean_loss(ways["bf16"][1], judged)}
    return found

def loss_summary(runs):
    "Means over seeds, and the largest difference of a seed to float32"
    summary = {}
    for way in runs[0]:
        mean = {key: statistics.mean(run[way][key] for run in runs) for key in runs[0][way]}
        for key in ("after", "on 16 bits"):
            difference = [run[way][key] - run["float32"]["after"] for run in runs]
            mean[f"largest difference, {key}"] = max(difference, key=abs)
        summary[way] = mean
    return summary

def loss_side(args, source, save):
    "Each seed; nothing is autocast, and float32 is float32"
    import torch
    from transformers import AutoTokenizer
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    tokenizer, runs = AutoTokenizer.from_pretrained(source), []
    for seed in range(42, 42 + args.rounds):
        runs.append(losses_of_seed(source, tokenizer, args.rows, seed, 3 if args.small else STEPS))
        save(loss_summary(runs), runs, len(runs))

def run(args):
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp()) # read when torch compiles
    import unsloth # before transformers
    import datasets, trl # before the lock
    source = model_folder(args.model, args.work, args.small)
    small = "-small" if args.small else ""
    side = f"{args.side}-recomputed" if args.recompute else args.side
    name = "-".join(["gpu-compiled", side, args.model + small, *filter(None, [args.suffix])])
    statistic = "mean" if args.side == "loss" else "median"
    save = lambda summary, raw, rounds: save_result(args.results, name, summary, raw, rounds, statistic)
    with card_lock():
        if args.side == "loss":
            return loss_side(args, source, save)
        rows = read_rows(args.rows)
        rows = rows[:40] if args.small else rows*(1 + 16_000//len(rows))
        more = dict(loss_on="all", gradient_checkpointing=args.recompute)
        recipe = make_recipe(source, args.small, "best", "h100", **more)
        measure_side = speed_side if args.side == "speed" else profile_side
        measure_side(args, recipe, rows, 200 if args.small else 4*TOKENS, save)

# Tables

def speed_table(record):
    "The ways beside each other"
    rows = []
    for way, s in record["summary"].items():
        even = s.get("break_even_tokens")
        pays = f"{even/1e6:,.0f} million" if even and even > 0 else ""
        rows.append([way, *cells(s), number(s.get("times_unsloth"), ".2f"),
            number(s.get("warmup_seconds"), ".0f", " s"), pays, number(s.get("last_loss"), ".4f")])
    head = ["", "useful tokens per second", "peak memory", "card's rate", "share of it", "times Unsloth", "warm-up",
        "tokens until it pays", "last logged loss"]
    return [circumstances(record, *CARD), "", *markdown_table(head, rows)]

def profile_tables(record):
    "Time by kind of kernel, and the longest kernels of each way"
    found = dict.fromkeys(kind for times in record["summary"].values() for kind in times)
    kinds = sorted(found, key=lambda kind: kind == "waits") # they come last
    rows = [[way, *(number(times.get(kind), ".1f") for kind in kinds), f"{sum(times.values()):.1f}"]
            for way, times in record["summary"].items()]
    lines = [circumstances(record, *CARD), "", "Milliseconds per step:", "", *markdown_table(["", *kinds, "sum"], rows)]
    for way, kernels in record["raw"].items():
        longest = [[f"`{k['kernel'][:90]}`", k["kind"], f"{k['calls']:.0f}", f"{k['milliseconds']:.2f}"]
                   for k in kernels[:6]]
        lines += ["", *markdown_table([way, "kind", "calls", "milliseconds per step"], longest)]
    return lines

def loss_table(record):
    "Test losses by precision"
    rows = [[way, *(f"{s[key]:.4f}" for key in ("before", "after", "on 16 bits")),
             *(f"{s[f'largest difference, {key}']:+.4f}" for key in ("after", "on 16 bits"))]
            for way, s in record["summary"].items()]
    head = ["trained in", "before", "after", "adapter on the 16-bit base", "largest difference to float32",
        "the same on the 16-bit base"]
    return [circumstances(record, *CARD), "", *markdown_table(head, rows)]

def tables(read):
    makers = {"speed": ("speed-llama", speed_table), "speed h100": ("speed-llama-h100", speed_table),
        "profile": ("profile-llama", profile_tables), "loss": ("loss-embedded", loss_table)}
    found = {}
    for marker, (name, make) in makers.items():
        if record := read(f"gpu-compiled-{name}"):
            found[f"gpu-compiled {marker}"] = make(record)
    return found
