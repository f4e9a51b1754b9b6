"""No secret stays in a file of a run, and a full disk harms no earlier run."""
import hashlib, json, subprocess, sys
from pathlib import Path

import nbformat, pytest

from conftest import NOTEBOOK, ROOT, environment, write_recipe
from descgen.runs import list_runs

pytestmark = pytest.mark.slow
SECRET = "planted-value-that-must-not-stay"

def descgen(*words, before=()):
    "Exit code and output of a descgen command whose environment holds a secret"
    command = [*before, sys.executable, "-c", "from descgen.cli import app; app()", *words]
    done = subprocess.run(list(map(str, command)), cwd=ROOT,
        env=environment(HF_TOKEN=SECRET), capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr

def write_leaky_notebook(path):
    "The real notebook, with a cell that prints the secret and writes it into a file, and a last one that fails with it"
    book = nbformat.read(NOTEBOOK, 4)
    cell = next(c for c in book.cells if "run.begin(data)" in c.source)
    cell.source += """
import os, sys
print('token', os.environ['HF_TOKEN'])
print(os.environ['HF_TOKEN'], file=sys.stderr)
run.write('my.log', os.environ['HF_TOKEN'])"""
    book.cells[-1].source += "\nraise RuntimeError('refused ' + os.environ['HF_TOKEN'])"
    nbformat.write(book, path)
    return path

@pytest.fixture(scope="module")
def leaky_run(tmp_path_factory, small):
    "The folder of runs with one run of the leaky notebook, and its recipe"
    tmp = tmp_path_factory.mktemp("leaky")
    recipe = write_recipe(tmp/"small.yaml", small)
    code, said = descgen("run", "-f", recipe, "--root", tmp/"runs",
        "--notebook", write_leaky_notebook(tmp/"leaky.ipynb"))
    assert code == 1, said[-3000:]
    return tmp/"runs", recipe

def test_secret_as_parameter_is_refused(tmp_path, small):
    recipe = write_recipe(tmp_path/"small.yaml", small)
    code, said = descgen("run", "-f", recipe,
        "--root", tmp_path/"runs", "-p", "title", f"say {SECRET}")
    assert code == 1 and "looks like a secret" in said
    assert SECRET not in said and not (tmp_path/"runs").exists()

def test_no_secret_in_any_file(leaky_run):
    root, _ = leaky_run
    run, = list_runs(root)
    assert run["state"] == "failed"
    text = next(root.glob("[!.]*/failed.ipynb")).read_text(encoding="utf-8")
    assert text.count(
        "[hidden]") >= 3, "the secret was not printed where it should have been hidden"
    assert [p for p in root.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()] == []

def file_hashes(folder):
    "The hash of each file under a folder, in their order"
    return [hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()]

def test_full_disk_keeps_earlier_run(tmp_path, leaky_run):
    "A file system of twelve megabytes, mounted in a namespace of its own, holds the earlier run and fills up during the next"
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    root, recipe = leaky_run
    earlier, full, kept = next(root.glob("[!.]*")), tmp_path/"full", tmp_path/"kept"
    full.mkdir()
    script = (f'mount -t tmpfs -o size=12m none "{full}" && mkdir -p "{full}/runs" && cp -r "$0" '
              f'"{full}/runs/earlier" && "$@"; code=$?; cp -r "{full}/runs" "{kept}"; exit $code')
    code, said = descgen("run", "-f", recipe, "--root", full/"runs", "--notebook", NOTEBOOK,
        before=["unshare", "-rm", "sh", "-c", script, earlier])
    assert (
        code == 1 and "No space left on device" in said and "descgen resume" in said), said[-3000:]
    assert file_hashes(kept/"earlier") == file_hashes(earlier)
    rows = list_runs(kept)
    assert len(rows) == 2 and not any(row["state"] == "damaged" for row in rows), rows
