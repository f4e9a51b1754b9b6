"""The list of runs stays readable, and every file complete, whenever a run is killed."""
import json, os, signal, subprocess, sys, time
from collections import Counter

import nbformat, pytest

from conftest import ROOT, environment
from descgen.runs import list_runs

pytestmark = pytest.mark.slow
KILLS, SECRET = 15, "planted-value-that-must-not-stay"
CELLS = ['output_dir = ""', "import os, time\nprint(os.environ['PLANTED_TOKEN']); time.sleep(1)",
         "from descgen.files import update_manifest\nupdate_manifest(output_dir, state='finished')"]

@pytest.fixture
def start_run(tmp_path):
    "A function that starts a run of a notebook of three cells, which prints a secret"
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(c, metadata={} if i else {"tags": ["parameters"]})
               for i, c in enumerate(CELLS)])
    book.metadata["kernelspec"] = {"name": "python3",
        "display_name": "Python 3", "language": "python"}
    nbformat.write(book, tmp_path/"book.ipynb")
    code = "import sys; from descgen.execute import execute; from descgen.runs import create_run; execute(create_run({}, 'killed', sys.argv[1]), {}, sys.argv[2])"
    command = [sys.executable, "-c", code, str(tmp_path/"runs"), str(tmp_path/"book.ipynb")]
    def start():
        return subprocess.Popen(command, cwd=ROOT, env=environment(PLANTED_TOKEN=SECRET),
            start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return start

def kill_at(process, seconds):
    "Kill a process and its group after some seconds, if it still runs"
    time.sleep(seconds)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()

def test_registry_survives_kill(tmp_path, start_run, rng):
    root, begin = tmp_path/"runs", time.time()
    assert start_run().wait() == 0
    length = time.time() - begin
    for _ in range(KILLS):
        kill_at(start_run(), rng.uniform(0, 1.1*length))
        states = Counter(row["state"] for row in list_runs(root))
        assert not states.keys() - {"finished", "interrupted"}, list_runs(root)
    for path in (p for p in root.rglob("*") if p.is_file()):
        assert SECRET.encode() not in path.read_bytes(), path
        if not path.name.startswith("."): # such a file was not complete yet
            json.loads(path.read_text(encoding="utf-8"))
