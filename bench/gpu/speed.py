"""Training side by side on one card: descgen, Unsloth as its notebooks set it, TRL with PEFT as its documentation shows; useful tokens a second, memory, share of the card's rate.

    python bench/gpu/speed.py unsloth llama WORK    # descgen, Unsloth padded, Unsloth with packing=True
    python bench/gpu/speed.py plain llama WORK      # TRL + PEFT in 4 bits and in bf16

Both may be started together: they measure by turns. Each way gets about the same number of useful tokens; the first two steps do not count.
"""
import argparse, json, math, statistics, tempfile
from pathlib import Path

from measure import ROOT, flop_per_token, forget_peak, has_gpu, keep, matmul_rate, now, peak_gb, turn
from models import model_folder, read_rows

SEED = dict(per_device_train_batch_size=16, gradient_accumulation_steps=2, lora_dropout=0.05, gradient_checkpointing=True, load_in_4bit=True)
BEST = dict(per_device_train_batch_size=16, gradient_accumulation_steps=2, lora_dropout=0, gradient_checkpointing=False, load_in_4bit=False)
SETTINGS = {"seed": SEED, "best": BEST}
LORA = dict(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
WARM, TOKENS = 2, 130_000 # steps that do not count; useful tokens that do, about

def conversations(rows):
    "Rows as prompt and completion, as descgen trains them"
    from descgen.formatting import messages
    return [{"messages": messages(r["title"], r["content"])} for r in rows]

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
    return {"tokens a second": tokens/seconds, "useful tokens": tokens, "seconds": seconds, "gb": peak_gb(), "share of the card": tokens/seconds*flop_per_token(model.config)/card}

def steps_for(per_step, tokens): return WARM + max(2, math.ceil(tokens/per_step))

def sft_config(settings, steps, folder, **more):
    "Unsloth's and TRL's documented settings, with the recipe's optimizer and schedule"
    from trl import SFTConfig
    same = {k: settings[k] for k in ("per_device_train_batch_size", "gradient_accumulation_steps")}
    return SFTConfig(**same, max_steps=steps, warmup_steps=10, learning_rate=3e-5, lr_scheduler_type="cosine", seed=42, logging_steps=1, save_strategy="no",
        optim="paged_adamw_8bit" if has_gpu() else "adamw_torch", bf16=has_gpu(), max_length=1024, output_dir=folder, report_to="none", disable_tqdm=True, **more)

def run_sft(model, tokenizer, config, texts, watch):
    "TRL's trainer as the documentation calls it"
    from datasets import Dataset
    from trl import SFTTrainer
    trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(texts), processing_class=tokenizer, callbacks=[watch])
    trainer.train()

def descgen(source, settings, rows, tokens, watch):
    "descgen's own stages: packs of 1024 tokens, one row a batch"
    from datasets import Dataset
    from descgen.formatting import Packs, template_parts
    from descgen.model import add_lora, load_model
    from descgen.train import check_recipe, read_defaults, resolve, train
    folder = tempfile.mkdtemp()
    steps = steps_for(settings["per_device_train_batch_size"]*settings["gradient_accumulation_steps"]*1000, tokens)
    recipe = resolve(check_recipe({**read_defaults(ROOT/"fine_tune_llama3.ipynb"), **settings, "max_steps": steps, "output_dir": folder, "model_id": str(source)}))
    model, tokenizer = load_model(str(source), 2048, recipe.load_in_4bit, "bfloat16")
    model = add_lora(model, **LORA, lora_dropout=recipe.lora_dropout, gradient_checkpointing=recipe.gradient_checkpointing)
    model.register_forward_pre_hook(watch.count, with_kwargs=True)
    train(model, tokenizer, Packs(Dataset.from_list(rows), tokenizer, template_parts(tokenizer), recipe.max_length), recipe, callbacks=[watch])
    return model

