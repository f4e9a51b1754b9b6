"""Train a recipe as one of several processes that share the model, in two attempts: the first one fails after its third
step, the second one resumes. Each process writes how much of the model it held, and whether it imported Unsloth."""
import json, os, sys
from pathlib import Path

import torch, yaml
from transformers import TrainerCallback

import descgen.train
from descgen import processes

class Failure(TrainerCallback):
    "Fails after the third step"
    def on_step_end(self, args, state, control, **kw):
        if state.global_step == 3: raise InterruptedError

usual_train, usual_gather, shares = processes.train, descgen.train._gather_adapter, []

def failing_train(*args):
    "Train with a failure"
    *others, callbacks = args
    return usual_train(*others, [*callbacks, Failure()])

def noting_gather(model):
    "Note the share of the model's numbers that this process holds"
    weights = list(model.parameters())
    shares.append(sum(w.to_local().numel() for w in weights)/sum(w.numel() for w in weights))
    usual_gather(model)

torch.set_num_threads(1)
path = Path(sys.argv[1])
values = yaml.safe_load(path.read_text())
processes.train = failing_train
try:
    processes.train_recipe(values)
except InterruptedError:
    processes.train, descgen.train._gather_adapter = usual_train, noting_gather
folder = processes.train_recipe(values)
(folder/f"share-{os.environ['RANK']}.json").write_text(json.dumps([shares[0], "unsloth" in sys.modules]))
