"""Make a model's folder: the shape of Llama 3.2 1B or Llama 3.1 8B with random weights, or the embedded model.

    python -m bench gpu-models llama WORK
    python -m bench gpu-models llama-8b WORK

The random weights are seeded, and the vocabulary is the real one. It is a process of its own because nothing may
have patched transformers before.
"""
import importlib.util
import random
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from ..measure import print_result, read_jsonl
from .card import add_model_options

LLAMA_1B = dict(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192,
    num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, max_position_embeddings=131072,
    rms_norm_eps=1e-5, tie_word_embeddings=True,
    bos_token_id=128000, eos_token_id=[128001, 128008, 128009],
    rope_parameters=dict(rope_type="llama3", rope_theta=500000., factor=32.,
                         low_freq_factor=1., high_freq_factor=4.,
                         original_max_position_embeddings=8192))
LLAMA_8B = LLAMA_1B | dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, head_dim=128, tie_word_embeddings=False,
    rope_parameters=LLAMA_1B["rope_parameters"] | dict(factor=8.))
SHAPES = {"llama": LLAMA_1B, "llama-8b": LLAMA_8B}
SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2,
             head_dim=16) # for a try without a GPU
SPECIAL = {128000: "begin_of_text", 128001: "end_of_text",
           128004: "finetune_right_pad_id", 128006: "start_header_id",
           128007: "end_header_id", 128008: "eom_id", 128009: "eot_id", 128010: "python_tag"}

def add_options(parser):
    add_model_options(parser, models=[*SHAPES, "embedded"])

def package_folder(name):
    return Path(importlib.util.find_spec(name).submodule_search_locations[0])

def special_tokens():
    "Llama 3's special tokens in their order"
    reserved = count()
    names = [SPECIAL.get(i) or f"reserved_special_token_{next(reserved)}"
             for i in range(128000, 128256)]
    return [f"<|{name}|>" for name in names]

def llama_tokenizer():
    "Llama 3.2's tokenizer, from the vocabulary in llama-models and the chat template in TRL"
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter
    special = special_tokens()
    vocabulary = package_folder("llama_models")/"llama3"/"tokenizer.model"
    template = package_folder("trl")/"chat_templates"/"llama3_2.jinja"
    converted = TikTokenConverter(str(vocabulary), extra_special_tokens=special).converted()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=converted, bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>", add_bos_token=True,
        pad_token="<|finetune_right_pad_id|>", chat_template=template.read_text())
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer

def llama_folder(folder, small=False, seed=42, shape=LLAMA_1B):
    "A folder with a model of a shape in random weights; made once"
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    folder = Path(folder)
    if (folder/"config.json").exists():
        return folder
    torch.manual_seed(seed)
    config = LlamaConfig(**shape | (SMALL if small else {}), pad_token_id=128004)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    llama_tokenizer().save_pretrained(folder)
    return folder

def model_folder(name, work, small=False):
    "Where a model is: `llama`, `llama-8b` or `embedded`"
    if name in SHAPES:
        return llama_folder(Path(work)/f"{name}{'-small' if small else ''}", small, shape=SHAPES[name])
    from descgen.model import embedded_model, tiny_model
    return Path(tiny_model(Path(work)/"embedded-small") if small else embedded_model(work))

def read_rows(path, seed=42):
    "Titles and contents of a JSON Lines file, shuffled"
    rows = [{k: r[k] for k in ("title", "content")} for r in read_jsonl(path) if r.get("content")]
    random.Random(seed).shuffle(rows)
    return rows

def with_sources(rows, k, chars):
    "The rows, each with `k` sources of `chars` characters that descgen finds for it among them"
    from datasets import Dataset
    from descgen.sources import Sources, source_rows, training_sources, write_sources
    distinct = [dict(uid=str(i), title=title, content=content)
                for i, (title, content) in enumerate(dict.fromkeys((r["title"], r["content"]) for r in rows))]
    with TemporaryDirectory() as folder:
        index = Sources(write_sources(Dataset.from_list(distinct), Path(folder)/"sources", chars))
        found = source_rows(index, training_sources(index, range(len(distinct)), k))
    sources = {(row["title"], row["content"]): own for row, own in zip(distinct, found)}
    return [{**row, "sources": sources[row["title"], row["content"]]} for row in rows]

def run(args):
    print_result({"folder": str(model_folder(args.model, args.work, args.small))})
