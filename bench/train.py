"""Training on a CPU, side by side: plain TRL + PEFT, LLaMA-Factory, Unsloth as it comes, descgen; and the limit that the model's own products set.

    python bench/train.py ROWS.jsonl            # three interleaved rounds, about twenty minutes on two cores; writes its table into bench/README.md
    python bench/train.py ROWS.jsonl --rounds 1 # a look; prints only
    python bench/train.py ROWS.jsonl --float32  # as on a processor without bf16 arithmetic: limit, Unsloth and descgen, all in float32

Every contender trains the embedded model on the same rows, LoRA r=16 on all seven matrices, in a process of its own; all learn every token at dropout 0.05 with one
learning rate, but `descgen cpu`, which is recipes/cpu.yaml. Recomputing activations is off for all: it only makes each slower. Counted are the tokens of the examples, not
padding; timed are all steps but the first. Losses are of held-out rows on completion tokens, each adapter judged in float32.

TRL 1.15, which the lock holds, does not train on a CPU, so plain TRL is 1.16; LLaMA-Factory wants an environment of its own:

    pip install --no-deps --target .bench/trl trl==1.16.0
    python -m venv .bench/llamafactory && . .bench/llamafactory/bin/activate && pip install torch==2.13.0
    pip install transformers==5.6.0 trl==0.24.0 peft==0.18.1 accelerate==1.11.0 datasets==4.0.0 omegaconf==2.4.0 && pip install --no-deps llamafactory==0.9.5
    : > $(python -c 'import site; print(site.getsitepackages()[0])')/torchaudio.py    # it is imported, and needed for sound only
"""
import argparse, json, os, platform, resource, shutil, statistics, subprocess, sys, tempfile, time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
BATCH, STEPS, RATE, LENGTH, HELD_OUT = 16, 5, 5e-4, 512, 40
FLOAT32 = os.environ.get("UNSLOTH_CPU_BF16") == "0" # what --float32 sets for the measurements' own processes
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

def read(path): return [json.loads(line) for line in open(path, encoding="utf-8")]

def conversation(row):
    return [{"role": "user", "content": f"DESCRIBE ABOUT THE PRODUCT.\nTitle: {row['title']}"}, {"role": "assistant", "content": row["content"]}]

def clock():
    "A callback that notes when each step ends"
    from transformers import TrainerCallback
    class Clock(TrainerCallback):
        ends = []
        def on_step_end(self, *args, **kw): self.ends.append(time.perf_counter())
    return Clock()

def told(ends, tokens):
    "Useful tokens a second, the first step left out"
    return {"tokens_per_second": sum(tokens[1:])/(ends[-1] - ends[0]), "memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024/1e9}

def lengths(rows, tokenizer):
    "Tokens of each batch of rows in the order of the file"
    each = [len(tokenizer.apply_chat_template(conversation(r), return_dict=False)) for r in rows]
    return [sum(each[i:i + BATCH]) for i in range(0, len(each), BATCH)]

def sft(work, model, tokenizer, **settings):
    "TRL's trainer, as its documentation shows it"
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    rows, watch = read(f"{work}/train.jsonl"), clock()
    config = SFTConfig(output_dir=f"{work}/out", max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=RATE, lr_scheduler_type="constant", max_length=LENGTH,
        bf16=not FLOAT32, use_cpu=True, gradient_checkpointing=False, train_sampling_strategy="sequential", report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, seed=42)
    trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list([{"messages": conversation(r)} for r in rows]), callbacks=[watch],
        processing_class=tokenizer, **settings)
    trainer.train()
    trainer.model.save_pretrained(f"{work}/adapter")
    return told(watch.ends, lengths(rows, tokenizer))

def trl(work, base):
    "Plain TRL + PEFT"
    from peft import LoraConfig
    from transformers import AutoTokenizer
    return sft(work, str(base), AutoTokenizer.from_pretrained(base), peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=TARGETS, task_type="CAUSAL_LM"))

def unsloth(work, base):
    "Unsloth as it comes"
    from unsloth import FastLanguageModel
    model, tokenizer = FastLanguageModel.from_pretrained(str(base), max_seq_length=2048, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, lora_dropout=0.05, target_modules=TARGETS, use_gradient_checkpointing=False, random_state=42)
    return sft(work, model, tokenizer)

def settled(work, **changed):
    from descgen.model import EMBEDDED
    from descgen.recipe import check_recipe, read_defaults, resolve
    return resolve(check_recipe({**read_defaults(HERE.parent/"fine_tune_llama3.ipynb"), "model_id": EMBEDDED, "data_path": f"{work}/train.jsonl", "output_dir": f"{work}/out",
        "max_length": LENGTH, "gradient_checkpointing": False, "loss_on": "all", "save_steps": 10_000, "eval_steps": 10_000, **changed}))

