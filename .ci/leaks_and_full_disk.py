"""Two things that must not happen to the real notebook's runs: a secret stays in a file, and a full disk takes an earlier run with it.

    python .ci/leaks_and_full_disk.py

The secret stands in the environment, is printed by a cell, is in a traceback, and is given as a parameter. The full disk is a file system of a few megabytes, which needs Linux with user namespaces.
"""
import hashlib, json, os, shutil, subprocess, sys, tempfile
from pathlib import Path

import nbformat
from descgen.model import tiny_model
from descgen.runs import list_runs

SECRET, tmp = "planted-value-that-must-not-stay", Path(tempfile.mkdtemp())
SMALL = dict(model_id=tiny_model(tmp/"tiny"), data_path="data/sample.jsonl", max_steps=6, warmup_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=1, max_length=128, eval_steps=6,
    save_steps=2, n_titles=1, max_new_tokens=4, eval_rows=4)
(tmp/"small.yaml").write_text(json.dumps(SMALL)) # JSON is YAML

def descgen(*words, notebook="fine_tune_llama3.ipynb", root=tmp/"runs", before=()):
    "What the command says, and how it ends"
    env = os.environ | {"HF_TOKEN": SECRET, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*before, sys.executable, "-c", "from descgen.cli import app; app()", *words, "--root", root, "--notebook", notebook], env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr

def holding(folder): return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]

def leaky():
    "The real notebook, whose second cell prints the secret and whose last one fails with it"
    book = nbformat.read("fine_tune_llama3.ipynb", 4)
    at = next(i for i, c in enumerate(book.cells) if "environment_info()" in c.source)
    book.cells[at].source += "\nimport os, sys\nprint('token', os.environ['HF_TOKEN']); print(os.environ['HF_TOKEN'], file=sys.stderr)\nPath(recipe.output_dir, 'my.log').write_text(os.environ['HF_TOKEN'])"
    book.cells[-1].source += "\nraise RuntimeError('refused ' + os.environ['HF_TOKEN'])"
    nbformat.write(book, tmp/"leaky.ipynb")
    return tmp/"leaky.ipynb"

code, said = descgen("run", "-f", str(tmp/"small.yaml"), "-p", "title", f"say {SECRET}")
if code != 1 or "looks like a secret" not in said or SECRET in said or (tmp/"runs").exists(): sys.exit(f"The secret as a parameter was not refused:\n{said}")
code, said = descgen("run", "-f", str(tmp/"small.yaml"), notebook=leaky())
run, = list_runs(tmp/"runs")
if code != 1 or run["state"] != "failed": sys.exit(f"The run should have failed in its last cell:\n{said[-3000:]}")
text = next((tmp/"runs").glob("[!.]*/failed.ipynb")).read_text(encoding="utf-8")
if text.count("[hidden]") < 3: sys.exit(f"The secret was not printed where it should have been hidden: {text.count('[hidden]')} times")
if held := holding(tmp/"runs"): sys.exit(f"The secret stands in {', '.join(held)}")
print(f"A secret as parameter is refused; from environment, output, file and traceback it was hidden {text.count('[hidden]')} times in the notebook and stands in none of {sum(p.is_file() for p in (tmp/'runs').rglob('*'))} files")

full = tmp/"full"
full.mkdir()
def sums(folder): return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}
script = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=12m none "{full}" && mkdir -p "{full}/runs" && cp -r "$0" "{full}/runs/earlier" && "$@"; code=$?; cp -r "{full}/runs" "{tmp}/kept"; exit $code', str(next((tmp/"runs").glob("[!.]*")))]
if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode: sys.exit("A small file system cannot be mounted here: the full disk was not tried")
earlier = sums(next((tmp/"runs").glob("[!.]*")))
code, said = descgen("run", "-f", str(tmp/"small.yaml"), root=full/"runs", before=script)
rows = list_runs(tmp/"kept")
if [h for h in sums(tmp/"kept"/"earlier").values()] != list(earlier.values()): sys.exit("The full disk changed an earlier run")
if code != 1 or "No space left on device" not in said or "descgen resume" not in said: sys.exit(f"The full disk was not told of:\n{said[-3000:]}")
if len(rows) != 2 or any(r["state"] == "damaged" for r in rows): sys.exit(f"The list is not whole: {rows}")
print(f"A full disk: {said.strip().splitlines()[-1].replace(str(tmp), '…')}; the earlier run is as it was, the new one is {rows[0]['state']}")
shutil.rmtree(tmp)
