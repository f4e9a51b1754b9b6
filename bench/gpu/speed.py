"""Training on a GPU: descgen, Unsloth and TRL with PEFT; tokens, memory, share of the card's rate.

    python -m bench gpu-speed unsloth llama WORK     # descgen, Unsloth padded, Unsloth with packing=True
    python -m bench gpu-speed plain llama WORK       # TRL + PEFT
    python -m bench gpu-speed settings llama WORK    # descgen: what each setting does, and the recipes per card

The first two may be started together: they wait for each other. Each way gets about the same number of useful
tokens, and the first two steps do not count. The packed ways, which are close, have more rounds (--rounds), every
other one in reverse order. Every result is written at once.
"""
import math
import statistics
import tempfile
from contextlib import contextmanager

from ..markdown import circumstances, markdown_table, notes, number
from ..measure import NOTEBOOK, ROOT, read_result, save_result
from .card import (CARD, SAMPLE, add_model_options, card_lock, flop_per_token, has_gpu, matmul_rate,
    peak_gb, reset_peak, synchronized_time)
from .models import model_folder, read_rows, with_sources

WARM, TOKENS = 2, 400_000 # steps that do not count; useful tokens that do, about
# GB for PyTorch on a card, beside the driver's half a GB
CARDS = {"t4": 14, "a100": 39, "h100": None}
LEAN = dict(lora_dropout=0, gradient_checkpointing=False)
LEAN_16 = LEAN | dict(load_in_4bit=False)
SETTINGS = {
    "seed": {},
    "no dropout": dict(lora_dropout=0),
    "no recomputing": dict(gradient_checkpointing=False),
    "neither": LEAN,
    "neither, 16 bits": LEAN_16,
    "neither, 16 bits, one example per pack": LEAN_16
    | dict(packing=False, per_device_train_batch_size=96),
    "neither, 16 bits, 4 packs": LEAN_16 | dict(per_device_train_batch_size=4),
    "neither, 16 bits, 8 packs": LEAN_16 | dict(per_device_train_batch_size=8),
    "neither, 16 bits, 24 packs": LEAN_16 | dict(per_device_train_batch_size=24),
    "neither, 16 bits, two sources": LEAN_16 | dict(sources=2),
    "neither, 4 packs": LEAN | dict(per_device_train_batch_size=4),
    "neither, 4 packs, fp16": LEAN | dict(per_device_train_batch_size=4, bf16=False, fp16=True)}
# of the ways side by side
RECIPES = {"the seed's settings": (), "recipes/h100.yaml": ("best", "h100")}

def add_options(parser):
    parser.add_argument("side", choices=["unsloth", "plain", "settings"])
    add_model_options(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--match", nargs="*",
        help="only these settings; the result keeps the others")
    parser.add_argument("--ways", nargs="+", choices=WAYS["unsloth"], help="only these of `unsloth`")

def make_recipe(source, small, *names, **more):
    "The notebook's defaults with recipes of the folder `recipes`, for this model"
    import yaml
    from descgen.recipe import check_recipe, read_defaults, resolve
    values = read_defaults(NOTEBOOK)
    for name in names:
        values |= yaml.safe_load((ROOT/"recipes"/f"{name}.yaml").read_text(encoding="utf-8"))
    values |= more
    values |= dict(model_id=str(source), data_path=str(SAMPLE),
        output_dir=tempfile.mkdtemp(), save_steps=10**6)
    if small:
        values |= dict(load_in_4bit=False, per_device_train_batch_size=2, fp16=False, bf16="auto")
    return resolve(check_recipe(values))

def conversations(rows):
    "The examples that descgen trains, in the form of TRL's documentation"
    from descgen.formatting import chat_messages
    return [{"messages": chat_messages(r["title"], r["content"])} for r in rows]