def ours(work, recipe):
    "descgen over all rows, each once"
    from datasets import Dataset
    from descgen.formatting import template_parts
    from descgen.packing import Packs
    from descgen.model import add_lora, load_model
    from descgen.recipe import compute_dtype
    from descgen.train import train
    model, tokenizer = load_model(recipe.model_id, dtype=compute_dtype(recipe))
    model = add_lora(model, recipe)
    packs, watch = Packs(Dataset.from_list(read(f"{work}/train.jsonl")), tokenizer, template_parts(tokenizer), recipe.max_length, recipe.loss_on, packing=recipe.packing), clock()
    n = packs.per_epoch()
    train(model, tokenizer, packs, recipe.model_copy(update={"max_steps": -1, "num_train_epochs": 1.0}), callbacks=[watch])
    model.save_pretrained(f"{work}/adapter")
    tokens = [len(packs[i]["input_ids"]) for i in range(n)]
    size = recipe.per_device_train_batch_size*recipe.gradient_accumulation_steps
    return told(watch.ends, [sum(tokens[i:i + size]) for i in range(0, n, size)])

SAME = dict(learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0, per_device_train_batch_size=4, gradient_accumulation_steps=1)
def descgen(work, base): return ours(work, settled(work, **SAME))
def descgen_float32(work, base): return ours(work, settled(work, **SAME, bf16=False))
def descgen_cpu(work, base):
    import yaml
    recipe = yaml.safe_load((HERE.parent/"recipes"/"cpu.yaml").read_text(encoding="utf-8"))
    return ours(work, settled(work, **{k: v for k, v in recipe.items() if k not in ("output_dir", "eval_steps", "save_steps")}))

def limit(work, base):
    "Tokens a second if the frozen matrices' products, forward and back to their inputs, were all: measured on their shapes, 2,048 tokens at once"
    import torch
    from transformers import AutoConfig
    from descgen.plan import parameter_counts
    c = AutoConfig.from_pretrained(base)
    h, i, kv = c.hidden_size, c.intermediate_size, c.num_key_value_heads*c.head_dim if getattr(c, "head_dim", None) else c.num_key_value_heads*h//c.num_attention_heads
    shapes = [(h, h, 2), (h, kv, 2), (h, i, 2), (i, h, 1)]
    def seconds(n, k, times=7):
        x, w, g = (torch.randn(s).to(torch.float32 if FLOAT32 else torch.bfloat16) for s in ((2048, n), (k, n), (2048, k)))
        took = []
        for _ in range(times + 2):
            start = time.perf_counter(); x @ w.T; g @ w; took.append(time.perf_counter() - start)
        return statistics.median(took[2:])
    total = c.num_hidden_layers*sum(count*seconds(n, k) for n, k, count in shapes) + seconds(h, c.vocab_size, 3)
    body, embedding, _ = parameter_counts(c, 1, [])
    return {"tokens_per_second": 2048/total, "gflops": 4*2048*(body + embedding)/total/1e9}

def llamafactory(work, base):
    "LLaMA-Factory, told to learn every token and not to recompute"
    import llamafactory.train.tuner as tuner
    from transformers import AutoTokenizer
    rows, watch = read(f"{work}/train.jsonl"), clock()
    Path(f"{work}/rows.json").write_text(json.dumps([{"instruction": "DESCRIBE ABOUT THE PRODUCT.", "input": f"Title: {r['title']}", "output": r["content"]} for r in rows]))
    Path(f"{work}/dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    tuner.run_exp(dict(model_name_or_path=str(base), stage="sft", do_train=True, finetuning_type="lora", lora_rank=16, lora_alpha=32, lora_dropout=0.05, lora_target=",".join(TARGETS),
        dataset_dir=str(work), dataset="rows", template="smollm2", default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face", cutoff_len=LENGTH,
        train_on_prompt=True, disable_shuffling=True, use_cpu=True, bf16=True, disable_gradient_checkpointing=True, per_device_train_batch_size=BATCH, gradient_accumulation_steps=1,
        max_steps=STEPS, learning_rate=RATE, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none", seed=42, disable_tqdm=True, output_dir=f"{work}/adapter"),
        callbacks=[watch])
    return told(watch.ends, lengths(rows, AutoTokenizer.from_pretrained(base)))

def judge(work, base):
    "Held-out completion loss of every adapter in a folder, in float32, and without one"
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file
    from descgen.formatting import encode_rows, template_parts
    from descgen.model import add_lora, EMBEDDED, load_model, LoraSettings
    from descgen.losses import completion_loss
    recipe, found = settled(work, bf16=False), {}
    model, tokenizer = load_model(EMBEDDED, dtype="float32")
    model = add_lora(model, LoraSettings(gradient_checkpointing=False))
    examples, _ = encode_rows(read(f"{work}/test.jsonl"), tokenizer, template_parts(tokenizer), LENGTH, "completion")
    found["before"] = completion_loss(model, examples, recipe)
    for path in sorted(Path(work).glob("adapters/*.safetensors")):
        set_peft_model_state_dict(model, load_file(path))
        found[path.stem] = completion_loss(model, examples, recipe)
    return found

