"""The main notebook by Papermill, unchanged, on this card, and `descgen evaluate` on its adapter.

    python -m bench gpu-notebook llama WORK
    python -m bench gpu-notebook embedded WORK --max-steps 60
    python -m bench gpu-notebook embedded WORK --max-steps 60 --fp16    # as on a card without bf16
"""
import json
import subprocess
import sys
import time

from ..markdown import circumstances, markdown_table
from ..measure import NOTEBOOK, ROOT, save_result
from .card import CARD, GPU_SCRATCH, add_model_options
from .models import model_folder

def add_options(parser):
    add_model_options(parser)
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--fp16", action="store_true")

def make_parameters(args, folder):
    "The parameters that Papermill injects"
    given = dict(model_id=str(model_folder(args.model, args.work, args.small)),
                 data_path=str(args.rows.resolve()),
                 output_dir=str(folder), max_steps=args.max_steps)
    if args.small:
        given |= dict(per_device_train_batch_size=1, gradient_accumulation_steps=1,
                      max_length=256, max_new_tokens=8,
                      eval_rows=4)
    if args.fp16:
        given |= dict(fp16=True, bf16=False)
    return given

def evaluate_again(adapter):
    "The fine-tuned model's test loss by `descgen evaluate`"
    from descgen.metrics import TUNED
    words = ["evaluate", "--adapter", str(adapter), "--json"]
    command = [sys.executable, "-c", "from descgen.cli import app; app()", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout)["scores"]["all"]["values"][TUNED]["loss"]["value"]

def run(args):
    import papermill
    from descgen.manifest import read_manifest
    variant = args.model + ("-fp16" if args.fp16 else "") + ("-small" if args.small else "")
    folder = args.work.resolve()/f"run-{variant}"
    GPU_SCRATCH.mkdir(parents=True, exist_ok=True)
    start = time.time()
    papermill.execute_notebook(NOTEBOOK, GPU_SCRATCH/f"notebook-{variant}.ipynb",
                               make_parameters(args, folder),
                               cwd=ROOT, progress_bar=False, log_output=True)
    seconds = time.time() - start
    manifest = read_manifest(folder)
    summary = {
        "steps": manifest.plan["steps"], "tokens": manifest.plan["tokens"], "seconds": seconds,
        "memory_gb": manifest.peak_memory_gb, "loss_before": manifest.test_loss["before"],
        "loss_after": manifest.test_loss["after"],
        "loss_evaluated_again": evaluate_again(folder/"adapter")}
    named = {"state", "plan", "test_loss", "peak_memory_gb",
             "minutes", "skipped_steps", "fingerprint"}
    raw = manifest.model_dump(include=named) | {"last_losses": manifest.history[-4:]}
    save_result(args.results, f"gpu-notebook-{variant}", summary, raw)

def tables(read):
    rows, about = [], None
    for variant in ("llama", "embedded", "embedded-fp16"):
        record = read(f"gpu-notebook-{variant}")
        if not record:
            continue
        s, about = record["summary"], about or circumstances(record, *CARD)
        rows.append([variant, s["steps"], f"{s['tokens']:,}",
                     f"{s['seconds']:.0f} s", f"{s['memory_gb']:.1f} GB",
                     f"{s['loss_before']:.3f} → {s['loss_after']:.3f}"])
    if not rows:
        return {}
    head = ["model", "steps", "tokens", "time", "peak memory", "test loss"]
    return {"gpu-notebook": [about, "", *markdown_table(head, rows)]}
