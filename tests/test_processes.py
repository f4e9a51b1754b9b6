"""Two processes train what one trains, also after an error or a kill; a process that does not fit is named."""
import json, re, socket, subprocess, sys, time
from contextlib import suppress

import psutil, pytest
from safetensors.torch import load_file

from conftest import NOTEBOOK, ROOT, environment, start_descgen, write_recipe
from descgen.files import load_manifest

SCRIPT = str(ROOT/"tests"/"process_script.py")
PACKS_PER_STEP = 8

@pytest.fixture(scope="module")
def recipe(small):
    "An epoch whose number of packs is not a multiple of the packs of a step"
    import unsloth, torch
    from descgen.recipe import check_recipe, read_defaults
    torch.set_num_threads(1)
    changed = dict(max_rows=45, max_steps=-1, num_train_epochs=1, per_device_train_batch_size=2,
        gradient_accumulation_steps=4, loss_on="completion", bf16=False, lora_dropout=0.0, eval_steps=2, save_steps=1)
    return check_recipe(read_defaults(NOTEBOOK) | small | changed)

# Runs in this process and in two others

def begin_run(recipe, folder, n):
    "A run that has taken its folder, its model with adapter, tokenizer, packs and test examples"
    from descgen import processes
    from descgen.run import Run
    run = Run(recipe.model_dump() | {"output_dir": str(folder), "num_processes": n})
    data = processes.load_data(run.recipe.data_path, run.recipe)
    run.begin(data)
    model, tokenizer = processes._load_model_with_adapter(run.recipe)
    parts = processes.template_parts(tokenizer)
    packs = processes.Packs(data.train, tokenizer, parts, run.recipe.max_length, run.recipe.loss_on)
    return run, model, tokenizer, packs, processes._encode_test_rows(data, tokenizer, parts, run.recipe, None)

def use_script(patch, mode, timeout):
    "Let processes that this one starts run the script, with a mode and a time to wait in seconds"
    from descgen import processes
    usual_command = processes.launch_command
    def start_script(*args):
        *words, _, _, folder, _ = usual_command(*args)
        return [*words, SCRIPT, folder, str(timeout)]
    patch.setattr(processes, "launch_command", start_script)
    patch.setenv("PYTHONPATH", str(ROOT))
    patch.setenv("TEST_MODE", mode)

def error_of_two(recipe, folder, mode, timeout=600):
    "The error of a run in two processes"
    run, *given = begin_run(recipe, folder, 2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ChildProcessError) as error:
        use_script(patch, mode, timeout)
        run.train(*given)
    return str(error.value)

# Two machines

def start_machine(number, port, recipe, log, mode):
    "Start one of two machines with one process each, which meet at a port of this machine"
    options = ["--num_machines", 2, "--machine_rank", number, "--num_processes", 2,
        "--main_process_ip", "127.0.0.1", "--main_process_port", port,
        "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *options, SCRIPT, recipe]
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment(TEST_MODE=mode), stdout=log, stderr=log)

def train_on_two_machines(recipe, folder, mode):
    "Exit statuses, what the machines print, and the manifest"
    path = write_recipe(folder.parent/"recipe.yaml", recipe.model_dump() | {"output_dir": str(folder)})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(folder.parent/"log", "w") as log:
        machines = [start_machine(number, port, path, log, mode) for number in range(2)]
        statuses = [machine.wait(120) for machine in machines]
    return statuses, (folder.parent/"log").read_text(), load_manifest(folder)

# A training that fails and is resumed

@pytest.fixture(scope="module")
def one(recipe, tmp_path_factory):
    "Log, adapter and packs of one process"
    from descgen.train import save_adapter_weights
    folder = tmp_path_factory.mktemp("one")
    run, *given = begin_run(recipe, folder, 1)
    history = run.train(*given)
    save_adapter_weights(given[0], folder/"adapter.safetensors")
    return history, load_file(folder/"adapter.safetensors"), given[2]

@pytest.fixture(scope="module")
def two_starts(recipe, tmp_path_factory):
    "The folder of a job on two machines; its start that fails, and its start that finishes"
    folder = tmp_path_factory.mktemp("two")/"run"
    return folder, *(train_on_two_machines(recipe, folder, mode) for mode in ("raise", "record"))

def values(history, name):
    "The values of one name in a log"
    return [float(entry[name]) for entry in history if name in entry]