def child(name, work, args):
    "One measurement in a process of its own"
    python, extra = sys.executable, {}
    if name == "trl": extra = {"PYTHONPATH": str(args.trl)}
    if name == "llamafactory": python = str(args.llamafactory)
    if args.float32: extra["UNSLOTH_CPU_BF16"] = "0"
    done = subprocess.run([python, __file__, str(work), "--child", name, "--base", str(args.base)], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", **extra})
    if done.returncode: raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(name, {k: round(v, 3) for k, v in found.items()}, flush=True)
    return found

def prepare(data, work):
    "Rows to train on and to judge by, as the data stage divides them"
    from descgen.files import to_jsonl
    from descgen.dataset import load_data
    found = load_data(data)
    for name, rows in (("train", found.train.select(range(BATCH*STEPS))), ("test", found.test.select(range(min(HELD_OUT, len(found.test)))))):
        Path(f"{work}/{name}.jsonl").write_text(to_jsonl([{k: r[k] for k in ("title", "content")} for r in rows.to_list()]), encoding="utf-8")

def table(rounds, losses):
    "Medians, and ratios within the rounds"
    speed = {n: [r[n]["tokens_per_second"] for r in rounds] for n in rounds[0]}
    def ratio(a, b): return f"{statistics.median(x/y for x, y in zip(speed[a], speed[b])):.2f}" if b in speed else ""
    rows = ["| | useful tokens per second | against Unsloth as it comes | against plain TRL + PEFT | of the limit | peak memory | held-out loss |", "|---|---|---|---|---|---|---|"]
    for n in speed:
        memory = f"{max(r[n].get('memory_gb', 0) for r in rounds):.1f} GB" if n != "limit" else ""
        rows.append(f"| {n.replace('_', ' ')} | {statistics.median(speed[n]):.0f} | {ratio(n, 'unsloth')} | {ratio(n, 'trl')} | {ratio(n, 'limit')} | {memory} | {f'{losses[n]:.3f}' if n in losses else ''} |")
    about = (f"{len(rounds)} rounds, medians; {BATCH*STEPS} rows of {HELD_OUT} held out, loss before {losses['before']:.3f}. {os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, "
             + ", ".join(f"{p} {version(p)}" for p in ("torch", "unsloth", "transformers", "peft")) + f"; the limit's rate {statistics.median(r['limit']['gflops'] for r in rounds):.0f} GFLOP/s.")
    return "\n".join([about.replace(f"rows of {HELD_OUT} held out", f"rows, {HELD_OUT} others held out"), "", *rows])

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data"); parser.add_argument("--rounds", type=int, default=3); parser.add_argument("--child"); parser.add_argument("--base", type=Path)
    parser.add_argument("--trl", type=Path, default=HERE.parent/".bench"/"trl"); parser.add_argument("--llamafactory", type=Path, default=HERE.parent/".bench"/"llamafactory"/"bin"/"python")
    parser.add_argument("--only", nargs="+"); parser.add_argument("--float32", action="store_true")
    args = parser.parse_args()
    if args.child:
        print("\n" + json.dumps(globals()[args.child](Path(args.data), args.base)))
        sys.exit()
    from descgen.model import embedded_model, native_bf16
    args.base, args.float32 = embedded_model(), args.float32 or not native_bf16() # emulated bf16 would be unfair to the others
    peers = [] if args.float32 else ["trl", "llamafactory"]
    work, names = Path(tempfile.mkdtemp()), args.only or ["limit", *peers, "unsloth", "descgen", "descgen_cpu"]
    (work/"adapters").mkdir()
    prepare(args.data, work)
    rounds = []
    for n in range(args.rounds):
        rounds.append({})
        for name in names + (["descgen_float32"] if n == 0 and not args.only and not args.float32 else []):
            for old in ("out", "adapter"): shutil.rmtree(work/old, ignore_errors=True)
            rounds[-1][name] = child(name, work, args)
            if n == 0 and name != "limit": shutil.copy(next((work/"adapter").rglob("adapter_model.safetensors")), work/"adapters"/f"{name}.safetensors")
    reference = rounds[0].pop("descgen_float32", None)
    losses = child("judge", work, args)
    if not args.only:
        text = table(rounds, losses) + ("" if args.float32 else f"\n\nTrained in float32, descgen's loss is {losses['descgen_float32']:.3f}.")
        print(text)
        if args.rounds > 1:
            from sweep import store
            store(text, "train float32" if args.float32 else "train")
    shutil.rmtree(work)
