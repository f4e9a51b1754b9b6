"""Whether what the notebooks prove on a CPU holds on this card: packs without contamination, labels, evaluation that changes nothing, resuming, learning.

    python bench/gpu/correct.py llama WORK       # packing and labels, with the real vocabulary
    python bench/gpu/correct.py embedded WORK    # the same, and evaluation, resuming and learning
"""
import argparse, json, os, shutil, tempfile
from pathlib import Path

from measure import ROOT, device, has_gpu, keep
from models import model_folder, read_rows

LENGTH = 512 # of packs and examples here

def recipe_for(folder, small, **more):
    "The notebook's recipe, short, and fast enough to learn something"
    from descgen.recipe import check_recipe, read_defaults, resolve
    short = dict(max_length=LENGTH, loss_on="completion", learning_rate=5e-4, per_device_train_batch_size=2, gradient_accumulation_steps=1, warmup_steps=2, eval_steps=4,
        save_steps=6, max_steps=12, output_dir=tempfile.mkdtemp(), model_id=str(folder), load_in_4bit=not small)
    return resolve(check_recipe(read_defaults(ROOT/"fine_tune_llama3.ipynb") | short | more))

def fresh(recipe):
    "Model with a new adapter, and tokenizer"
    from descgen.model import add_lora, load_model
    model, tokenizer = load_model(recipe.model_id, 2048, recipe.load_in_4bit, "bfloat16")
    return add_lora(model, recipe), tokenizer

def packs_of(rows, tokenizer, recipe):
    from datasets import Dataset
    from descgen.formatting import template_parts
    from descgen.packing import Packs
    return Packs(Dataset.from_list(rows), tokenizer, template_parts(tokenizer), recipe.max_length, recipe.loss_on)

def logits(model, batch):
    import torch
    with torch.no_grad(), torch.autocast(device(), torch.bfloat16, enabled=has_gpu()):
        return model(**{k: v.to(model.device) for k, v in batch.items()}, use_cache=False).logits[0].float()

def contamination(model, pack, vocab):
    "How far logits of a pack's last example move when the tokens of the one before it are other ones, and how far it lies from the example alone"
    import torch
    from descgen.losses import collate
    starts = [i for i, p in enumerate(pack["position_ids"]) if p == 0]
    other = {**pack, "input_ids": [(t + 1) % vocab if starts[-2] <= i < starts[-1] else t for i, t in enumerate(pack["input_ids"])]}
    alone = {k: v[starts[-1]:] for k, v in pack.items()}
    one, two, three = (logits(model, collate([p], share=False))[s:] for p, s in ((pack, starts[-1]), (other, starts[-1]), (alone, 0)))
    return {"examples": len(starts), "moved by another neighbour": (one - two).abs().max().item(),
            "from the example alone, largest and mean": [(one - three).abs().max().item(), (one - three).abs().mean().item()], "largest logit": one.abs().max().item()}

def labels_right(packs, tokenizer, parts):
    "Of all examples of a pack: one beginning of text, an end that is learnt, no padding, labels that are the tokens"
    pack, ends = packs[0], set(parts.tail[:1])
    learnt = [(i, l) for i, l in zip(pack["input_ids"], pack["labels"]) if l != -100]
    begins = sum(i == tokenizer.bos_token_id for i in pack["input_ids"])
    return {"labels are tokens": all(i == l for i, l in learnt), "ends learnt": sum(l in ends for _, l in learnt), "examples": pack["position_ids"].count(0),
            "beginnings of text": begins, "padding": pack["input_ids"].count(tokenizer.pad_token_id)}

def packing_and_labels(recipe, rows):
    "The first two proofs, in eval mode, in training mode and for every token"
    from descgen.formatting import template_parts
    os.environ["UNSLOTH_RETURN_LOGITS"] = "1"
    (model, tokenizer), found = fresh(recipe), {}
    packs = packs_of(rows, tokenizer, recipe)
    for name, mode in (("eval", model.eval), ("training, dropout off", model.train)):
        mode(); [setattr(m, "p", 0.) for m in model.modules() if type(m).__name__ == "Dropout"]
        found[f"packing, {name}"] = contamination(model, max(packs.block(0), key=lambda p: p["position_ids"].count(0)), len(tokenizer))
    os.environ["UNSLOTH_RETURN_LOGITS"] = "0"
    return found | {"labels": labels_right(packs, tokenizer, template_parts(tokenizer))}

def weights(model): return {n: p.detach().float().cpu() for n, p in model.named_parameters() if "lora_" in n}
def losses(history): return [float(h["loss"]) for h in history if "loss" in h]
def apart(a, b): return max((a[n] - b[n]).abs().max().item() for n in a)

def run(recipe, rows, tests=(), resume=None):
    "Train; the log and the adapter's weights"
    import torch
    from descgen.train import train
    torch.manual_seed(recipe.seed)
    model, tokenizer = fresh(recipe)
    history = train(model, tokenizer, packs_of(rows, tokenizer, recipe), recipe, tests, resume)
    return history, weights(model)

def evaluation_and_resume(recipe, rows, tests):
    "The same run twice, with evaluation, and from its middle"
    again = lambda **more: recipe.model_copy(update={"output_dir": tempfile.mkdtemp(), **more})
    first = again()
    (a, one), (b, two), (c, three) = run(first, rows), run(again(), rows), run(again(), rows, tests)
    resumed = again()
    middle = next(Path(first.output_dir).glob("checkpoint-6"))
    shutil.copytree(middle, Path(resumed.output_dir)/"checkpoint-6")
    d, four = run(resumed, rows, resume=Path(resumed.output_dir)/"checkpoint-6")
    same = {"a second run": (losses(a), losses(b), apart(one, two)), "with evaluation": (losses(a), losses(c), apart(one, three)), "resumed": (losses(a)[6:], losses(d)[-6:], apart(one, four))}
    return {name: {"losses equal": x == y, "largest difference of losses": max(abs(i - j) for i, j in zip(x, y)), "largest difference of weights": w} for name, (x, y, w) in same.items()}

def learning(recipe, rows, tests):
    "The test loss before and after a short run"
    from descgen.train import train
    recipe = recipe.model_copy(update={"max_steps": 40, "eval_steps": 40, "per_device_train_batch_size": 4, "output_dir": tempfile.mkdtemp()})
    from descgen.losses import completion_loss
    model, tokenizer = fresh(recipe)
    before = completion_loss(model, tests, recipe)
    train(model, tokenizer, packs_of(rows, tokenizer, recipe), recipe)
    return {"test loss before": before, "after 40 steps": completion_loss(model, tests, recipe)}

def main(args):
    import unsloth
    from descgen.formatting import encode_rows, template_parts
    folder, rows = model_folder(args.model, args.work, args.small), read_rows(args.rows)
    recipe = recipe_for(folder, args.small)
    found = packing_and_labels(recipe, rows[32:])
    if args.model == "llama": return found
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tests, _ = encode_rows(rows[:32], tokenizer, template_parts(tokenizer), LENGTH, "completion")
    return found | evaluation_and_resume(recipe, rows[32:], tests[:8]) | ({} if args.small else learning(recipe, rows[32:], tests))

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=["llama", "embedded"]); parser.add_argument("work", type=Path)
    parser.add_argument("--rows", type=Path, default=Path("data/sample.jsonl")); parser.add_argument("--small", action="store_true", help="a tiny model, for a try without a GPU")
    args = parser.parse_args()
    print(json.dumps(keep(f"correct-{args.model}", main(args))))
