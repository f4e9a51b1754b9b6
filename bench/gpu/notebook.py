"""The main notebook by Papermill, unchanged, on this card: Llama 3.2 1B's shape in 4 bits, or the embedded model.

    python bench/gpu/notebook.py llama WORK
    python bench/gpu/notebook.py embedded WORK --max-steps 60
    python bench/gpu/notebook.py embedded WORK --max-steps 60 --fp16    # as on a card without bf16; then `descgen evaluate` on what it left
"""
import argparse, json, subprocess, sys, time
from pathlib import Path

from measure import KEPT, ROOT, keep
from models import model_folder

def run(args):
    "Execute it and read its record"
    import papermill
    name = f"{args.model}-fp16" if args.fp16 else args.model
    folder = args.work/f"run-{name}"
    given = dict(model_id=str(model_folder(args.model, args.work, args.small)), data_path=str(args.rows.resolve()), output_dir=str(folder), max_steps=args.max_steps)
    if args.small: given |= dict(per_device_train_batch_size=1, gradient_accumulation_steps=1, max_length=256, max_new_tokens=8, eval_rows=4)
    if args.fp16: given |= dict(fp16=True, bf16=False)
    start = time.time()
    papermill.execute_notebook(ROOT/"fine_tune_llama3.ipynb", KEPT/f"notebook-{name}.ipynb", given, cwd=ROOT, progress_bar=False, log_output=True)
    record = json.loads((folder/"manifest.json").read_text(encoding="utf-8"))
    named = {k: record.get(k) for k in ("state", "plan", "test_loss", "peak_memory_gb", "minutes", "skipped_steps")}
    again = subprocess.run([sys.executable, "-c", "from descgen.cli import app; app()", "evaluate", "--adapter", folder/"adapter", "--json"], capture_output=True, text=True, cwd=ROOT)
    if again.returncode: raise RuntimeError(again.stderr[-2000:])
    named["test loss of `descgen evaluate`"] = json.loads(again.stdout)["scores"]["all"]["values"]["fine_tuned"]["loss"]["value"]
    return named | {"seconds": time.time() - start, "adapter": sorted(p.name for p in (folder/"adapter").iterdir()), "fingerprint": record.get("fingerprint"), "last losses": record["history"][-4:]}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=["llama", "embedded"]); parser.add_argument("work", type=Path); parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--rows", type=Path, default=Path("data/sample.jsonl")); parser.add_argument("--small", action="store_true", help="a tiny model, for a try without a GPU")
    parser.add_argument("--fp16", action="store_true")
    args = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    print(json.dumps(keep(f"notebook-{args.model}{'-fp16' if args.fp16 else ''}", run(args))))
