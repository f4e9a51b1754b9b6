"""Do the proofs of the notebooks hold on this card: packing, labels, evaluation, resuming, learning?

    python -m bench gpu-proofs llama WORK       # packing and labels, with the real vocabulary
    python -m bench gpu-proofs embedded WORK    # these, and evaluation, resuming and learning
"""
import os
import shutil
import tempfile
from pathlib import Path

from ..markdown import circumstances, markdown_table
from ..measure import NOTEBOOK, save_result
from .card import CARD, add_model_options, device, has_gpu
from .models import model_folder, read_rows

LENGTH = 512 # of packs and examples
TEST_ROWS = 32

def add_options(parser):
    add_model_options(parser)

def make_recipe(folder, small):
    "The notebook's recipe, short, and fast enough to learn something"
    from descgen.recipe import check_recipe, read_defaults, resolve
    short = dict(
        max_length=LENGTH, loss_on="completion", learning_rate=5e-4, per_device_train_batch_size=2,
        gradient_accumulation_steps=1, warmup_steps=2, eval_steps=4, save_steps=6, max_steps=12,
        output_dir=tempfile.mkdtemp(), model_id=str(folder), load_in_4bit=not small)
    return resolve(check_recipe(read_defaults(NOTEBOOK) | short))

def load_fresh(recipe):
    "The model with a new adapter, and the tokenizer"
    from descgen.model import add_lora, load_model
    model, tokenizer = load_model(recipe.model_id, 2048, recipe.load_in_4bit, "bfloat16")
    return add_lora(model, recipe), tokenizer

def make_packs(rows, tokenizer, recipe):
    from datasets import Dataset
    from descgen.formatting import template_parts
    from descgen.packing import Packs
    return Packs(Dataset.from_list(rows), tokenizer,
        template_parts(tokenizer), recipe.max_length, recipe.loss_on)

# Packing and labels

def logits_of(model, pack):
    import torch
    from descgen.losses import collate
    batch = {k: v.to(model.device) for k, v in collate([pack], share=False).items()}
    with torch.no_grad(), torch.autocast(device(), torch.bfloat16, enabled=has_gpu()):
        return model(**batch, use_cache=False).logits[0].float()

def contamination(model, pack, vocabulary):
    "How far a pack's last example moves if its neighbour has other tokens, and how far it is from the example alone"
    starts = [i for i, p in enumerate(pack["position_ids"]) if p == 0]
    before, last = starts[-2], starts[-1]
    changed = [(t + 1) % vocabulary if before <= i < last else t
               for i, t in enumerate(pack["input_ids"])]
    one = logits_of(model, pack)[last:]
    other = logits_of(model, {**pack, "input_ids": changed})[last:]
    alone = logits_of(model, {k: v[last:] for k, v in pack.items()})
    from_alone = (one - alone).abs()
    return {"examples": len(starts), "moved_by_neighbour": (one - other).abs().max().item(),
            "from_alone_largest": from_alone.max().item(),
            "from_alone_mean": from_alone.mean().item(),
            "largest_logit": one.abs().max().item()}

def check_labels(packs, tokenizer, parts):
    "Of a pack: beginnings of text, ends that are learnt, padding, and whether labels are the tokens"
    pack, ends = packs[0], set(parts.tail[:1])
    learnt = [(i, label) for i, label in zip(pack["input_ids"], pack["labels"]) if label != -100]
    return {"labels_are_tokens": all(i == label for i, label in learnt),
            "ends_learnt": sum(label in ends for _, label in learnt),
            "examples": pack["position_ids"].count(0),
            "beginnings": sum(i == tokenizer.bos_token_id for i in pack["input_ids"]),
            "padding": pack["input_ids"].count(tokenizer.pad_token_id)}

def packing_and_labels(recipe, rows):
    "Packing in eval mode and in training mode without dropout, and labels"
    from descgen.formatting import template_parts
    os.environ["UNSLOTH_RETURN_LOGITS"] = "1"
    model, tokenizer = load_fresh(recipe)
    packs, packing = make_packs(rows, tokenizer, recipe), {}
    pack = max(packs.block(0), key=lambda p: p["position_ids"].count(0))
    for m in model.modules():
        if type(m).__name__ == "Dropout":
            m.p = 0.
    for name, mode in (("eval", model.eval), ("training, dropout off", model.train)):
        mode()
        packing[name] = contamination(model, pack, len(tokenizer))
    os.environ["UNSLOTH_RETURN_LOGITS"] = "0"
    return {"packing": packing, "labels": check_labels(packs, tokenizer, template_parts(tokenizer))}

# Runs that must be alike

def train_fresh(recipe, rows, tests=(), resume=None):
    "A training: its losses and the adapter's weights"
    import torch
    from descgen.train import train
    torch.manual_seed(recipe.seed)
    model, tokenizer = load_fresh(recipe)
    history = train(model, tokenizer, make_packs(rows, tokenizer, recipe), recipe, tests, resume)
    losses = [float(h["loss"]) for h in history if "loss" in h]
    return (losses,
            {n: p.detach().float().cpu() for n, p in model.named_parameters() if "lora_" in n})

