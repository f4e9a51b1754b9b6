"""What other cards and other settings do, tried on this card: fp16, attention without xformers, failing kernels, an offloaded embedding, an adapter loaded again.

    python bench/gpu/paths.py WORK                 # every check; ends with 1 if one fails
    python bench/gpu/paths.py WORK --only loaded   # those whose name begins so
    python bench/gpu/paths.py WORK --small         # a try without a GPU, of the checks that do not need one
"""
import argparse, json, os, tempfile, traceback
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

from measure import ROOT, has_gpu, keep
from models import model_folder, read_rows

CHECKS = {}

def check(function):
    "Register a check: a function that returns figures, and raises if they are wrong"
    CHECKS[function.__name__] = function
    return function

def recipe_of(**more):
    "The notebook's recipe with short examples, resolved for this machine"
    from descgen.recipe import check_recipe, read_defaults, resolve
    short = dict(max_length=512, loss_on="completion", gradient_checkpointing=False, output_dir=tempfile.mkdtemp())
    return resolve(check_recipe(read_defaults(ROOT/"fine_tune_llama3.ipynb") | short | more))

def learnt(recipe, scale=0.02):
    "Model and tokenizer with an adapter that changes the model, as if it had been trained"
    import torch
    from descgen.model import LoraSettings, add_lora, load_model
    from descgen.recipe import compute_dtype
    model, tokenizer = load_model(recipe.model_id, 2048, recipe.load_in_4bit, compute_dtype(recipe), recipe.date_string)
    model = add_lora(model, LoraSettings(lora_dropout=0.0, gradient_checkpointing=False))
    torch.manual_seed(42)
    for name, p in model.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(p, std=scale)
    return model, tokenizer

def examples_of(work, tokenizer, n=16):
    "Examples of the first rows"
    from descgen.formatting import encode_rows, template_parts
    return encode_rows(work["rows"][:n], tokenizer, template_parts(tokenizer), 512, "completion")[0]

def precisions():
    "The precisions that this machine computes in"
    return {"bfloat16": dict(bf16=True, fp16=False), "float16": dict(bf16=False, fp16=True)} if has_gpu() else {"as the machine does": {}}

@check
def loaded_equals_saved(work):
    "The test loss of an adapter before it is saved and after it is loaded, and as PEFT alone would compute it"
    from descgen.inference import load_adapter
    from descgen.recipe import compute_dtype
    from descgen.losses import completion_loss
    from descgen.checkpoints import save_adapter
    found = {}
    for bits in ((4, 16) if has_gpu() else (16,)):
        for name, how in precisions().items():
            recipe = recipe_of(model_id=work["embedded"], load_in_4bit=bits == 4, **how)
            model, tokenizer = learnt(recipe)
            examples = examples_of(work, tokenizer)
            before = completion_loss(model, examples, recipe)
            folder = save_adapter(model, tokenizer, Path(recipe.output_dir)/"adapter", recipe.model_id, compute_dtype(recipe))
            del model
            again, _ = load_adapter(folder, 2048, recipe.load_in_4bit)
            after = completion_loss(again, examples, recipe)
            with patch("unsloth.FastLanguageModel.patch_peft_model", create=True): unpatched = completion_loss(load_adapter(folder, 2048, recipe.load_in_4bit)[0], examples, recipe)
            found[f"{bits} bits, {name}"] = {"saved": before, "loaded": after, "loaded without Unsloth's kernels": unpatched}
    wrong = {k: v for k, v in found.items() if abs(v["saved"] - v["loaded"]) > 1e-4}
    assert not wrong, wrong
    return found

@check
def row_losses_are_of_rows(work):
    "The sum of the losses of rows is the loss of all, and each row has its own"
    from descgen.losses import completion_loss, row_losses
    recipe = recipe_of(model_id=work["embedded"])
    model, tokenizer = learnt(recipe)
    examples = examples_of(work, tokenizer)
    rows = list(row_losses(model, examples, recipe))
    alone = [completion_loss(model, [e], recipe) for e in examples]
    furthest = max(abs(nats/n - one) for (nats, n), one in zip(rows, alone))
    together, summed = completion_loss(model, examples, recipe), sum(nats for nats, _ in rows)/sum(n for _, n in rows)
    assert furthest < 1e-3 and abs(together - summed) < 5e-3 and len({round(nats/n, 4) for nats, n in rows}) == len(rows), (furthest, together, summed)
    return {"furthest row": furthest, "all at once": together, "row by row": summed}

