"The processes that make packs end with the training, also if it is killed."
import subprocess
import sys
import time

import psutil
import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import os, signal, sys
import psutil
from datasets import Dataset
from transformers import AutoTokenizer
from descgen.formatting import template_parts
from descgen.model import embedded_model
from descgen.packing import Packs
tokenizer = AutoTokenizer.from_pretrained(embedded_model())
rows = [{"title": f"Lamp {i}", "content": f"A lamp with {i} lights."} for i in range(40)]
packs = Packs(Dataset.from_list(rows), tokenizer, template_parts(tokenizer), 256, block_rows=10)
with packs.in_processes() as started:
    first = [packs[i] for i in range(4)]
    started.result()
    packs._submit(1).result()
    with open(sys.argv[1], "w") as f: print(*(child.pid for child in psutil.Process().children()), file=f)
    os.kill(os.getpid(), signal.SIGKILL)
"""

def test_processes_end_if_the_training_is_killed(tmp_path):
    script, pids = tmp_path/"script.py", tmp_path/"pids"
    script.write_text(SCRIPT, encoding="utf-8")
    with open(tmp_path/"log", "w") as log: # the processes would keep a pipe open
        done = subprocess.run([sys.executable, script, pids], stdout=log, stderr=log, timeout=120)
    assert done.returncode == -9, (tmp_path/"log").read_text()[-2000:]
    children = [int(pid) for pid in pids.read_text().split()]
    assert len(children) >= 2
    end = time.monotonic() + 30
    while time.monotonic() < end and any(map(psutil.pid_exists, children)):
        time.sleep(0.5)
    assert not [pid for pid in children if psutil.pid_exists(pid)]