def make_watch():
    "A callback that notes the time after the warm-up and at the end, counts the model's tokens, and keeps the losses"
    from transformers import TrainerCallback
    class Watch(TrainerCallback):
        begin, steps, times, tokens, losses, given = 0., 0, [], [], [], 0
        def on_train_begin(self, args, state, control, **kw):
            self.begin, self.times, self.tokens, self.losses, self.given = synchronized_time(), [], [], [], 0
            self.steps = state.max_steps - WARM
        def on_log(self, args, state, control, logs=None, **kw):
            if "loss" in (logs or {}):
                self.losses.append(float(logs["loss"]))
        def on_step_end(self, args, state, control, **kw):
            "Only these steps wait for the GPU"
            if state.global_step in (WARM, state.max_steps):
                self.times.append(synchronized_time())
                self.tokens.append(int(self.given))
        def count(self, module, args, kw):
            mask, ids = kw.get("attention_mask"), kw["input_ids"]
            is_mask = mask is not None and mask.dim() == 2
            self.given = self.given + (mask.sum() if is_mask else ids.numel())
    return Watch()

def rate(watch, model, card, kept_gb):
    "Speed of a training after its first steps, and its memory beside what earlier ways keep"
    warm, end = watch.times
    took, tokens = end - warm, watch.tokens[1] - watch.tokens[0]
    share = tokens/took*flop_per_token(model.config)/card
    return {"tokens_per_second": tokens/took, "useful_tokens": tokens,
            "seconds": took, "memory_gb": peak_gb() - kept_gb, "losses": watch.losses,
            "warmup_seconds": warm - watch.begin - WARM*took/watch.steps,
            "card_tflops": card/1e12, "share_of_card": share}

def steps_for(recipe, each, tokens):
    "Steps with so many useful tokens, if a pack or an example holds so many"
    from descgen.plan import effective_batch
    return WARM + max(2, math.ceil(tokens/each/effective_batch(recipe)))

def sft_config(recipe, steps, **more):
    "The recipe in TRL's words"
    from trl import SFTConfig
    same = ("per_device_train_batch_size", "gradient_accumulation_steps",
            "warmup_steps", "learning_rate",
            "lr_scheduler_type", "seed", "logging_steps", "optim", "max_length", "output_dir")
    given = {k: getattr(recipe, k) for k in same}
    return SFTConfig(**given, max_steps=steps, save_strategy="no", bf16=has_gpu(), report_to="none",
                     disable_tqdm=True, **more)

def run_sft(model, tokenizer, config, texts, watch):
    "TRL's trainer as the documentation calls it"
    from datasets import Dataset
    from trl import SFTTrainer
    SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(texts),
               processing_class=tokenizer,
               callbacks=[watch]).train()

def mean_length(tokenizer, rows):
    "Mean tokens of the first examples"
    texts = [tokenizer.apply_chat_template(c["messages"], tokenize=False)
             for c in conversations(rows[:64])]
    return statistics.mean(len(tokenizer(text).input_ids) for text in texts)

@contextmanager
def compiled(on):
    "The trainer's own option to compile the model"
    from descgen import train as stage
    plain = stage.training_arguments
    def with_compile(*args):
        arguments = plain(*args)
        arguments.torch_compile, arguments.torch_compile_backend = True, "inductor"
        return arguments
    if on:
        stage.training_arguments = with_compile
    try:
        yield
    finally:
        stage.training_arguments = plain

# The ways: each trains for about so many tokens and returns the model

def make_packs(recipe, rows, tokenizer):
    "The packs that descgen trains on"
    from datasets import Dataset
    from descgen.formatting import template_parts
    from descgen.packing import Packs
    if recipe.sources:
        rows = with_sources(rows, recipe.sources, recipe.source_chars)
    return Packs(Dataset.from_list(rows), tokenizer, template_parts(tokenizer), recipe.max_length, recipe.loss_on,
                 packing=recipe.packing)

def train_descgen(recipe, rows, tokens, watch, compile=False, callbacks=(), packs=None):
    "descgen, as the notebook trains; `packs` instead of `rows` if other processes make them already"
    from descgen.layers import patch_functions, unsloth_replacements
    from descgen.model import add_lora, load_model
    from descgen.recipe import compute_dtype
    from descgen.train import train
    model, tokenizer = load_model(
        recipe.model_id, recipe.max_seq_length, recipe.load_in_4bit, compute_dtype(recipe))
    packs = packs or make_packs(recipe, rows, tokenizer)
    each = statistics.mean(len(packs[i]["input_ids"]) for i in range(32))
    model = add_lora(model, recipe)
    model.register_forward_pre_hook(watch.count, with_kwargs=True)
    recipe = recipe.model_copy(update={"max_steps": steps_for(recipe, each, tokens)})
    try:
        with compiled(compile):
            train(model, tokenizer, packs, recipe, callbacks=[watch, *callbacks])
    finally:
        if has_gpu(): # the next way may be Unsloth's own
            patch_functions({new: old for old, new in unsloth_replacements().items()})
    return model

