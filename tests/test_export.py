"""The exports of an adapter of the embedded model work without descgen and write what descgen writes."""
import json, os, re, subprocess, sys

import pytest

from conftest import environment

pytestmark = pytest.mark.slow
TITLES = ["Red Ceramic Mug", "Garden Chair 2 Pack", "Wireless Speaker 10 W"]
TOKENS = 24

# a card's code runs with this hook: neither descgen nor unsloth can be imported
BLOCK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("descgen", "unsloth", "unsloth_zoo"): raise ImportError(f"{name} is not allowed here")
sys.meta_path.insert(0, Refuse())
"""
WRITE = """
import json
texts = []
for title in json.loads(sys.argv[1]):
    turn = [{"role": "user", "content": f"DESCRIBE ABOUT THE PRODUCT.\\nTitle: {title}"}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    new = model.generate(**prompt, do_sample=False, max_new_tokens=int(sys.argv[2]), eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)[0, prompt["input_ids"].shape[1]:]
    texts.append(tokenizer.decode(new, skip_special_tokens=True).strip())
print(json.dumps(texts))
"""

@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    "An adapter of the embedded model, with random weights that change what it writes"
    import torch
    from descgen.checkpoints import save_adapter
    from descgen.model import EMBEDDED, add_lora, load_model
    model, tokenizer = load_model(EMBEDDED, dtype="float32")
    model = add_lora(model)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name: parameter.data.normal_(0, .01, generator=generator)
    return save_adapter(model, tokenizer, tmp_path_factory.mktemp("run")/"adapter", EMBEDDED, "float32")

@pytest.fixture(scope="module")
def written(adapter):
    "What descgen writes, greedily and in float32"
    from descgen.inference import Sampling, describe, load_adapter
    model, tokenizer = load_adapter(adapter, load_in_4bit=False, dtype="float32")
    return describe(model, tokenizer, TITLES, sampling=Sampling(TOKENS, greedy=True, batch_size=1), progress=False)

def code_of_card(folder):
    "The loading code in a card: the block that makes `model` without descgen"
    blocks = re.findall(r"```python\n(.*?)```", (folder/"README.md").read_text(encoding="utf-8"), re.DOTALL)
    return next(b for b in blocks if "from_pretrained" in b).split("messages =")[0].replace("this folder", str(folder))

def write_plainly(folder, tmp_path):
    "What a card's code writes in a process without descgen and unsloth"
    command = [sys.executable, "-c", BLOCK + code_of_card(folder) + WRITE, json.dumps(TITLES), str(TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment(PYTHONPATH=""))
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])

def test_card_of_adapter_loads_with_peft_alone(adapter, written, tmp_path):
    assert write_plainly(adapter, tmp_path) == written

@pytest.mark.parametrize("to, dtype", [("merged", "float32"), pytest.param("gguf", "float32", marks=pytest.mark.long),
                                       pytest.param("hub", "auto", marks=pytest.mark.long)])
def test_export_writes_the_same_without_descgen(adapter, written, tmp_path, to, dtype):
    from descgen.export import export
    about = export(adapter, to, tmp_path/to, dtype)
    assert about["dtype"] == "float32" and about["parity"]["same"] == 1
    assert write_plainly(tmp_path/to, tmp_path) == written

@pytest.mark.long
def test_auto_rounds_within_its_cost(adapter, tmp_path):
    from descgen.export import MAX_COST, export
    about = export(adapter, "gguf", tmp_path/"gguf")
    assert about["dtype"] == "q8_0" and abs(about["costs"]["q8_0"]) <= MAX_COST
    assert (tmp_path/"gguf"/"model.gguf").stat().st_size < 150e6
    assert not [p for p in os.listdir(tmp_path) if p.startswith(".")]
