"""An interrupted run ends with the bytes of an uninterrupted one, wherever it was killed."""
import json, shutil, signal, subprocess, time
from contextlib import suppress

import psutil, pytest

from conftest import NOTEBOOK, ROOT, environment, start_descgen, write_recipe
from descgen.files import load_manifest

pytestmark = pytest.mark.slow
KILLS = 5

@pytest.fixture
def checkpointed(small):
    "A run of forty steps that writes a checkpoint at every step"
    return small | dict(max_steps=40, warmup_steps=2, eval_steps=10,
        save_steps=1, n_titles=0, lora_dropout=0.1, keep_best=True)

def start_papermill(folder, parameters):
    "Execute the notebook into a folder"
    folder.mkdir(exist_ok=True)
    recipe = write_recipe(folder/"p.json", parameters | {"output_dir": str(folder)})
    command = ["papermill", NOTEBOOK, folder/"out.ipynb", "-f",
               recipe, "--log-output", "--no-progress-bar"]
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment(),
        stdout=open(folder/"log", "a"), stderr=subprocess.STDOUT)

def last_step(folder):
    "The step of the last checkpoint"
    return max((int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*")), default=0)

def kill_tree(process):
    "Kill a process and all that it started: the notebook's kernel would live on for a second, and write"
    processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in processes:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(processes)
    process.wait()

def run_until_killed(folder, parameters, rng):
    "Start a run and kill it after some more steps, half of the times just when a checkpoint appears; True if it ended first"
    run, goal = start_papermill(folder, parameters), last_step(folder) + rng.randint(1, 6)
    while run.poll() is None and last_step(folder) < goal:
        time.sleep(0.002)
    time.sleep(rng.choice([0, rng.random()*0.3]))
    if run.poll() is not None:
        return True
    kill_tree(run)
    return False

def damage_newest_checkpoint(folder):
    "Change one byte of the newest weights"
    weights = max(folder.glob("checkpoint-*/adapter_model.safetensors"),
        key=lambda p: int(p.parent.name.split("-")[1]))
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")

def test_resume_is_byte_identical(tmp_path, checkpointed, rng):
    whole, killed = tmp_path/"whole", tmp_path/"killed"
    assert start_papermill(whole, checkpointed).wait() == 0, (whole/"log").read_text()[-2000:]
    for n in range(KILLS):
        if run_until_killed(killed, checkpointed, rng):
            break
        if n == 1:
            damage_newest_checkpoint(killed)
    assert start_papermill(killed, checkpointed).wait() == 0, (killed/"log").read_text()[-2000:]
    assert [*killed.glob("damaged-checkpoint-*")], "the damaged checkpoint was not noticed"
    assert load_manifest(whole)["adapter_sha256"] == load_manifest(killed)["adapter_sha256"]

def test_interrupted_run_is_resumed_and_repeated(tmp_path, checkpointed):
    "The base and the data lie under the user's home: hiding that path changes checkpoints, which must be resumed all the same"
    rows = shutil.copy(checkpointed["data_path"], tmp_path/"rows.jsonl")
    base = shutil.copytree(checkpointed["model_id"], tmp_path/"base")
    recipe = write_recipe(
        tmp_path/"p.yaml", checkpointed | {"data_path": str(rows), "model_id": str(base)})
    home = {"HOME": str(tmp_path)}
    whole = start_descgen("run", "-f", recipe, "--root", tmp_path/"whole", **home)
    assert whole.wait() == 0, whole.stdout.read()[-2000:]
    run = start_descgen("run", "-f", recipe, "--root", tmp_path/"runs", **home)
    while run.poll() is None and max(map(last_step, tmp_path.glob("runs/2*")), default=0) < 4:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    said = run.communicate()[0]
    folder, = tmp_path.glob("runs/2*")
    manifest = load_manifest(folder)
    assert (manifest["state"] == "interrupted"
            and f"descgen resume {folder.name}" in said), said[-2000:]
    assert any(name.startswith("checkpoint-") for name in manifest["cleared"])
    assert manifest.keys() >= {"plan", "data_sha256", "model", "code"}
    resumed = start_descgen("resume", folder.name, "--root", tmp_path/"runs", **home)
    assert resumed.wait() == 0, resumed.stdout.read()[-2000:]
    expected = load_manifest(next(tmp_path.glob("whole/2*")))["adapter_sha256"]
    assert load_manifest(folder)["adapter_sha256"] == expected
    assert load_manifest(folder)["resumed_from"].startswith("checkpoint-")
    repeated = start_descgen("repeat", "latest", "--root", tmp_path/"runs", **home).communicate()[0]
    assert "byte for byte" in repeated and expected in repeated, repeated[-2000:]
