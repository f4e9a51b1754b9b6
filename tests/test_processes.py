"""Two processes train what one trains; a process that disagrees, does not start or is killed ends the run with a message."""
import json, socket, subprocess, sys, time
from contextlib import suppress

import psutil, pytest

from conftest import NOTEBOOK, ROOT, environment, start_descgen, write_recipe
from descgen.files import load_manifest

pytestmark = pytest.mark.multi
SCRIPT = str(ROOT/"tests"/"process_script.py")

@pytest.fixture
def recipe(small):
    "An epoch whose number of packs is not a multiple of the packs of a step"
    import unsloth, torch
    from descgen.recipe import check_recipe, read_defaults
    torch.set_num_threads(1)
    changed = dict(max_rows=45, max_steps=-1, num_train_epochs=1, per_device_train_batch_size=2,
        gradient_accumulation_steps=4, loss_on="completion", bf16=False, lora_dropout=0.0, eval_steps=2)
    return check_recipe(read_defaults(NOTEBOOK) | small | changed)

@pytest.fixture
def train_run(recipe, tmp_path, monkeypatch):
    "A function that trains a run in `n` processes: its log, model and packs"
    from descgen import processes
    from descgen.recipe import resolve
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    usual_command = processes.launch_command
    def start_script(*args):
        *words, _, _, folder, timeout = usual_command(*args)
        return [*words, SCRIPT, folder, timeout]
    monkeypatch.setattr(processes, "launch_command", start_script)
    def train(n, mode="record", **options):
        monkeypatch.setenv("TEST_MODE", mode)
        own = resolve(recipe.model_copy(update={"output_dir": str(tmp_path/str(n)), "num_processes": n}))
        data = processes.load_data(own.data_path, own)
        processes.prepare_output_dir(own, own, data.file_key)
        model, tokenizer = processes._load_model_with_adapter(own)
        parts = processes.template_parts(tokenizer)
        packs = processes.Packs(data.train, tokenizer, parts, own.max_length, own.loss_on)
        if n > 1: return processes.train_in_processes(model, packs, own, **options), model, packs
        tests = processes._encode_test_rows(data, tokenizer, parts, own, None)
        return processes.train(model, tokenizer, packs, own, tests), model, packs
    return train

def values(history, name):
    "The values of one name in a log"
    return [float(entry[name]) for entry in history if name in entry]

def largest_difference(model, other):
    "Between the weights of two adapters"
    pairs = zip(model.named_parameters(), other.named_parameters(), strict=True)
    return max((p - q).abs().max().item() for (name, p), (_, q) in pairs if "lora_" in name)

