"""Runs killed at random moments: the list of runs stays whole, every file stands whole, and a planted secret is in none of them.

    python .ci/kill_runs.py 30 SEED
"""
import json, os, random, signal, subprocess, sys, tempfile, time
from pathlib import Path

import nbformat

from descgen.runs import list_runs

times, seed = int(sys.argv[1]), int(sys.argv[2])
dice, tmp, secret = random.Random(seed), Path(tempfile.mkdtemp()), "planted-value-that-must-not-stay"
root = tmp/"runs"
cells = ['output_dir = ""', "import os, time\nprint(os.environ['PLANTED_TOKEN']); time.sleep(1)",
         "from descgen.files import update_manifest\nupdate_manifest(output_dir, state='finished')"]
book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c, metadata={"tags": ["parameters"]} if not i else {}) for i, c in enumerate(cells)])
book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
nbformat.write(book, tmp/"book.ipynb")
start = f"from descgen.runs import create_run, execute; execute(create_run({{}}, 'killed', {str(root)!r}), {{}}, {str(tmp/'book.ipynb')!r})"

def run(): return subprocess.Popen([sys.executable, "-c", start], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"PLANTED_TOKEN": secret})

begin = time.time()
if run().wait(): sys.exit("A run that nobody killed did not end")
whole, states = time.time() - begin, {}
for i in range(times):
    process = run()
    time.sleep(dice.uniform(0, 1.1*whole))
    try: os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError: pass
    process.wait()
    for row in list_runs(root):
        if row["state"] not in ("finished", "interrupted"): sys.exit(f"After {i + 1} kills (seed {seed}) {row['id']} is {row['state']}: {row['why']}")
for row in list_runs(root): states[row["state"]] = states.get(row["state"], 0) + 1 # without `latest`, which is another name of one
for f in (f for f in root.rglob("*") if f.is_file()):
    if secret.encode() in f.read_bytes(): sys.exit(f"{f.relative_to(root)} holds the secret (seed {seed})")
    if not f.name.startswith("."): json.loads(f.read_text(encoding="utf-8")) # manifests and notebooks; a name with a dot is of a file that was not ready
print(f"{times} kills at random moments of {whole:.1f} s (seed {seed}): {', '.join(f'{n} {s}' for s, n in sorted(states.items()))}; every manifest whole")
