"Train as one of several processes; TEST_MODE makes process 1 disagree, start late or raise an error."
import json, os, sys, time
from pathlib import Path

import descgen.train
from descgen import processes

mode, rank, read = os.environ["TEST_MODE"], os.environ["RANK"], []
folder = Path(sys.argv[1]).parent # of the recipe or of the run's folder
usual_collate, usual_check = descgen.train.collate, processes.check_recipe

def recording_collate(packs):
    "A batch; its packs are recorded"
    read.append([pack["input_ids"] for pack in packs])
    (folder/f"read-{mode}-{rank}.json").write_text(json.dumps(read))
    if mode == "raise" and rank == "1" and len(read) == 5: # after the checkpoint of step 1, which has two batches
        raise ValueError("no such pack")
    return usual_collate(packs)

def check_other_recipe(values):
    "A recipe with another rank of the adapter"
    return usual_check(values | {"r": 8})

descgen.train.collate = recording_collate
if mode == "disagree" and rank == "1":
    processes.check_recipe = check_other_recipe
if mode == "late" and rank == "1":
    time.sleep(60)
processes.main(sys.argv[1:])