def train_unsloth(recipe, rows, tokens, watch, packing):
    "Unsloth as its notebooks call it, with the chat template's text"
    import torch
    from unsloth import FastLanguageModel
    model, tokenizer = FastLanguageModel.from_pretrained(
        recipe.model_id, max_seq_length=recipe.max_length, # the length of its packs
        load_in_4bit=recipe.load_in_4bit, dtype=torch.bfloat16)
    model = FastLanguageModel.get_peft_model(
        model, r=recipe.r, lora_alpha=recipe.lora_alpha, target_modules=recipe.target_modules,
        lora_dropout=recipe.lora_dropout, bias="none", random_state=recipe.seed,
        use_gradient_checkpointing="unsloth" if recipe.gradient_checkpointing else False)
    model.register_forward_pre_hook(watch.count, with_kwargs=True)
    each = 1000 if packing else mean_length(tokenizer, rows)
    config = sft_config(recipe, steps_for(recipe, each, tokens),
        packing=packing, dataset_text_field="text")
    texts = [{"text": tokenizer.apply_chat_template(c["messages"], tokenize=False)}
             for c in conversations(rows)]
    run_sft(model, tokenizer, config, texts, watch)
    return model

def train_unsloth_padded(recipe, rows, tokens, watch):
    return train_unsloth(recipe, rows, tokens, watch, packing=False)

def train_unsloth_packed(recipe, rows, tokens, watch):
    return train_unsloth(recipe, rows, tokens, watch, packing=True)

def train_plain(recipe, rows, tokens, watch):
    "TRL and PEFT as their documentation shows them: conversations, padded"
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                             bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        recipe.model_id, dtype=torch.bfloat16, device_map={"": 0} if has_gpu() else None,
        quantization_config=nf4 if recipe.load_in_4bit else None)
    if recipe.load_in_4bit:
        model = prepare_model_for_kbit_training(model, recipe.gradient_checkpointing)
    model = get_peft_model(model, LoraConfig(
        r=recipe.r, lora_alpha=recipe.lora_alpha, lora_dropout=recipe.lora_dropout,
        target_modules=recipe.target_modules, task_type="CAUSAL_LM"))
    tokenizer = AutoTokenizer.from_pretrained(recipe.model_id)
    model.register_forward_pre_hook(watch.count, with_kwargs=True)
    steps = steps_for(recipe, mean_length(tokenizer, rows), tokens)
    config = sft_config(recipe, steps, gradient_checkpointing=recipe.gradient_checkpointing)
    run_sft(model, tokenizer, config, conversations(rows), watch)
    return model

WAYS = {"unsloth": {"descgen": train_descgen, "Unsloth, padded": train_unsloth_padded,
                    "Unsloth, packing=True": train_unsloth_packed},
        "plain": {"TRL + PEFT, padded": train_plain}}

# Measuring

@contextmanager
def memory_limit(gb):
    "No more memory than another card has"
    import torch
    if has_gpu():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1., gb*1e9/total) if gb else 1.)
    try:
        yield
    finally:
        if has_gpu():
            torch.cuda.set_per_process_memory_fraction(1.)

def measure(way, recipe, rows, tokens, card, **more):
    "A way once; the error if it does not run"
    kept_gb, watch = reset_peak(), make_watch()
    try:
        return rate(watch, way(recipe, rows, tokens, watch, **more), card, kept_gb)
    except Exception as e:
        return {"failed": f"{type(e).__name__}: {str(e).strip().splitlines()[0][:200]}"}

def result_name(args):
    return f"gpu-speed-{args.side}-{args.model}{'-small' if args.small else ''}"

def save(args, found, kept=None):
    "Write what is measured so far: {settings: {way: runs}}; `kept` is the summary of other settings"
    summary = dict(kept or {})
    for name, ways in found.items():
        summary[name] = {way: summarize(runs) for way, runs in ways.items()}
    rounds = 1 if args.side == "settings" else args.rounds
    save_result(args.results, result_name(args), summary, found, rounds)

