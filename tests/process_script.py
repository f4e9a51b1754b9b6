"Train as one of several processes, with a change by the variable TEST_MODE: record the packs, disagree, or start late."
import json, os, sys, time
from pathlib import Path

import descgen.train
from descgen import processes

mode, rank, read = os.environ["TEST_MODE"], os.environ["RANK"], []
usual_collate, usual_check = descgen.train.collate, processes.check_recipe

def recording_collate(packs):
    "A batch; its packs are recorded"
    read.append([pack["input_ids"] for pack in packs])
    return usual_collate(packs)

def check_other_recipe(values):
    "A recipe with another rank of the adapter"
    return usual_check(values | {"r": 8})

if mode == "record":
    descgen.train.collate = recording_collate
if mode == "disagree" and rank == "1":
    processes.check_recipe = check_other_recipe
if mode == "late" and rank == "1":
    time.sleep(60)
processes.main(sys.argv[1:])
Path(sys.argv[1], f"read-{rank}.json").write_text(json.dumps(read))
