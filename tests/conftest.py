"""What the tests share: a tiny model, a small run, and a way to start the command as a user does."""
import json, os, random, signal, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT/"fine_tune_llama3.ipynb"

def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=random.SystemRandom().randrange(10**6),
        help="of the moments at which processes are killed")

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; `make test-slow` runs these")
    config.addinivalue_line("markers", "long: takes several minutes more than slow; `make test-long` runs these")
    config.addinivalue_line("markers", "multi: trains in two processes; `make test-multi` runs these")
    config.addinivalue_line("markers", "browser: opens Chromium, skipped where there is none; `make test-browser` runs these")

def pytest_report_header(config):
    return f"seed of the kills: {config.getoption('seed')}"

@pytest.fixture
def rng(request):
    "Random moments; the seed is printed at the beginning of the run"
    return random.Random(request.config.getoption("seed"))

@pytest.fixture(scope="session")
def small(tmp_path_factory):
    "Parameters of a run of the real notebook with a tiny model, which takes seconds"
    from descgen.model import tiny_model
    return dict(
        model_id=str(tiny_model(tmp_path_factory.mktemp("model")/"tiny")),
        data_path=str(ROOT/"data/sample.jsonl"), max_steps=6, warmup_steps=1,
        per_device_train_batch_size=2, gradient_accumulation_steps=1,
        max_length=128, learning_rate=1e-2, eval_steps=6, save_steps=2,
        n_titles=1, max_new_tokens=4, eval_rows=4)

def environment(**more):
    "The environment of a started process: one thread, no network"
    return (os.environ
            | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more)

def take_interrupts():
    "Take Ctrl-C, which a shell's background processes ignore"
    signal.signal(signal.SIGINT, signal.SIG_DFL)

def start_descgen(*words, **env):
    "Start a descgen command from the project's folder"
    command = [sys.executable, "-c", "from descgen.cli import app; app()", *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env=environment(**env), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, preexec_fn=take_interrupts)

def write_recipe(path, parameters):
    "A recipe file"
    path.write_text(json.dumps(parameters), encoding="utf-8") # JSON is YAML
    return path
