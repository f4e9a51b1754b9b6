"""`descgen generate` ends with the same bytes wherever it was killed, and loses no row."""
import json, signal, time
from contextlib import suppress

import psutil, pytest
from typer.testing import CliRunner

from conftest import start_descgen

N_TITLES = 160

@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    "An adapter with random weights on a tiny model"
    import unsloth
    import torch
    from descgen.checkpoints import save_adapter
    from descgen.model import LoraSettings, add_lora, load_model, tiny_model
    folder = tmp_path_factory.mktemp("adapter")
    base = str(tiny_model(folder/"tiny"))
    model, tokenizer = load_model(base, dtype="float32")
    model = add_lora(model, LoraSettings(r=2, gradient_checkpointing=False))
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.05, generator=torch.Generator().manual_seed(0))
    return save_adapter(model, tokenizer, folder/"adapter", base, "float32")

def write_titles(folder, n):
    "A file of titles, two of them without a text"
    rows = [{"uid": f"p{i}", "title": f"Lamp {i}" + " of oak"*(i % 7)} for i in range(n)]
    rows[3]["title"], rows[90]["title"] = "", None
    path = folder/"titles.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path

@pytest.fixture
def titles(tmp_path):
    return write_titles(tmp_path, N_TITLES)

def words(adapter, titles, output, new_tokens=24):
    "Of a `descgen generate` command"
    options = {"adapter": adapter, "input": titles, "output": output, "max-new-tokens": new_tokens, "batch-size": 2}
    return ["generate", *(str(word) for name, value in options.items() for word in (f"--{name}", value))]

def start(adapter, titles, output, *more):
    return start_descgen(*words(adapter, titles, output), *more)

def start_two(adapter, titles, output):
    return start_descgen(*words(adapter, titles, output, 12), "--processes", 2)

def wait_for_lines(process, path, n):
    "Return when a file has some lines; AssertionError if the process ends before"
    while not path.exists() or path.read_bytes().count(b"\n") < n:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)

@pytest.mark.slow
def test_killed_call_resumes_to_the_same_bytes(tmp_path, adapter, titles, rng):
    whole, killed = tmp_path/"whole.jsonl", tmp_path/"killed.jsonl"
    said = start(adapter, titles, whole).communicate()[0]
    assert f"{N_TITLES} rows = {N_TITLES - 2} described + 2 rejected" in said
    part = tmp_path/"killed.jsonl.part"
    for lines in sorted(rng.sample(range(2, 15), 2)):
        process = start(adapter, titles, killed)
        wait_for_lines(process, part, lines)
        time.sleep(rng.random()/50)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not killed.exists()
    said = start(adapter, titles, killed).communicate()[0]
    assert f"{N_TITLES} rows = {N_TITLES - 2} described + 2 rejected" in said
    assert killed.read_bytes() == whole.read_bytes()
    rejected = [path.with_suffix(".rejected.jsonl").read_bytes() for path in (killed, whole)]
    assert rejected[0] == rejected[1] and rejected[0].count(b"\n") == 2
    assert sorted(path.name for path in tmp_path.glob("killed*")) == [
        "killed.jsonl", "killed.rejected.jsonl", "killed.settings.json"]

def rank_of(process):
    "The rank of a process in its environment; None if it has none"
    with suppress(psutil.Error):
        return process.environ().get("RANK")

@pytest.mark.multi
def test_two_processes_write_what_one_writes_also_if_one_was_killed(tmp_path, adapter):
    from descgen.cli import app
    n_titles = 96
    titles, whole, shared = write_titles(tmp_path, n_titles), tmp_path/"whole.jsonl", tmp_path/"shared.jsonl"
    done = CliRunner().invoke(app, words(adapter, titles, whole, 12)) # here, where Unsloth is imported already
    assert done.exit_code == 0, done.output
    process = start_two(adapter, titles, shared)
    wait_for_lines(process, tmp_path/"shared.jsonl.processes"/"part-1.jsonl", 2)
    second = next(p for p in psutil.Process(process.pid).children(recursive=True) if rank_of(p) == "1")
    second.kill()
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "Process 1 of 2 (counted from 0) was killed" in said, said[-2000:]
    parts = sorted((tmp_path/"shared.jsonl.processes").glob("part-*.jsonl"))
    rows = [number for part in parts for line in part.read_text().splitlines()
            for number in json.loads(line).get("numbers", [])]
    assert 0 < len(set(rows)) == len(rows) < n_titles - 2 and not shared.exists()
    said = start_two(adapter, titles, shared).communicate()[0]
    assert f"{n_titles} rows = {n_titles - 2} described + 2 rejected" in said, said[-2000:]
    assert shared.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.glob("shared*")) == [
        "shared.jsonl", "shared.rejected.jsonl", "shared.settings.json"]