def unsloth_way(packing):
    "Unsloth as its notebooks call it, with the chat template's text"
    def way(source, settings, rows, tokens, watch):
        from unsloth import FastLanguageModel
        import torch
        model, tokenizer = FastLanguageModel.from_pretrained(str(source), max_seq_length=2048, load_in_4bit=settings["load_in_4bit"], dtype=torch.bfloat16)
        model = FastLanguageModel.get_peft_model(model, **LORA, lora_dropout=settings["lora_dropout"], bias="none", random_state=42,
            use_gradient_checkpointing="unsloth" if settings["gradient_checkpointing"] else False)
        model.register_forward_pre_hook(watch.count, with_kwargs=True)
        per_step = settings["per_device_train_batch_size"]*settings["gradient_accumulation_steps"]*(1000 if packing else mean_length(tokenizer, rows))
        texts = [{"text": tokenizer.apply_chat_template(c["messages"], tokenize=False)} for c in conversations(rows)]
        config = sft_config(settings, steps_for(per_step, tokens), tempfile.mkdtemp(), packing=packing, dataset_text_field="text")
        run_sft(model, tokenizer, config, texts, watch)
        return model
    return way

def mean_length(tokenizer, rows):
    return statistics.mean(len(tokenizer(tokenizer.apply_chat_template(c["messages"], tokenize=False)).input_ids) for c in conversations(rows[:64]))

def plain(source, settings, rows, tokens, watch):
    "TRL and PEFT as their documentation shows them: conversations, padded"
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, device_map={"": 0} if has_gpu() else None,
        quantization_config=four if settings["load_in_4bit"] else None)
    if settings["load_in_4bit"]: model = prepare_model_for_kbit_training(model, settings["gradient_checkpointing"])
    model, tokenizer = get_peft_model(model, LoraConfig(**LORA, lora_dropout=settings["lora_dropout"], task_type="CAUSAL_LM")), AutoTokenizer.from_pretrained(source)
    model.register_forward_pre_hook(watch.count, with_kwargs=True)
    per_step = settings["per_device_train_batch_size"]*settings["gradient_accumulation_steps"]*mean_length(tokenizer, rows)
    config = sft_config(settings, steps_for(per_step, tokens), tempfile.mkdtemp(), gradient_checkpointing=settings["gradient_checkpointing"])
    run_sft(model, tokenizer, config, conversations(rows), watch)
    return model

WAYS = {"unsloth": {"descgen": descgen, "Unsloth, padded": unsloth_way(False), "Unsloth, packing=True": unsloth_way(True)},
    "plain": {"TRL + PEFT, padded": plain}}

def measure(way, source, settings, rows, tokens, card):
    "One way once"
    forget_peak()
    watch = watched()
    model = way(source, settings, rows, tokens, watch)
    return rate(watch, model, card)

def main(args):
    "Every way at every setting, round by round"
    if args.side == "unsloth": import unsloth
    source, rows, found = model_folder(args.model, args.work, args.small), read_rows(args.rows), {}
    rows = rows*(1 + 40_000//len(rows)) if not args.small else rows[:40] # enough for every way; nobody looks at the loss
    import trl, datasets # before the turn
    with turn():
        card = matmul_rate()
        for _ in range(args.rounds):
            for name, settings in SETTINGS.items():
                for way, f in WAYS[args.side].items():
                    settings = {**settings, **({"load_in_4bit": False, "per_device_train_batch_size": 2} if args.small else {})}
                    found.setdefault(f"{name}: {way}", []).append(measure(f, source, settings, rows, 200 if args.small else TOKENS, card))
    return {"card": card, "found": found}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("side", choices=WAYS); parser.add_argument("model", choices=["llama", "embedded"]); parser.add_argument("work", type=Path)
    parser.add_argument("--rows", type=Path, default=Path("data/sample.jsonl")); parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a tiny model, for a try without a GPU")
    args = parser.parse_args()
    print(json.dumps(keep(f"speed-{args.side}-{args.model}", main(args))))
