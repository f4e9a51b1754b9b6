"""Training on a CPU: TRL + PEFT, LLaMA-Factory, Unsloth, descgen, and the processor's limit.

    python -m bench train ROWS.jsonl              # three rounds, about twenty minutes on two cores
    python -m bench train ROWS.jsonl --float32    # limit, Unsloth and descgen as on a processor without bf16
    python -m bench train ROWS.jsonl --only limit descgen --rounds 1 --steps 2    # a short look

Every system trains the embedded model on the same rows, LoRA r=16 on all seven matrices, in a process of its own.
All learn every token at dropout 0.05 with one learning rate; only `descgen cpu` is recipes/cpu.yaml. None
recomputes activations, which would make each slower. The tokens of the examples count, padding does not; all
steps but the first are timed. Losses are of held-out rows on completion tokens, each adapter judged in float32.

TRL 1.15, which the lock holds, does not train on a CPU, so plain TRL is 1.16; LLaMA-Factory needs an environment
of its own:

    pip install --no-deps --target .bench/trl trl==1.16.0
    python -m venv .bench/llamafactory && . .bench/llamafactory/bin/activate && pip install torch==2.13.0
    pip install transformers==5.6.0 trl==0.24.0 peft==0.18.1 accelerate==1.11.0 datasets==4.0.0 omegaconf==2.4.0
    pip install --no-deps llamafactory==0.9.5
    : > $(python -c 'import site; print(site.getsitepackages()[0])')/torchaudio.py    # imported, used for sound only
"""
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from .markdown import circumstances, markdown_table
from .measure import (NOTEBOOK, ROOT, peak_memory_gb, print_result, read_jsonl, run_child,
    save_result)

BATCH, RATE, LENGTH, HELD_OUT = 16, 5e-4, 512, 40
# what --float32 sets for the measurements' own processes
FLOAT32 = os.environ.get("UNSLOTH_CPU_BF16") == "0"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = dict(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=TARGETS)
SAME = dict(learning_rate=RATE, lr_scheduler_type="constant",
            warmup_steps=0, per_device_train_batch_size=4,
            gradient_accumulation_steps=1) # as the others' recipe in descgen's words

