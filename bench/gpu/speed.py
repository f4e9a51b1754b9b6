"""Training side by side on one card: descgen, Unsloth as its notebooks set it, TRL with PEFT as its documentation shows; useful tokens a second, memory, share of the card's rate.

    python bench/gpu/speed.py unsloth llama WORK    # descgen, Unsloth padded, Unsloth with packing=True
    python bench/gpu/speed.py plain llama WORK      # TRL + PEFT
    python bench/gpu/speed.py settings llama WORK   # descgen alone: what each setting does, and the recipes within the memory of the cards they are for

The first two may be started together: they measure by turns. Each way gets about the same number of useful tokens; the first two steps do not count. Where they are
close, which is where rows are packed, more rounds are made (--rounds), every other one in the other order.
"""
import argparse, json, math, statistics, tempfile
from contextlib import contextmanager
from pathlib import Path

import yaml

from measure import ROOT, flop_per_token, forget_peak, has_gpu, keep, kept, matmul_rate, now, peak_gb, turn
from models import model_folder, read_rows

WARM, TOKENS = 2, 400_000 # steps that do not count; useful tokens that do, about
CARDS = {"t4": 14, "a100": 39, "h200": None} # GB that a process may have on a card: PyTorch's share, beside the driver's half a GB
LEAN = dict(lora_dropout=0, gradient_checkpointing=False)
TRIED = {"seed": {}, "no dropout": dict(lora_dropout=0), "nothing computed again": dict(gradient_checkpointing=False), "neither": LEAN,
    "neither, 16 bits": LEAN | dict(load_in_4bit=False),
    "neither, 16 bits, 1 row a pack": LEAN | dict(load_in_4bit=False, packing=False, per_device_train_batch_size=96),
    **{f"neither, 16 bits, {n} packs": LEAN | dict(load_in_4bit=False, per_device_train_batch_size=n) for n in (4, 8, 24)},
    "neither, 4 packs": LEAN | dict(per_device_train_batch_size=4), "neither, 4 packs, fp16": LEAN | dict(per_device_train_batch_size=4, bf16=False, fp16=True)}

def recipe(source, small, *names, **more):
    "The notebook's defaults with recipes of the folder `recipes`, for this model; small for a try"
    from descgen.recipe import check_recipe, read_defaults, resolve
    files = [yaml.safe_load((ROOT/"recipes"/f"{n}.yaml").read_text(encoding="utf-8")) for n in names]
    values = read_defaults(ROOT/"fine_tune_llama3.ipynb") | {k: v for f in files for k, v in f.items()} | more
    values |= dict(model_id=str(source), data_path=str(ROOT/"data"/"sample.jsonl"), output_dir=tempfile.mkdtemp(), save_steps=10**6)
    if small: values |= dict(load_in_4bit=False, per_device_train_batch_size=2, fp16=False, bf16="auto")
    return resolve(check_recipe(values))

def conversations(rows):
    "Rows as descgen trains them, in the words of the documentation"
    from descgen.formatting import chat_messages
    return [{"messages": chat_messages(r["title"], r["content"])} for r in rows]

def watched():
    "A callback that notes when each step ends, and a count of the tokens that a model is given"
    from transformers import TrainerCallback
    class Watch(TrainerCallback):
        times, tokens, given = [], [], 0
        def on_train_begin(self, *args, **kw): self.times, self.tokens, self.given = [], [], 0
        def on_step_end(self, *args, **kw): self.times.append(now()); self.tokens.append(int(self.given))
        def count(self, module, args, kw):
            mask, ids = kw.get("attention_mask"), kw["input_ids"]
            self.given = self.given + (mask.sum() if mask is not None and mask.dim() == 2 else ids.numel())
    return Watch()

def rate(watch, model, card):
    "What a training did after its first steps"
    seconds, tokens = watch.times[-1] - watch.times[WARM - 1], watch.tokens[-1] - watch.tokens[WARM - 1]
    return {"tokens a second": tokens/seconds, "useful tokens": tokens, "seconds": seconds, "gb": peak_gb(), "card": card, "share of the card": tokens/seconds*flop_per_token(model.config)/card}

def steps_for(recipe, each, tokens):
    "Steps with so many useful tokens, where a pack or row holds so many"
    from descgen.plan import effective_batch
    return WARM + max(2, math.ceil(tokens/each/effective_batch(recipe)))