def packs_of_steps(folder, mode):
    "The packs with labels that both processes read in each step, in any order"
    read = [json.loads(path.read_text()) for path in sorted(folder.glob(f"read-{mode}-*.json"))]
    assert len(read) == 2
    own = PACKS_PER_STEP//2
    flat = [[pack for batch in batches for pack in batch] for batches in read]
    steps = [[pack for packs in flat for pack in packs[i:i + own]] for i in range(0, len(flat[0]), own)]
    return [sorted(pack for pack in step if pack != [0, 0]) for step in steps]

@pytest.mark.multi
def test_error_of_process_1_is_in_the_manifest(two_starts):
    statuses, said, manifest = two_starts[1]
    assert statuses == [1, 1] and manifest["state"] == "failed", said[-2000:]
    assert manifest["failed"]["error"] == "ValueError: no such pack (process 1 of 2, counted from 0)"

@pytest.mark.multi
def test_resumed_job_on_two_machines_finishes(two_starts):
    statuses, said, manifest = two_starts[2]
    assert statuses == [0, 0] and manifest["state"] == "finished" and "failed" not in manifest, said[-2000:]
    begun = re.findall(r"training: [^\r\n]*\[00:00<\?", said) # a bar before its first step
    assert len(begun) == 1, "only process 0 shows the progress"

@pytest.mark.multi
def test_losses_and_adapter_are_those_of_one_process(one, two_starts):
    history, adapter, packs = one
    folder, _, (_, _, manifest) = two_starts
    total = packs.per_epoch()
    assert total % PACKS_PER_STEP, "choose another number of rows"
    steps = [entry["step"] for entry in manifest["history"] if "loss" in entry]
    assert steps == list(range(1, 1 - (-total//PACKS_PER_STEP)))
    for name in ("loss", "test_loss"):
        assert values(manifest["history"], name) == pytest.approx(values(history, name), abs=1e-3)
    trained = load_file(folder/"adapter"/"adapter_model.safetensors")
    assert trained.keys() == adapter.keys()
    assert max((trained[name] - adapter[name]).abs().max().item() for name in adapter) < 1e-3

@pytest.mark.multi
def test_each_start_reads_the_packs_of_one_process(one, two_starts):
    packs, folder = one[2], two_starts[0]
    ids = [packs[i]["input_ids"] for i in range(packs.per_epoch())]
    steps = [sorted(ids[i:i + PACKS_PER_STEP]) for i in range(0, len(ids), PACKS_PER_STEP)]
    first, last = (packs_of_steps(folder.parent, mode) for mode in ("raise", "record"))
    assert first[:2] == steps[:2]
    assert 0 < len(last) < len(steps) and last == steps[-len(last):]

@pytest.mark.multi
def test_disagreeing_process_is_named(recipe, tmp_path):
    message = "Process 1 has another recipe or data than process 0: r 8 in process 1, 16 in process 0"
    assert message in error_of_two(recipe, tmp_path/"run", "disagree")

@pytest.mark.multi
def test_process_that_does_not_start_is_a_timeout(recipe, tmp_path):
    start = time.time()
    assert "Not all of 2 processes started within 1 seconds" in error_of_two(recipe, tmp_path/"run", "late", timeout=1)
    assert time.time() - start < 55

# The command

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

@pytest.mark.slow
def test_killed_process_ends_the_run_which_resumes(tmp_path, small):
    long = small | dict(max_steps=12, save_steps=1, eval_steps=12, n_titles=0, eval_rows=2, lora_dropout=0.0)
    root, recipe = tmp_path/"runs", write_recipe(tmp_path/"p.yaml", long)
    run = start_descgen("run", "-f", recipe, "--processes", 2, "--root", root)
    wait_for(lambda: [*root.glob("2*/checkpoint-[2-9]/seal.json")])
    process_of_rank(run, 1).kill()
    said = run.communicate(timeout=60)[0]
    folder, = root.glob("2*")
    manifest = load_manifest(folder)
    assert run.returncode == 1 and manifest["state"] == "failed", said[-2000:]
    assert "Process 1 of 2 (counted from 0) was killed (SIGKILL)" in manifest["failed"]["error"], said[-2000:]
    assert "rank-1.log" in said and f"descgen resume {folder.name}" in said, said[-2000:]
    resumed = start_descgen("resume", folder.name, "--root", root)
    said = resumed.communicate()[0]
    assert resumed.returncode == 0, said[-2000:]
    manifest = load_manifest(folder)
    assert manifest["state"] == "finished" and f"Resuming from {manifest['resumed_from']}" in said, said[-2000:]
    assert [entry["step"] for entry in manifest["history"] if "loss" in entry] == list(range(1, 13))