def add_options(parser):
    parser.add_argument("data", type=Path,
        help="rows; of a child process, the folder with its files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="of 16 rows")
    parser.add_argument("--only", nargs="+", choices=[*SYSTEMS],
        help="some systems; their losses are judged, too")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--trl", type=Path, default=ROOT/".bench"/"trl", help="folder of plain TRL")
    parser.add_argument("--llamafactory", type=Path,
                        default=ROOT/".bench"/"llamafactory"/"bin"/"python",
                        help="Python of LLaMA-Factory's environment")
    parser.add_argument("--child", choices=[*SYSTEMS, "judge"],
        help="one measurement in this process")
    parser.add_argument("--base", type=Path, help="folder of the model, of a child process")

# What the systems share

def conversation(row):
    "A row in the words of the chat template"
    return [{"role": "user", "content": f"DESCRIBE ABOUT THE PRODUCT.\nTitle: {row['title']}"},
            {"role": "assistant", "content": row["content"]}]

def step_clock():
    "A callback that notes when each step ends"
    from transformers import TrainerCallback
    class Clock(TrainerCallback):
        ends = []
        def on_step_end(self, *args, **kw):
            self.ends.append(time.perf_counter())
    return Clock()

def speed(ends, tokens):
    "Useful tokens per second without the first step, and peak memory"
    return {"tokens_per_second": sum(tokens[1:])/(ends[-1] - ends[0]),
            "memory_gb": peak_memory_gb()}

def batch_tokens(rows, tokenizer):
    "Tokens of each batch of rows in the order of the file"
    each = [len(tokenizer.apply_chat_template(conversation(r), return_dict=False)) for r in rows]
    return [sum(each[i:i + BATCH]) for i in range(0, len(each), BATCH)]

# The systems: each gets its folder, the base model's folder and the number of steps

def train_with_trl(work, model, tokenizer, steps, **more):
    "TRL's trainer, as its documentation shows it"
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    rows, clock = read_jsonl(work/"train.jsonl"), step_clock()
    config = SFTConfig(
        output_dir=str(work/"out"), max_steps=steps,
        per_device_train_batch_size=BATCH, learning_rate=RATE,
        lr_scheduler_type="constant", max_length=LENGTH,
        bf16=not FLOAT32, use_cpu=True, gradient_checkpointing=False,
        train_sampling_strategy="sequential", report_to="none",
        save_strategy="no", logging_steps=1, disable_tqdm=True,
        seed=42)
    examples = Dataset.from_list([{"messages": conversation(r)} for r in rows])
    trainer = SFTTrainer(model=model, args=config, train_dataset=examples, callbacks=[clock],
                         processing_class=tokenizer, **more)
    trainer.train()
    trainer.model.save_pretrained(str(work/"adapter"))
    return speed(clock.ends, batch_tokens(rows, tokenizer))

def trl(work, base, steps):
    "Plain TRL + PEFT"
    from peft import LoraConfig
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(base)
    return train_with_trl(work, str(base), tokenizer, steps,
        peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"))

def unsloth(work, base, steps):
    "Unsloth as its documentation shows it"
    from unsloth import FastLanguageModel
    model, tokenizer = FastLanguageModel.from_pretrained(str(base),
        max_seq_length=2048, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, **LORA,
        use_gradient_checkpointing=False, random_state=42)
    return train_with_trl(work, model, tokenizer, steps)

def llamafactory(work, base, steps):
    "LLaMA-Factory, set to learn every token and not to recompute"
    import llamafactory.train.tuner as tuner
    from transformers import AutoTokenizer
    rows, clock = read_jsonl(work/"train.jsonl"), step_clock()
    written = [{"instruction": "DESCRIBE ABOUT THE PRODUCT.",
                "input": f"Title: {r['title']}", "output": r["content"]}
               for r in rows]
    (work/"rows.json").write_text(json.dumps(written))
    (work/"dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    tuner.run_exp(dict(
        model_name_or_path=str(base), stage="sft", do_train=True,
        finetuning_type="lora", lora_rank=16, lora_alpha=32,
        lora_dropout=0.05, lora_target=",".join(TARGETS),
        dataset_dir=str(work), dataset="rows", template="smollm2",
        default_system=system, cutoff_len=LENGTH, train_on_prompt=True,
        disable_shuffling=True, use_cpu=True, bf16=True,
        disable_gradient_checkpointing=True,
        per_device_train_batch_size=BATCH, gradient_accumulation_steps=1,
        max_steps=steps, learning_rate=RATE,
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no",
        report_to="none", seed=42, disable_tqdm=True,
        output_dir=str(work/"adapter")), callbacks=[clock])
    return speed(clock.ends, batch_tokens(rows, AutoTokenizer.from_pretrained(base)))

def resolve_recipe(work, **changed):
    "The notebook's recipe for these rows"
    from descgen.model import EMBEDDED
    from descgen.recipe import check_recipe, read_defaults, resolve
    own = {"model_id": EMBEDDED, "data_path": str(work/"train.jsonl"),
           "output_dir": str(work/"out"),
           "max_length": LENGTH, "gradient_checkpointing": False,
           "loss_on": "all", "save_steps": 10_000,
           "eval_steps": 10_000}
    return resolve(check_recipe({**read_defaults(NOTEBOOK), **own, **changed}))

def train_with_descgen(work, recipe):
    "descgen over all rows, each once"
    from datasets import Dataset
    from descgen.formatting import template_parts
    from descgen.model import add_lora, load_model
    from descgen.packing import Packs
    from descgen.recipe import compute_dtype
    from descgen.train import train
    model, tokenizer = load_model(recipe.model_id, dtype=compute_dtype(recipe))
    model = add_lora(model, recipe)
    rows = Dataset.from_list(read_jsonl(work/"train.jsonl"))
    packs = Packs(rows, tokenizer, template_parts(tokenizer), recipe.max_length, recipe.loss_on,
                  packing=recipe.packing)
    n, clock = packs.per_epoch(), step_clock()
    once = recipe.model_copy(update={"max_steps": -1, "num_train_epochs": 1.0})
    train(model, tokenizer, packs, once, callbacks=[clock])
    model.save_pretrained(str(work/"adapter"))
    tokens = [len(packs[i]["input_ids"]) for i in range(n)]
    size = recipe.per_device_train_batch_size*recipe.gradient_accumulation_steps
    return speed(clock.ends, [sum(tokens[i:i + size]) for i in range(0, n, size)])

def descgen(work, base, steps):
    "descgen with the others' settings"
    return train_with_descgen(work, resolve_recipe(work, **SAME))

def descgen_float32(work, base, steps):
    "The same in float32"
    return train_with_descgen(work, resolve_recipe(work, **SAME, bf16=False))

def descgen_cpu(work, base, steps):
    "descgen with recipes/cpu.yaml"
    import yaml
    recipe = yaml.safe_load((ROOT/"recipes"/"cpu.yaml").read_text(encoding="utf-8"))
    own = {k: v for k, v in recipe.items() if k not in ("output_dir", "eval_steps", "save_steps")}
    return train_with_descgen(work, resolve_recipe(work, **own))

def product_seconds(n, k, times=7):
    "Median seconds of a product of 2,048 tokens with an n×k matrix, forward and back to its input"
    import torch
    dtype = torch.float32 if FLOAT32 else torch.bfloat16
    x, w, g = (torch.randn(shape).to(dtype) for shape in ((2048, n), (k, n), (2048, k)))
    took = []
    for _ in range(times + 2):
        start = time.perf_counter()
        x @ w.T
        g @ w
        took.append(time.perf_counter() - start)
    return statistics.median(took[2:])

def limit(work, base, steps):
    "Tokens per second if the products with the frozen matrices were all"
    from transformers import AutoConfig
    from descgen.plan import parameter_counts
    c = AutoConfig.from_pretrained(base)
    h, i = c.hidden_size, c.intermediate_size
    head_dim = getattr(c, "head_dim", None) or h//c.num_attention_heads
    # and how often in a layer
    shapes = [(h, h, 2), (h, c.num_key_value_heads*head_dim, 2), (h, i, 2), (i, h, 1)]
    layer = sum(count*product_seconds(n, k) for n, k, count in shapes)
    total = c.num_hidden_layers*layer + product_seconds(h, c.vocab_size, 3)
    body, embedding, _ = parameter_counts(c, 1, [])
    return {"tokens_per_second": 2048/total, "gflops": 4*2048*(body + embedding)/total/1e9}

SYSTEMS = {f.__name__: f
           for f in (limit, trl, llamafactory, unsloth, descgen, descgen_cpu, descgen_float32)}

def judge(work):
    "Held-out completion loss of every adapter of the folder, in float32, and without one"
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file
    from descgen.formatting import encode_rows, template_parts
    from descgen.losses import completion_loss
    from descgen.model import EMBEDDED, LoraSettings, add_lora, load_model
    recipe = resolve_recipe(work, bf16=False)
    model, tokenizer = load_model(EMBEDDED, dtype="float32")
    model = add_lora(model, LoraSettings(gradient_checkpointing=False))
    rows = read_jsonl(work/"test.jsonl")
    examples, _ = encode_rows(rows, tokenizer, template_parts(tokenizer), LENGTH, "completion")
    found = {"before": completion_loss(model, examples, recipe)}
    for path in sorted((work/"adapters").glob("*.safetensors")):
        set_peft_model_state_dict(model, load_file(path))
        found[path.stem] = completion_loss(model, examples, recipe)
    return found

# Rounds

def measure(name, work, args):
    "A system in a process of its own"
    extra = {"HF_HUB_OFFLINE": "1"}
    if name == "trl":
        extra["PYTHONPATH"] = str(args.trl)
    if args.float32:
        extra["UNSLOTH_CPU_BF16"] = "0"
    python = {"python": args.llamafactory} if name == "llamafactory" else {}
    words = [work, "--child", name, "--base", args.base, "--steps", args.steps]
    found = run_child("train", *words, **python, **extra)
    print(name, {k: round(v, 3) for k, v in found.items()}, flush=True)
    return found

def prepare_rows(data, work, n):
    "Rows to train on and to judge by, as the data stage splits them"
    from descgen.dataset import load_data
    from descgen.files import to_jsonl
    found = load_data(data)
    held_out = found.test.select(range(min(HELD_OUT, len(found.test))))
    for name, rows in (("train", found.train.select(range(n))), ("test", held_out)):
        written = [{k: r[k] for k in ("title", "content")} for r in rows.to_list()]
        (work/f"{name}.jsonl").write_text(to_jsonl(written), encoding="utf-8")

def one_round(names, work, args, keep_adapters):
    "Every system once; the adapters are kept to be judged"
    found = {}
    for name in names:
        for old in ("out", "adapter"):
            shutil.rmtree(work/old, ignore_errors=True)
        found[name] = measure(name, work, args)
        if keep_adapters and name != "limit":
            adapter = next((work/"adapter").rglob("adapter_model.safetensors"))
            shutil.copy(adapter, work/"adapters"/f"{name}.safetensors")
    return found

def choose_systems(args):
    "The systems of every round, and those of the first alone"
    if args.only:
        return args.only, []
    if args.float32: # the others have no such option
        return ["limit", "unsloth", "descgen", "descgen_cpu"], []
    return [name for name in SYSTEMS if name != "descgen_float32"], ["descgen_float32"]

def measure_rounds(args, work):
    "Every round, and the losses"
    names, first_only = choose_systems(args)
    (work/"adapters").mkdir()
    prepare_rows(args.data, work, BATCH*args.steps)
    rounds = []
    for i in range(args.rounds):
        extra = first_only if i == 0 else []
        rounds.append(one_round([*names, *extra], work, args, keep_adapters=i == 0))
    return rounds, measure("judge", work, args)

def run(args):
    if args.child:
        found = (judge(args.data) if args.child == "judge"
                 else SYSTEMS[args.child](args.data, args.base, args.steps))
        return print_result(found)
    from descgen.model import embedded_model, native_bf16
    args.base = embedded_model()
    args.float32 = args.float32 or not native_bf16() # emulated bf16 would be unfair to the others
    work = Path(tempfile.mkdtemp())
    try:
        rounds, losses = measure_rounds(args, work)
    finally:
        shutil.rmtree(work)
    summary = summarize(rounds, losses, args)
    name = "train-float32" if args.float32 else "train"
    save_result(args.results, name, summary, {"rounds": rounds, "losses": losses}, args.rounds)

# Summary and tables

def median_ratio(rounds, one, other):
    "Median over the rounds of the ratio of two systems' speeds; None without one of them"
    if other not in rounds[-1]:
        return None
    return statistics.median(r[one]["tokens_per_second"]/r[other]["tokens_per_second"]
        for r in rounds)

def summarize_system(name, rounds, losses):
    "A row of the table"
    memory = [r[name]["memory_gb"] for r in rounds if "memory_gb" in r[name]]
    return {"tokens_per_second": statistics.median(r[name]["tokens_per_second"] for r in rounds),
            "against_unsloth": median_ratio(rounds, name, "unsloth"),
            "against_trl": median_ratio(rounds, name, "trl"),
            "of_the_limit": median_ratio(rounds, name, "limit"),
            "memory_gb": max(memory) if memory else None,
            "loss": losses.get(name)}

def summarize(rounds, losses, args):
    "The figures of the table"
    rate = statistics.median(r["limit"]["gflops"] for r in rounds) if "limit" in rounds[0] else None
    names = [name for name in rounds[-1] if args.only or name != "descgen_float32"]
    return {"rows": BATCH*args.steps, "held_out": HELD_OUT,
            "loss_before": losses["before"], "limit_gflops": rate,
            "systems": {name: summarize_system(name, rounds, losses) for name in names},
            "loss_in_float32": losses.get("descgen_float32")}

def system_row(name, s):
    "A row as Markdown"
    cell = lambda key, form, unit="": "" if s[key] is None else f"{s[key]:{form}}{unit}"
    ratios = [cell(key, ".2f") for key in ("against_unsloth", "against_trl", "of_the_limit")]
    return [name.replace("_", " "), cell("tokens_per_second", ".0f"),
            *ratios, cell("memory_gb", ".1f", " GB"),
            cell("loss", ".3f")]

def table(record):
    "The systems beside each other"
    s = record["summary"]
    head = ["", "useful tokens per second", "against Unsloth as it comes",
            "against plain TRL + PEFT", "of the limit",
            "peak memory", "held-out loss"]
    about = f"{s['rows']} rows, {s['held_out']} others held out, loss before {s['loss_before']:.3f}"
    if s["limit_gflops"]:
        about += f", the limit's rate {s['limit_gflops']:.0f} GFLOP/s"
    about += f". {circumstances(record, 'torch', 'unsloth', 'transformers', 'peft')}"
    lines = [about, "",
             *markdown_table(head, [system_row(name, row) for name, row in s["systems"].items()])]
    if s["loss_in_float32"]:
        lines += ["", f"Trained in float32, descgen's loss is {s['loss_in_float32']:.3f}."]
    return lines

def tables(read):
    return {name: table(record) for name in ("train", "train-float32") if (record := read(name))}
