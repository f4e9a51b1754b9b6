"Fails unless a finished run's notebook holds no error, its manifest is as documented, its adapter loads and describes, its test loss fell, and its evaluation calls loss and chrF better than the base model's."
import html, json, sys
from pathlib import Path

import nbformat
from descgen.inference import describe, load_adapter
from descgen.files import load_manifest
from descgen.metrics import BASE
from descgen.manifest import MANIFEST_ENTRIES, read_manifest
from descgen.runs import changed_files
from descgen.report import outcome, verdict

folder = Path(sys.argv[1])
outputs = [o for c in nbformat.read(folder/"notebook.ipynb", 4).cells for o in c.get("outputs", [])]
assert outputs and not [o for o in outputs if o.output_type == "error"], "the executed notebook holds an error"
record = load_manifest(folder)
loss = record["test_loss"]
assert record["state"] == "finished" and loss["after"] < loss["before"], f"the test loss did not fall: {loss}"
manifest = read_manifest(folder).keys() - {"id"}
assert manifest == MANIFEST_ENTRIES.keys() - {"failed", "resumed_from", "skipped_steps"}, f"the manifest is not as its table says: {manifest ^ MANIFEST_ENTRIES.keys()}"
assert not changed_files(folder) and record["model"]["files"]["model.safetensors"], "the manifest's hashes are not those of the files"
model, tokenizer = load_adapter(folder/"adapter")
assert describe(model, tokenizer, ["Tin Whistle in D (Brass)"], sample=False, max_new_tokens=32)[0], "the adapter says nothing"
found = json.loads((folder/"evaluation.json").read_text(encoding="utf-8"))
for measure in ("loss", "chrF"): assert outcome(measure, found["scores"]["all"]["differences"][BASE][measure], found["scores"]["all"]["rows"]) == "better", f"{measure} is not better than the base model's"
page = html.unescape((folder/"report.html").read_text(encoding="utf-8"))
for line in verdict(found).splitlines(): assert line.removeprefix("- ") in page, f"the page does not say what the evaluation found: {line}"
print(f"test loss {loss['before']:.3f} before, {loss['after']:.3f} after; adapter sha256 {record['adapter_sha256']}")
