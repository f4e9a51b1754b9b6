"""Kills a run at random moments until one ends whole, and compares its adapter, byte for byte, with that of a run nobody touched.

    python .ci/kill_and_resume.py [kills] [seed]

Each kill is SIGKILL to the notebook's processes, at a moment drawn between its first step and its end, checkpoints being written at every step; half of them strike just when
a checkpoint appears. One checkpoint is damaged by hand on the way. Then a run that its user stops, whose base and data lie under the user's home: hiding that path
changes checkpoints, which must be gone on from all the same. In the end it is repeated.
"""
import json, os, random, shutil, signal, subprocess, sys, tempfile, time
from contextlib import suppress
from pathlib import Path

import psutil
from descgen.model import tiny_model
from descgen.files import load_manifest

kills, seed = (int(a) for a in [*sys.argv[1:], *("8", "42")[len(sys.argv) - 1:]])
print(f"seed {seed}", flush=True)
dice, tmp = random.Random(seed), Path(tempfile.mkdtemp())
settings = dict(model_id=tiny_model(tmp/"tiny"), data_path="data/sample.jsonl", max_steps=40, warmup_steps=2, per_device_train_batch_size=2,
    gradient_accumulation_steps=1, max_length=128, learning_rate=1e-2, eval_steps=10, save_steps=1, n_titles=0, max_new_tokens=4, lora_dropout=0.1, keep_best=True)

def start(folder):
    "A run through Papermill"
    folder.mkdir(exist_ok=True)
    (folder/"p.json").write_text(json.dumps({**settings, "output_dir": str(folder)})) # JSON is YAML
    return subprocess.Popen(["papermill", "fine_tune_llama3.ipynb", str(folder/"out.ipynb"), "-f", str(folder/"p.json"), "--log-output", "--no-progress-bar"],
        stdout=open(folder/"log", "a"), stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})

def newest(folder): return max((int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*")), default=0)

def kill(run):
    "SIGKILL to a process and to all that it started, and wait until they are gone: the notebook's kernel would live on for a second, and write"
    processes = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
    for process in processes:
        with suppress(psutil.NoSuchProcess): process.kill()
    psutil.wait_procs(processes)
    run.wait()

def strike(folder):
    "Start the run, kill it somewhere after its next steps; True if it ended first"
    run, before = start(folder), newest(folder)
    goal = before + dice.randint(1, 6)
    while run.poll() is None and newest(folder) < goal: time.sleep(0.002)
    time.sleep(dice.choice([0, dice.random()*0.3]))
    if run.poll() is not None: return True
    kill(run)
    print(f"killed at checkpoint {newest(folder)}", flush=True)

def descgen(*words):
    "A command of a user whose home the folder is, and who can stop it"
    return subprocess.Popen(["descgen", *words, "--root", str(tmp/"runs")], env={**os.environ, "HOME": str(tmp), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

def stop_and_resume():
    "The hash of an adapter whose run was stopped once, and what is said of its repetition"
    (tmp/"p.yaml").write_text(json.dumps({**settings, "data_path": str(shutil.copy(settings["data_path"], tmp/"rows.jsonl"))}))
    run = descgen("run", "-f", str(tmp/"p.yaml"))
    while run.poll() is None and max(map(newest, tmp.glob("runs/2*")), default=0) < 4: time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    said, (folder,) = run.communicate()[0], tmp.glob("runs/2*")
    record = load_manifest(folder)
    assert record["state"] == "interrupted" and any(name.startswith("checkpoint-") for name in record["cleared"]) and f"descgen resume {folder.name}" in said, said[-2000:]
    assert record.keys() >= {"plan", "data_sha256", "model", "code"}, "the manifest of a run that did not end does not say what it was"
    said = descgen("resume", folder.name).communicate()[0]
    assert "Resuming from checkpoint" in said, said[-2000:]
    return load_manifest(folder)["adapter_sha256"], descgen("repeat", "latest").communicate()[0]

whole, struck = tmp/"whole", tmp/"struck"
assert start(whole).wait() == 0, (whole/"log").read_text()[-2000:]
for n in range(kills):
    if strike(struck): break
    if n == 1: # somebody, or the disk, changes a byte
        weights = max(struck.glob("checkpoint-*/adapter_model.safetensors"), key=lambda p: int(p.parent.name.split("-")[1])) # the newest that was written so far
        weights.write_bytes(weights.read_bytes()[:-1] + b"!")
assert start(struck).wait() == 0, (struck/"log").read_text()[-2000:]
first, second = (load_manifest(f)["adapter_sha256"] for f in (whole, struck))
log = (struck/"log").read_text()
assert "renamed to damaged-checkpoint" in log, "the damaged checkpoint was not noticed"
assert first == second, f"the interrupted run ended with another adapter: {first} and {second}"
stopped, repeated = stop_and_resume()
assert first == stopped, f"the stopped run ended with another adapter: {first} and {stopped}"
assert "byte for byte that of" in repeated and first in repeated, repeated[-2000:]
print(f"{log.count('Resuming from checkpoint')} resumed runs after {n + 1} kills, and one that its user stopped, ended with the bytes of an uninterrupted one: {first}")
shutil.rmtree(tmp)