def sft_config(recipe, steps, **more):
    "The recipe in TRL's words"
    from trl import SFTConfig
    same = ("per_device_train_batch_size", "gradient_accumulation_steps", "warmup_steps", "learning_rate", "lr_scheduler_type", "seed", "logging_steps", "optim", "max_length", "output_dir")
    return SFTConfig(**{k: getattr(recipe, k) for k in same}, max_steps=steps, save_strategy="no", bf16=has_gpu(), report_to="none", disable_tqdm=True, **more)

def run_sft(model, tokenizer, config, texts, watch):
    "TRL's trainer as the documentation calls it"
    from datasets import Dataset
    from trl import SFTTrainer
    trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(texts), processing_class=tokenizer, callbacks=[watch])
    trainer.train()

@contextmanager
def compiled(on):
    "The trainer's own option to compile"
    from descgen import train as stage
    plain = stage.training_arguments
    def with_compile(*args):
        arguments = plain(*args)
        arguments.torch_compile, arguments.torch_compile_backend = True, "inductor"
        return arguments
    if on: stage.training_arguments = with_compile
    try: yield
    finally: stage.training_arguments = plain

def descgen(recipe, rows, tokens, watch, compile=False):
    "descgen's own stages: packs, one row a batch"
    from datasets import Dataset
    from descgen.formatting import template_parts
    from descgen.packing import Packs
    from descgen.layers import patch_functions, unsloth_replacements
    from descgen.model import add_lora, load_model
    from descgen.recipe import compute_dtype
    from descgen.train import train
    model, tokenizer = load_model(recipe.model_id, recipe.max_seq_length, recipe.load_in_4bit, compute_dtype(recipe))
    packs = Packs(Dataset.from_list(rows), tokenizer, template_parts(tokenizer), recipe.max_length, recipe.loss_on, packing=recipe.packing)
    each = statistics.mean(len(packs[i]["input_ids"]) for i in range(32))
    model = add_lora(model, recipe)
    model.register_forward_pre_hook(watch.count, with_kwargs=True)
    try:
        with compiled(compile): train(model, tokenizer, packs, recipe.model_copy(update={"max_steps": steps_for(recipe, each, tokens)}), callbacks=[watch])
    finally:
        if has_gpu(): patch_functions({new: old for old, new in unsloth_replacements().items()}) # the next way may be Unsloth's own
    return model

def unsloth_way(packing):
    "Unsloth as its notebooks call it, with the chat template's text"
    def way(recipe, rows, tokens, watch):
        from unsloth import FastLanguageModel
        import torch
        model, tokenizer = FastLanguageModel.from_pretrained(recipe.model_id, max_seq_length=recipe.max_length, load_in_4bit=recipe.load_in_4bit, dtype=torch.bfloat16) # which is how long its packs are
        model = FastLanguageModel.get_peft_model(model, r=recipe.r, lora_alpha=recipe.lora_alpha, target_modules=recipe.target_modules, lora_dropout=recipe.lora_dropout,
            bias="none", random_state=recipe.seed, use_gradient_checkpointing="unsloth" if recipe.gradient_checkpointing else False)
        model.register_forward_pre_hook(watch.count, with_kwargs=True)
        steps = steps_for(recipe, 1000 if packing else mean_length(tokenizer, rows), tokens)
        texts = [{"text": tokenizer.apply_chat_template(c["messages"], tokenize=False)} for c in conversations(rows)]
        run_sft(model, tokenizer, sft_config(recipe, steps, packing=packing, dataset_text_field="text"), texts, watch)
        return model
    return way

def mean_length(tokenizer, rows):
    return statistics.mean(len(tokenizer(tokenizer.apply_chat_template(c["messages"], tokenize=False)).input_ids) for c in conversations(rows[:64]))