def compare_runs(one, other):
    "Largest differences of losses and weights; the shorter run is compared with the end of the longer"
    (losses, weights), (other_losses, other_weights) = one, other
    n = min(len(losses), len(other_losses))
    a, b = losses[-n:], other_losses[-n:]
    return {"losses_equal": a == b, "losses_differ": max(abs(x - y) for x, y in zip(a, b)),
            "weights_differ": max((weights[name] - other_weights[name]).abs().max().item()
                                  for name in weights)}

def repeated_runs(recipe, rows, tests):
    "The same run again, with evaluation, and resumed in its middle"
    def in_new_folder():
        return recipe.model_copy(update={"output_dir": tempfile.mkdtemp()})
    first = in_new_folder()
    one = train_fresh(first, rows)
    again, evaluated = train_fresh(in_new_folder(), rows), train_fresh(in_new_folder(), rows, tests)
    half = in_new_folder()
    checkpoint = Path(half.output_dir)/"checkpoint-6"
    shutil.copytree(Path(first.output_dir)/"checkpoint-6", checkpoint)
    resumed = train_fresh(half, rows, resume=checkpoint)
    resumed = (resumed[0][-6:], resumed[1])
    others = {"a second run": again, "with evaluation": evaluated, "resumed": resumed}
    return {name: compare_runs(one, other) for name, other in others.items()}

def learning(recipe, rows, tests):
    "The test loss before and after a short run"
    from descgen.losses import completion_loss
    from descgen.train import train
    own = {"max_steps": 40, "eval_steps": 40,
           "per_device_train_batch_size": 4, "output_dir": tempfile.mkdtemp()}
    recipe = recipe.model_copy(update=own)
    model, tokenizer = load_fresh(recipe)
    before = completion_loss(model, tests, recipe)
    train(model, tokenizer, make_packs(rows, tokenizer, recipe), recipe)
    return {"steps": 40, "before": before, "after": completion_loss(model, tests, recipe)}

def run(args):
    import unsloth # before transformers
    from transformers import AutoTokenizer
    from descgen.formatting import encode_rows, template_parts
    folder, rows = model_folder(args.model, args.work, args.small), read_rows(args.rows)
    recipe, train_rows = make_recipe(folder, args.small), rows[TEST_ROWS:]
    found = packing_and_labels(recipe, train_rows)
    if args.model == "embedded":
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tests, _ = encode_rows(
            rows[:TEST_ROWS], tokenizer, template_parts(tokenizer), LENGTH, "completion")
        found["repeated"] = repeated_runs(recipe, train_rows, tests[:8])
        if not args.small:
            found["learning"] = learning(recipe, train_rows, tests)
    save_result(args.results, f"gpu-proofs-{args.model}{'-small' if args.small else ''}", found)

# Tables

def yes(value):
    return "yes" if value else "no"

def packing_rows(model, s):
    "The proof of packing"
    rows = []
    for mode, f in s["packing"].items():
        keys = ("moved_by_neighbour", "from_alone_largest", "from_alone_mean", "largest_logit")
        rows.append([model, mode, f["examples"], *(f"{f[k]:.3g}" for k in keys)])
    return rows

def label_row(model, s):
    "The proof of labels"
    f = s["labels"]
    return [model, yes(f["labels_are_tokens"]), f["examples"],
            f["beginnings"], f["ends_learnt"], f["padding"]]

def repeated_rows(model, s):
    "Runs beside the first"
    return [[model, name, yes(f["losses_equal"]),
             f"{f['losses_differ']:.3g}", f"{f['weights_differ']:.3g}"]
            for name, f in s.get("repeated", {}).items()]

def learning_rows(model, s):
    "The test loss of a short run"
    f = s.get("learning")
    return [[model, f["steps"], f"{f['before']:.3g}", f"{f['after']:.3g}"]] if f else []

HEADS = {
    "packing": ["model", "mode", "examples in the pack", "moved by another neighbour",
                "from the example alone, largest", "mean", "largest logit"],
    "labels": ["model", "labels are tokens", "examples in the pack",
               "beginnings of text", "ends learnt", "padding"],
    "repeated": ["model", "beside a first run", "losses equal",
                 "largest difference of losses", "of weights"],
    "learning": ["model", "steps", "test loss before, nats per token", "after"]}

def tables(read):
    records = {model: record for model in ("llama", "embedded")
               if (record := read(f"gpu-proofs-{model}"))}
    if not records:
        return {}
    rows = {name: [] for name in HEADS}
    for model, record in records.items():
        s = record["summary"]
        rows["packing"] += packing_rows(model, s)
        rows["labels"].append(label_row(model, s))
        rows["repeated"] += repeated_rows(model, s)
        rows["learning"] += learning_rows(model, s)
    lines = [circumstances(next(iter(records.values())), *CARD)]
    for name, head in HEADS.items():
        lines += ["", *markdown_table(head, rows[name])]
    return {"gpu-proofs": lines}
