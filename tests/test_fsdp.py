"""Two processes that share a model by FSDP2 train what one trains, without Unsloth, and resume."""
import json, subprocess, sys
from types import SimpleNamespace

import pytest, yaml

from conftest import ROOT, environment, write_recipe
from descgen.files import load_manifest

CONFIG = ROOT/"recipes"/"fsdp.yaml"

def test_configuration_has_only_options_of_accelerate():
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser
    options = vars(launch_command_parser().parse_args(["script"]))
    config = load_config_from_file(str(CONFIG))
    assert config.distributed_type == "FSDP" and config.fsdp_config["fsdp_version"] == 2
    assert not set(config.fsdp_config) - set(options)

def test_recipe_that_cannot_be_sharded_is_refused(monkeypatch):
    from descgen.processes import _check_fsdp
    fitting = dict(load_in_4bit=False, compile=False, fp16=False, optim="adamw_torch_fused")
    for name, wrong in dict(load_in_4bit=True, compile=True, fp16=True, optim="paged_adamw_8bit").items():
        recipe = SimpleNamespace(**fitting | {name: wrong})
        monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
        _check_fsdp(recipe)
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(ValueError, match=f"{name}=.* cannot be used with FSDP"):
            _check_fsdp(recipe)

def losses(folder):
    "Training and test losses by step"
    history = load_manifest(folder)["history"]
    return {(name, entry["step"]): entry[name] for entry in history for name in ("loss", "test_loss") if name in entry}

@pytest.mark.multi
def test_two_processes_that_share_a_model_train_what_one_trains(small, tmp_path, monkeypatch):
    import torch
    from descgen.processes import train_recipe
    torch.set_num_threads(1)
    monkeypatch.chdir(ROOT)
    values = small | dict(max_steps=5, gradient_accumulation_steps=4, load_in_4bit=False, bf16=False, lora_dropout=0.0,
        save_steps=2, eval_steps=2, eval_rows=3, keep_best=True)
    recipe = write_recipe(tmp_path/"two.yaml", values | {"output_dir": str(tmp_path/"two")})
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIG, "--main_process_port", 0,
        ROOT/"tests"/"fsdp_script.py", recipe]
    with open(tmp_path/"log", "w") as log:
        sharded = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment(), stdout=log, stderr=log)
        one = train_recipe(values | {"output_dir": str(tmp_path/"one")})
        assert sharded.wait(100) == 0, (tmp_path/"log").read_text()[-4000:]
    held = [json.loads((tmp_path/"two"/f"share-{rank}.json").read_text()) for rank in (0, 1)]
    assert all(0.49 < share < 0.51 and not unsloth for share, unsloth in held), held
    assert "Resuming from checkpoint-2" in (tmp_path/"log").read_text()
    compare(one, tmp_path/"two", values["model_id"])

def compare(one, two, base):
    "The losses, the adapters, and how PEFT loads the second one"
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM
    expected, found = losses(one), losses(two)
    assert expected.keys() == found.keys() and len(found) == 5 + 3
    assert max(abs(expected[key] - found[key]) for key in found) < 1e-4
    first, second = (load_file(folder/"adapter"/"adapter_model.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-3
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), two/"adapter")
    loaded = model.state_dict()
    for name, weight in second.items():
        assert loaded[name.replace(".weight", ".default.weight")].equal(weight), name