def plain(recipe, rows, tokens, watch):
    "TRL and PEFT as their documentation shows them: conversations, padded"
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(recipe.model_id, dtype=torch.bfloat16, device_map={"": 0} if has_gpu() else None,
        quantization_config=four if recipe.load_in_4bit else None)
    if recipe.load_in_4bit: model = prepare_model_for_kbit_training(model, recipe.gradient_checkpointing)
    model = get_peft_model(model, LoraConfig(r=recipe.r, lora_alpha=recipe.lora_alpha, lora_dropout=recipe.lora_dropout, target_modules=recipe.target_modules, task_type="CAUSAL_LM"))
    tokenizer = AutoTokenizer.from_pretrained(recipe.model_id)
    model.register_forward_pre_hook(watch.count, with_kwargs=True)
    config = sft_config(recipe, steps_for(recipe, mean_length(tokenizer, rows), tokens), gradient_checkpointing=recipe.gradient_checkpointing)
    run_sft(model, tokenizer, config, conversations(rows), watch)
    return model

WAYS = {"unsloth": {"descgen": descgen, "Unsloth, padded": unsloth_way(False), "Unsloth, packing=True": unsloth_way(True)},
    "plain": {"TRL + PEFT, padded": plain}}

@contextmanager
def memory_of(gb):
    "No more memory than another card has"
    import torch
    limit = gb*1e9/torch.cuda.get_device_properties(0).total_memory if gb and has_gpu() else 1.
    if has_gpu(): torch.cuda.set_per_process_memory_fraction(min(1., limit))
    try: yield
    finally:
        if has_gpu(): torch.cuda.set_per_process_memory_fraction(1.)

def measure(way, recipe, rows, tokens, card, **more):
    "One way once; the error where it does not run"
    forget_peak()
    watch = watched()
    try: return rate(watch, way(recipe, rows, tokens, watch, **more), card)
    except Exception as e: return {"failed": f"{type(e).__name__}: {str(e).strip().splitlines()[0][:200]}"}

def side_by_side(args, source, rows, tokens, card):
    "Every way at the seed's settings and at the fastest recipe, then packed ones in more rounds; what is measured is kept at once"
    found = {}
    for i in range(args.rounds):
        for name, files in {"the seed's settings": (), "recipes/h200.yaml": ("best", "h200")}.items():
            for way, f in list(WAYS[args.side].items())[::-1 if i % 2 else 1]:
                if i and "padded" in way: continue
                found.setdefault(f"{name}: {way}", []).append(measure(f, recipe(source, args.small, *files, loss_on="all"), rows, tokens, card))
                print(keep(f"speed-{args.side}-{args.model}", {"found": found})["found"][f"{name}: {way}"], flush=True)
    return found

def settings(args, source, rows, tokens, card):
    "descgen with one setting after another, and the recipes as they are, each within its card's memory; what is measured is kept at once"
    found = kept(f"speed-settings-{args.model}").get("found", {}) if args.match else {}
    def note(name, *files, **more):
        compile = more.pop("compile", False)
        if args.match and not any(word in name for word in args.match): return
        found[name] = [measure(descgen, recipe(source, args.small, *files, **more), rows, tokens, card, compile=compile)]
        print(keep(f"speed-settings-{args.model}", {"found": found})["found"][name], flush=True)
    for name, more in TRIED.items(): note(name, **more)
    for name, gb in CARDS.items():
        with memory_of(gb): note(f"recipes/best.yaml and {name}.yaml", "best", name)
    if has_gpu(): note("neither, 16 bits, compiled", **LEAN, load_in_4bit=False, compile=True)
    return found

def main(args):
    if args.side != "plain": import unsloth
    source, rows = model_folder(args.model, args.work, args.small), read_rows(args.rows)
    rows = rows*(1 + 8000//len(rows)) if not args.small else rows[:40] # enough for every way; nobody looks at the loss
    import trl, datasets # before the turn
    with turn():
        card = matmul_rate()
        found = (settings if args.side == "settings" else side_by_side)(args, source, rows, 200 if args.small else TOKENS, card)
    return {"found": found}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("side", choices=[*WAYS, "settings"]); parser.add_argument("model", choices=["llama", "embedded"]); parser.add_argument("work", type=Path)
    parser.add_argument("--rows", type=Path, default=Path("data/sample.jsonl")); parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--match", nargs="*", help="only settings with this in their name; the others as they were measured before")
    parser.add_argument("--small", action="store_true", help="a tiny model, for a try without a GPU")
    args = parser.parse_args()
    print(json.dumps(keep(f"speed-{args.side}-{args.model}", main(args))))
