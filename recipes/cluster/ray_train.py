"""Train one recipe with Ray, from the project's folder, which all machines see:

    python recipes/cluster/ray_train.py recipes/best.yaml --workers 8

The same command again continues from the last checkpoint. It needs `pip install "ray[train]"`.
"""
import argparse
from pathlib import Path

import torch, yaml
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

def train_worker(config):
    "One process of the training"
    import os
    os.chdir(config["folder"])
    from descgen.processes import train_recipe
    train_recipe(config["values"])

parser = argparse.ArgumentParser(description="Train one recipe with Ray")
parser.add_argument("recipes", nargs="+", type=Path, help="files of parameters; a later one overrides")
parser.add_argument("--workers", type=int, default=2, help="number of processes, one per GPU")
words, values = parser.parse_args(), {}
for path in words.recipes:
    values |= yaml.safe_load(path.read_text(encoding="utf-8"))
gpu = torch.cuda.is_available()
TorchTrainer(train_worker,
    train_loop_config={"values": values, "folder": str(Path.cwd())},
    torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
    scaling_config=ScalingConfig(num_workers=words.workers, use_gpu=gpu),
    run_config=RunConfig(failure_config=FailureConfig(max_failures=0))).fit()