@contextmanager
def attention(kind):
    "Unsloth's attention over packs as on a card without xformers: torch's varlen kernel, or SDPA example by example as on a T4"
    from unsloth.utils import attention_dispatch as dispatch
    changed = {"xformers": [], "varlen": ["HAS_XFORMERS"], "SDPA by example": ["HAS_XFORMERS", "_TORCH_VARLEN_ATTN"]}[kind]
    with ExitStack() as stack:
        for name in changed: stack.enter_context(patch.object(dispatch, name, None))
        yield

@check
def packs_with_every_attention(work):
    "Loss and gradient of packs with each of Unsloth's kinds of attention, in bf16 and fp16, and how far a neighbour's tokens move the loss of an example"
    if not has_gpu(): return "needs a GPU"
    import torch
    from descgen.packing import pack_examples
    from descgen.losses import autocast_context, collate
    found = {}
    for name, how in precisions().items():
        recipe = recipe_of(model_id=work["embedded"], load_in_4bit=False, **how)
        model, tokenizer = learnt(recipe)
        pack = max(pack_examples(examples_of(work, tokenizer), 512), key=lambda p: p["position_ids"].count(0))
        last = max(i for i, p in enumerate(pack["position_ids"]) if p == 0)
        masked = {**pack, "labels": [-100 if i < last else label for i, label in enumerate(pack["labels"])]}
        moved = {**masked, "input_ids": [(t + 1) % 1000 if i < last else t for i, t in enumerate(pack["input_ids"])]}
        def loss_and_gradient(pack):
            "Both, and no gradient left"
            model.zero_grad(set_to_none=True)
            with autocast_context(recipe): loss = model(**{k: v.to("cuda") for k, v in collate([pack]).items()}, use_cache=False).loss
            loss.backward()
            return loss.item(), torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
        from unsloth.utils import attention_dispatch as dispatch
        for kind in ("xformers", "varlen", "SDPA by example"):
            with attention(kind), patch.object(dispatch, "_varlen_attn_call", wraps=dispatch._varlen_attn_call) as varlen:
                (whole, g), (one, _), (other, _) = map(loss_and_gradient, (pack, masked, moved))
            reference = found.get(f"{name}, xformers")
            found[f"{name}, {kind}"] = {"loss": whole, "moved by a neighbour": abs(one - other), "gradient": g.norm().item(), "finite": bool(g.isfinite().all()), "calls of varlen": varlen.call_count}
            assert abs(one - other) < 1e-3 and g.isfinite().all(), found
            if reference: assert abs(reference["loss"] - whole) < 5e-3 and abs(reference["gradient"]/g.norm().item() - 1) < 0.05, found
    return found

@check
def descriptions_in_each_precision(work):
    "Greedy descriptions in bf16 and in fp16, in 4 and in 16 bits, with and without xformers"
    from descgen.inference import Sampling, describe
    found = {}
    for bits in ((4, 16) if has_gpu() else (16,)):
        for name, how in precisions().items():
            recipe = recipe_of(model_id=work["embedded"], load_in_4bit=bits == 4, **how)
            model, tokenizer = learnt(recipe, 0.002)
            titles = [r["title"] for r in work["rows"][:4]]
            for kind in (("xformers", "SDPA by example") if has_gpu() else ("xformers",)):
                with attention(kind) if has_gpu() else patch.dict({}): found[f"{bits} bits, {name}, {kind}"] = describe(model, tokenizer, titles, None, Sampling(24, greedy=True), progress=False)
    assert all(all(texts) for texts in found.values()) or not has_gpu(), found # a tiny random model may write nothing
    return {k: texts[0] for k, texts in found.items()}

@check
def failing_nf4_kernel(work):
    "One token at a time in 4 bits, while Unsloth's Triton kernel works, is off, and fails at run time: the losses agree"
    if not has_gpu(): return "needs a GPU"
    import torch
    from unsloth.kernels import utils
    recipe = recipe_of(model_id=work["embedded"], load_in_4bit=True)
    model, tokenizer = learnt(recipe)
    ids = torch.tensor([examples_of(work, tokenizer)[0]["input_ids"][:48]], device="cuda")
    def written():
        "Mean loss of the tokens, each read after the cache of those before"
        cache, total = None, []
        model.eval()
        with torch.no_grad():
            for i in range(ids.shape[1] - 1):
                out = model(input_ids=ids[:, i:i + 1], position_ids=torch.tensor([[i]], device="cuda"), past_key_values=cache, use_cache=True, return_dict=True)
                cache = out.past_key_values
                total.append(-out.logits[0, -1].float().log_softmax(-1)[ids[0, i + 1]].item())
        return sum(total)/len(total)
    def fails(*args, **kw): raise RuntimeError("a kernel that does not run on this card")
    def forget_plans():
        for m in model.modules():
            state = getattr(getattr(m, "weight", None), "quant_state", None)
            if state is not None: state._unsloth_gemv_plan = None
    found = {"kernels in use": [utils._USE_NF4_KERNELS, utils._TRITON_GEMV_EAGER], "works": written()}
    with patch.object(utils, "_TRITON_GEMV_EAGER", True):
        found["works, forced"] = written()
        with patch.object(utils, "_USE_NF4_KERNELS", False): found["off"] = written()
        forget_plans()
        with patch.multiple(utils, gemv_nf4_planned=fails, gemv_nf4=fails): found["fails"] = written()
    utils._USE_NF4_KERNELS = found["kernels in use"][0]
    assert max(abs(found[k] - found["works"]) for k in ("works, forced", "off", "fails")) < 0.02, found
    return found

