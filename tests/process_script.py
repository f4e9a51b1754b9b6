"Train as one of several processes; TEST_MODE makes process 1 disagree, start late, raise an error or be killed."
import json, os, signal, sys, time
from pathlib import Path

import descgen.train
from descgen import processes

mode, rank, read = os.environ["TEST_MODE"], os.environ["RANK"], []
usual_collate, usual_check = descgen.train.collate, processes.check_recipe

def recording_collate(packs):
    "A batch; its packs are recorded"
    read.append([pack["input_ids"] for pack in packs])
    if rank == "1": fail()
    return usual_collate(packs)

def fail():
    "End this process in the fifth batch, after the checkpoint of step 2"
    if len(read) == 5 and mode == "raise": raise ValueError("no such pack")
    if len(read) == 5 and mode == "kill": os.kill(os.getpid(), signal.SIGKILL)

def check_other_recipe(values):
    "A recipe with another rank of the adapter"
    return usual_check(values | {"r": 8})

descgen.train.collate = recording_collate
if mode == "disagree" and rank == "1":
    processes.check_recipe = check_other_recipe
if mode == "late" and rank == "1":
    time.sleep(60)
processes.main(sys.argv[1:])
path = Path(sys.argv[1]) # of a folder, or of a recipe in it
folder = path if path.is_dir() else path.parent
(folder/f"read-{rank}.json").write_text(json.dumps(read))