def measure_side_by_side(args, source, rows, tokens, card):
    "Every way with the seed's settings and with the fastest recipe, then the packed ones in more rounds"
    found = {name: {} for name in RECIPES}
    for i in range(args.rounds):
        for name, files in RECIPES.items():
            ways = list(WAYS[args.side].items())
            for way, act in ways[::-1] if i % 2 else ways:
                if (i and "padded" in way) or (args.ways and way not in args.ways):
                    continue
                recipe = make_recipe(source, args.small, *files, loss_on="all")
                found[name].setdefault(way, []).append(measure(act, recipe, rows, tokens, card))
                save(args, found)

def measure_settings(args, source, rows, tokens, card):
    "descgen with one setting after another, and the recipes as they are, each within its card's memory"
    earlier = (read_result(args.results, result_name(args)) if args.match else None) or {}
    kept, found = earlier.get("summary"), earlier.get("raw") or {}
    def note(name, *files, compile=False, **more):
        if args.match and name not in args.match:
            return
        recipe = make_recipe(source, args.small, *files, **more)
        found[name] = {
            "descgen": [measure(train_descgen, recipe, rows, tokens, card, compile=compile)]}
        save(args, found, kept)
    for name, more in SETTINGS.items():
        note(name, **more)
    for name, gb in CARDS.items():
        with memory_limit(gb):
            note(f"recipes/best.yaml and {name}.yaml", "best", name)
    if has_gpu():
        note("neither, 16 bits, compiled", **LEAN_16, compile=True)

def run(args):
    if args.side != "plain":
        import unsloth # before transformers
    source, rows = model_folder(args.model, args.work, args.small), read_rows(args.rows)
    # enough for every way; their loss does not count
    rows = rows[:40] if args.small else rows*(1 + 8000//len(rows))
    import datasets, trl # before the lock
    act = measure_settings if args.side == "settings" else measure_side_by_side
    with card_lock():
        act(args, source, rows, 200 if args.small else TOKENS, matmul_rate())

# Summary and tables

def summarize(runs):
    "Medians over runs, and the least memory, because an earlier run in the process may have left some"
    done = [r for r in runs if "failed" not in r]
    if not done:
        return {"runs": 0, "failed": runs[0]["failed"]}
    middle = {k: statistics.median(r[k] for r in done)
              for k in ("tokens_per_second", "card_tflops", "share_of_card")}
    return {"runs": len(done), **middle, "memory_gb": min(r["memory_gb"] for r in done)}

HEAD = ["useful tokens per second", "peak memory", "card's rate", "share of it"]

def cells(s):
    "The figures of a way, or how it failed"
    if not s["runs"]:
        return [s["failed"], "", "", ""]
    runs = f" ({s['runs']} runs)" if s["runs"] > 1 else ""
    return [f"{s['tokens_per_second']:,.0f}{runs}", number(s["memory_gb"], ".1f", " GB"),
            number(s["card_tflops"], ".0f", " TFLOP/s"), number(s["share_of_card"], ".0%")]

def side_tables(records):
    "The ways beside each other, and each run of those with several"
    rows, runs = [], []
    for record in records:
        for name, ways in record["summary"].items():
            rows += [[name, way, *cells(s)] for way, s in ways.items()]
        for name, ways in (record["raw"] or {}).items():
            done = {way: [r["tokens_per_second"] for r in rounds if "failed" not in r]
                    for way, rounds in ways.items()}
            runs += [[name, way, ", ".join(f"{t:,.0f}" for t in each)]
                     for way, each in done.items() if len(each) > 1]
    about = " ".join([circumstances(records[0], *CARD), *notes(records[-1])])
    return [about, "", *markdown_table(["settings", "", *HEAD], sorted(rows)), "",
            *markdown_table(["settings", "", "useful tokens per second in each run"], sorted(runs))]

def settings_table(record):
    "descgen with one setting after another"
    rows = [[name, *cells(ways["descgen"])] for name, ways in record["summary"].items()]
    return [circumstances(record, *CARD), "", *markdown_table(["settings", *HEAD], rows)]

def tables(read):
    found = {}
    records = [r for side in ("unsloth", "plain") if (r := read(f"gpu-speed-{side}-llama"))]
    if records:
        found["gpu-speed"] = side_tables(records)
    settings = read("gpu-speed-settings-llama")
    if settings:
        found["gpu-speed settings"] = settings_table(settings)
    return found