@check
def offloaded_embedding(work):
    "A model whose untied embedding Unsloth moves to the CPU still takes the GPU's way, and its loss stays"
    if not has_gpu(): return "needs a GPU"
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from unsloth.models.vision import offload_spare_embeddings
    from descgen.layers import layer_device
    from descgen.losses import completion_loss
    folder = tempfile.mkdtemp()
    LlamaForCausalLM(LlamaConfig(vocab_size=49152, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                 tie_word_embeddings=False, eos_token_id=2, pad_token_id=0)).bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(work["embedded"]).save_pretrained(folder)
    recipe = recipe_of(model_id=folder, load_in_4bit=False)
    model, tokenizer = learnt(recipe)
    examples = examples_of(work, tokenizer)
    before, moved = completion_loss(model, examples, recipe), offload_spare_embeddings(model)
    after = completion_loss(model, examples, recipe)
    found = {"bytes moved": moved, "embedding on": str(next(model.get_input_embeddings().parameters()).device), "layers on": str(layer_device(model)), "before": before, "after": after}
    assert moved and found["embedding on"] == "cpu" and found["layers on"].startswith("cuda") and abs(before - after) < 1e-3, found
    return found

@check
def memory_that_runs_out(work):
    "What PyTorch and cuBLAS raise on a full card is recognised"
    if not has_gpu(): return "needs a GPU"
    import torch
    from descgen.train import _is_out_of_memory
    said = {}
    try: torch.empty(1 << 42, dtype=torch.uint8, device="cuda")
    except RuntimeError as e: said["allocation"] = (type(e).__name__, str(e)[:80], _is_out_of_memory(e))
    assert said["allocation"][-1], said
    return said

@check
def skipped_steps_are_counted(work):
    "In fp16 with a loss scale that is far too large, the first steps are skipped: the log counts them, and training goes on"
    if not has_gpu(): return "needs a GPU"
    import torch
    from datasets import Dataset
    from descgen.formatting import template_parts
    from descgen.packing import Packs
    from descgen.train import skipped_steps, train
    recipe = recipe_of(model_id=work["embedded"], load_in_4bit=False, bf16=False, fp16=True, max_steps=12, warmup_steps=0, per_device_train_batch_size=1, gradient_accumulation_steps=1, learning_rate=1e-3)
    model, tokenizer = learnt(recipe)
    packs = Packs(Dataset.from_list(work["rows"][:64]), tokenizer, template_parts(tokenizer), 512, "completion")
    with patch("accelerate.accelerator.get_grad_scaler", lambda *args, **kw: torch.amp.GradScaler("cuda", init_scale=2.0**20)): history = train(model, tokenizer, packs, recipe)
    found = {"skipped": skipped_steps(history), "losses": [float(h["loss"]) for h in history if "loss" in h], "norms": [str(h.get("grad_norm")) for h in history if "loss" in h]}
    assert 0 < found["skipped"] < 12, found
    return found

@check
def float32_is_refused(work):
    "bf16=False with fp16=False is refused on a card, where Unsloth would train in 16 bits"
    if not has_gpu(): return "needs a GPU"
    try: recipe_of(model_id=work["embedded"], bf16=False, fp16=False)
    except ValueError as e: return str(e)
    raise AssertionError("float32 was not refused")

def main(args):
    "Every check asked for: its figures, or how it failed"
    import unsloth # before transformers
    work = {"embedded": str(model_folder("embedded", args.work, args.small)), "rows": read_rows(args.rows)}
    found, failed = {}, []
    for name, function in CHECKS.items():
        if not name.startswith(args.only): continue
        try: found[name] = function(work)
        except Exception as e:
            traceback.print_exc()
            found[name] = f"FAILED {type(e).__name__}: {e}"
            failed.append(name)
        print(name, json.dumps(found[name], indent=1), flush=True)
    keep("paths", found)
    return failed

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", default="", help="the beginning of a check's name")
    parser.add_argument("--rows", type=Path, default=Path("data/sample.jsonl")); parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    failed = main(args)
    raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)