def packs_of_steps(folder, size):
    "The packs with labels that the processes read in each step, `size` packs per process"
    read = [json.loads(path.read_text()) for path in sorted(folder.glob("read-*.json"))]
    n_steps = -(-len(read[0])*len(read[0][0])//size)
    flat = [[pack for batch in batches for pack in batch] for batches in read]
    steps = [[pack for packs in flat for pack in packs[start*size:(start + 1)*size]] for start in range(n_steps)]
    return [sorted(pack for pack in step if pack != [0, 0]) for step in steps]

def test_two_processes_train_what_one_trains(train_run, recipe, tmp_path):
    one, model, packs = train_run(1)
    two, other, _ = train_run(2)
    total, step = packs.per_epoch(), 8
    assert total % step, "choose another number of rows"
    differences = [abs(a - b) for name in ("loss", "test_loss")
                   for a, b in zip(values(one, name), values(two, name), strict=True)]
    print("largest differences:", max(differences), largest_difference(model, other))
    assert len(values(one, "loss")) == -(-total//step) and max(differences) < 1e-3
    assert largest_difference(model, other) < 1e-3
    expected = [sorted(packs[i]["input_ids"] for i in range(start, min(start + step, total)))
                for start in range(0, total, step)]
    assert packs_of_steps(tmp_path/"2", step//2) == expected

def test_disagreeing_process_is_named(train_run):
    message = "Process 1 has another recipe or data than process 0: r 8 in process 1, 16 in process 0"
    with pytest.raises(ChildProcessError, match=message):
        train_run(2, "disagree")

def test_process_that_does_not_start_is_a_timeout(train_run):
    start = time.time()
    with pytest.raises(ChildProcessError, match="Not all of 2 processes started within 3 seconds"):
        train_run(2, "late", timeout=3)
    assert time.time() - start < 55

def process_of_rank(parent, rank):
    "The training process of a rank; None if it has not started"
    for process in psutil.Process(parent.pid).children(recursive=True):
        with suppress(psutil.Error):
            if process.environ().get("RANK") == str(rank):
                return process

def wait_for(condition, seconds=120):
    "The value of a condition as soon as it is true"
    end = time.time() + seconds
    while time.time() < end:
        if found := condition(): return found
        time.sleep(0.05)
    raise TimeoutError

def test_killed_process_ends_the_run_which_resumes(tmp_path, small):
    long = small | dict(max_steps=30, save_steps=1, eval_steps=30, n_titles=0, eval_rows=2, lora_dropout=0.0)
    root, recipe = tmp_path/"runs", write_recipe(tmp_path/"p.yaml", long)
    run = start_descgen("run", "-f", recipe, "--processes", 2, "--root", root)
    wait_for(lambda: [*root.glob("2*/checkpoint-[3-9]/seal.json")])
    killed = time.time()
    process_of_rank(run, 1).kill()
    said = run.communicate(timeout=60)[0]
    print("seconds until the run had ended:", round(time.time() - killed, 1))
    folder, = root.glob("2*")
    manifest = load_manifest(folder)
    assert run.returncode == 1 and manifest["state"] == "failed", said[-2000:]
    assert "Process 1 of 2 (counted from 0) was killed (SIGKILL)" in manifest["failed"]["error"], said[-2000:]
    assert "rank-1.log" in said and f"descgen resume {folder.name}" in said, said[-2000:]
    resumed = start_descgen("resume", folder.name, "--root", root)
    assert resumed.wait() == 0, resumed.stdout.read()[-2000:]
    manifest = load_manifest(folder)
    assert manifest["state"] == "finished" and manifest["resumed_from"].startswith("checkpoint-")

def start_machine(number, port, recipe, log, mode):
    "Start one of two machines with one process each, which meet at a port of this machine"
    options = ["--num_machines", 2, "--machine_rank", number, "--num_processes", 2,
        "--main_process_ip", "127.0.0.1", "--main_process_port", port,
        "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *options, SCRIPT, recipe]
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment(TEST_MODE=mode), stdout=log, stderr=log)

def train_on_two_machines(folder, recipe, mode="record"):
    "Exit statuses, what the machines print, and the manifest"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(folder/"log", "w") as log:
        machines = [start_machine(number, port, recipe, log, mode) for number in range(2)]
        statuses = [machine.wait(120) for machine in machines]
    return statuses, (folder/"log").read_text(), load_manifest(folder/"run")

def test_job_on_two_machines_that_failed_says_why_and_resumes(tmp_path, small):
    recipe = write_recipe(tmp_path/"p.yaml", small | {"output_dir": str(tmp_path/"run")})
    statuses, said, manifest = train_on_two_machines(tmp_path, recipe, "raise")
    assert statuses == [1, 1] and manifest["state"] == "failed", said[-2000:]
    assert manifest["failed"]["error"] == "ValueError: no such pack (process 1 of 2, counted from 0)"
    statuses, said, manifest = train_on_two_machines(tmp_path, recipe)
    assert statuses == [0, 0] and "Resuming from checkpoint-2" in said, said[-2000:]
    assert manifest["state"] == "finished" and "failed" not in manifest
    assert len(values(manifest["history"], "loss")) == 6
    assert (tmp_path/"run"/"adapter"/"adapter_model.safetensors").is_file()
    assert said.count("training: 100%") == 1, "only process 0 shows the progress"
