"""What other cards do, checked on this one: fp16, other attention, failing kernels, offloading.

    python -m bench gpu-fallbacks WORK                 # every check; ends with 1 if one fails
    python -m bench gpu-fallbacks WORK --only loaded   # those whose name begins so
    python -m bench gpu-fallbacks WORK --small         # without a GPU, the checks that need none
"""
import json
import sys
import tempfile
import traceback
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

from ..measure import NOTEBOOK, save_result
from .card import add_model_options, has_gpu
from .models import model_folder, read_rows

CHECKS = {}
NEEDS_GPU = "needs a GPU"

def add_options(parser):
    add_model_options(parser, with_model=False)
    parser.add_argument("--only", default="", help="the beginning of a check's name")

def check(function):
    "Register a check: a function that returns figures, and raises if they are wrong"
    CHECKS[function.__name__] = function
    return function

def check_on_gpu(function):
    "Register a check that needs a GPU"
    def checked(given):
        return function(given) if has_gpu() else NEEDS_GPU
    CHECKS[function.__name__] = checked
    return checked

# What the checks share

def make_recipe(**more):
    "The notebook's recipe with short examples, resolved for this machine"
    from descgen.recipe import check_recipe, read_defaults, resolve
    short = dict(max_length=512, loss_on="completion",
        gradient_checkpointing=False, output_dir=tempfile.mkdtemp())
    return resolve(check_recipe(read_defaults(NOTEBOOK) | short | more))

def load_trained(recipe, scale=0.02):
    "Model and tokenizer with an adapter that changes the model, as if it had been trained"
    import torch
    from descgen.model import LoraSettings, add_lora, load_model
    from descgen.recipe import compute_dtype
    model, tokenizer = load_model(
        recipe.model_id, 2048, recipe.load_in_4bit, compute_dtype(recipe), recipe.date_string)
    model = add_lora(model, LoraSettings(lora_dropout=0.0, gradient_checkpointing=False))
    torch.manual_seed(42)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=scale)
    return model, tokenizer

def make_examples(given, tokenizer, n=16):
    "Examples of the first rows"
    from descgen.formatting import encode_rows, template_parts
    return encode_rows(given["rows"][:n], tokenizer, template_parts(tokenizer), 512,
        "completion")[0]

def precisions():
    "The precisions that this machine computes in"
    if not has_gpu():
        return {"this machine's": {}}
    return {"bfloat16": dict(bf16=True, fp16=False), "float16": dict(bf16=False, fp16=True)}

def combinations():
    "Names and parameters of bits and precisions"
    found = {}
    for bits in (4, 16) if has_gpu() else (16,):
        for name, given in precisions().items():
            found[f"{bits} bits, {name}"] = {"load_in_4bit": bits == 4, **given}
    return found

@contextmanager
def attention(kind):
    "Unsloth's attention over packs as on a card without xformers: torch's varlen kernel, or SDPA as on a T4"
    from unsloth.utils import attention_dispatch as dispatch
    without = {"xformers": [], "varlen": ["HAS_XFORMERS"],
               "SDPA by example": ["HAS_XFORMERS", "_TORCH_VARLEN_ATTN"]}
    with ExitStack() as stack:
        for name in without[kind]:
            stack.enter_context(patch.object(dispatch, name, None))
        yield

# The checks

@check
def loaded_equals_saved(given):
    "The test loss of an adapter before it is saved and after it is loaded, and as PEFT alone would compute it"
    from descgen.checkpoints import save_adapter
    from descgen.inference import load_adapter
    from descgen.losses import completion_loss
    from descgen.recipe import compute_dtype
    found = {}
    for name, more in combinations().items():
        recipe = make_recipe(model_id=given["embedded"], **more)
        model, tokenizer = load_trained(recipe)
        examples = make_examples(given, tokenizer)
        def loss_of_loaded(folder):
            return completion_loss(
                load_adapter(folder, 2048, recipe.load_in_4bit)[0], examples, recipe)
        saved = completion_loss(model, examples, recipe)
        folder = Path(recipe.output_dir)/"adapter"
        folder = save_adapter(model, tokenizer, folder, recipe.model_id, compute_dtype(recipe))
        del model
        loaded = loss_of_loaded(folder)
        with patch("unsloth.FastLanguageModel.patch_peft_model", create=True):
            unpatched = loss_of_loaded(folder)
        found[name] = {"saved": saved, "loaded": loaded,
                       "loaded without Unsloth's kernels": unpatched}
    wrong = {k: v for k, v in found.items() if abs(v["saved"] - v["loaded"]) > 1e-4}
    assert not wrong, wrong
    return found

@check
def row_losses_are_of_rows(given):
    "The sum of the losses of rows is the loss of all, and each row has its own"
    from descgen.losses import completion_loss, mean_loss, row_losses
    recipe = make_recipe(model_id=given["embedded"])
    model, tokenizer = load_trained(recipe)
    examples = make_examples(given, tokenizer)
    rows = row_losses(model, examples, recipe)
    means = [nats/n for nats, n in rows]
    alone = [completion_loss(model, [e], recipe) for e in examples]
    together = completion_loss(model, examples, recipe)
    summed = mean_loss(rows)
    furthest = max(abs(a - b) for a, b in zip(means, alone))
    found = {"furthest row": furthest, "all at once": together, "row by row": summed}
    assert furthest < 1e-3 and abs(together - summed) < 5e-3, found
    assert len({round(m, 4) for m in means}) == len(rows), found
    return found

def packs_that_differ(given, tokenizer):
    "A pack, the same with labels of its last example only, and that one with other tokens before it"
    from descgen.packing import pack_examples
    packs = pack_examples(make_examples(given, tokenizer), 512)
    pack = max(packs, key=lambda p: p["position_ids"].count(0))
    last = max(i for i, p in enumerate(pack["position_ids"]) if p == 0)
    masked = {**pack,
              "labels": [-100 if i < last else label for i, label in enumerate(pack["labels"])]}
    ids = [(t + 1) % 1000 if i < last else t for i, t in enumerate(pack["input_ids"])]
    return pack, masked, {**masked, "input_ids": ids}

def loss_and_gradient(model, pack, recipe):
    "Both, and no gradient left"
    import torch
    from descgen.losses import autocast_context, collate
    model.zero_grad(set_to_none=True)
    batch = {k: v.to("cuda") for k, v in collate([pack]).items()}
    with autocast_context(recipe):
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    return (loss.item(),
            torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None]))

def try_attention(kind, model, packs, recipe):
    "Figures of one kind of attention"
    from unsloth.utils import attention_dispatch as dispatch
    with (attention(kind),
          patch.object(dispatch, "_varlen_attn_call", wraps=dispatch._varlen_attn_call) as varlen):
        (whole, g), (one, _), (other, _) = [loss_and_gradient(model, pack, recipe)
            for pack in packs]
    return {"loss": whole, "moved by a neighbour": abs(one - other), "gradient": g.norm().item(),
            "finite": bool(g.isfinite().all()), "calls of varlen": varlen.call_count}

@check_on_gpu
def packs_with_every_attention(given):
    "Loss and gradient of packs with each of Unsloth's kinds of attention, and what a neighbour's tokens change"
    found = {}
    for name, more in precisions().items():
        recipe = make_recipe(model_id=given["embedded"], load_in_4bit=False, **more)
        model, tokenizer = load_trained(recipe)
        packs = packs_that_differ(given, tokenizer)
        kinds = {kind: try_attention(kind, model, packs, recipe)
                 for kind in ("xformers", "varlen", "SDPA by example")}
        found[name] = kinds
        reference = kinds["xformers"]
        for f in kinds.values():
            assert f["moved by a neighbour"] < 1e-3 and f["finite"], found
            assert abs(reference["loss"] - f["loss"]) < 5e-3, found
            assert abs(reference["gradient"]/f["gradient"] - 1) < 0.05, found
    return found

@check
def descriptions_in_each_precision(given):
    "Greedy descriptions in bf16 and in fp16, in 4 and in 16 bits, with and without xformers"
    from descgen.inference import Sampling, describe
    found = {}
    titles, greedy = [r["title"] for r in given["rows"][:4]], Sampling(24, greedy=True)
    for name, more in combinations().items():
        model, tokenizer = load_trained(make_recipe(model_id=given["embedded"], **more), 0.002)
        for kind in ("xformers", "SDPA by example") if has_gpu() else ("xformers",):
            with attention(kind) if has_gpu() else nullcontext():
                texts = describe(model, tokenizer, titles, sampling=greedy, progress=False)
            found[f"{name}, {kind}"] = texts
    if has_gpu(): # a tiny random model may write nothing
        assert all(all(texts) for texts in found.values()), found
    return {name: texts[0] for name, texts in found.items()}

def loss_token_by_token(model, ids):
    "Mean loss of the tokens, each read with a cache of those before"
    import torch
    cache, nats = None, []
    model.eval()
    with torch.no_grad():
        for i in range(ids.shape[1] - 1):
            position = torch.tensor([[i]], device="cuda")
            out = model(input_ids=ids[:, i:i + 1], position_ids=position,
                        past_key_values=cache, use_cache=True,
                        return_dict=True)
            cache = out.past_key_values
            nats.append(-out.logits[0, -1].float().log_softmax(-1)[ids[0, i + 1]].item())
    return sum(nats)/len(nats)

def forget_kernel_plans(model):
    "Unsloth chooses its kernels again"
    for m in model.modules():
        state = getattr(getattr(m, "weight", None), "quant_state", None)
        if state is not None:
            state._unsloth_gemv_plan = None

def raise_kernel_error(*args, **kw):
    raise RuntimeError("a kernel that does not run on this card")

@check_on_gpu
def failing_nf4_kernel(given):
    "One token at a time in 4 bits while Unsloth's Triton kernel works, is off, and fails: the losses agree"
    import torch
    from unsloth.kernels import utils
    model, tokenizer = load_trained(make_recipe(model_id=given["embedded"], load_in_4bit=True))
    ids = torch.tensor([make_examples(given, tokenizer)[0]["input_ids"][:48]], device="cuda")
    used = utils._USE_NF4_KERNELS
    found = {"kernels in use": [used, utils._TRITON_GEMV_EAGER],
             "works": loss_token_by_token(model, ids)}
    with patch.object(utils, "_TRITON_GEMV_EAGER", True):
        found["works, forced"] = loss_token_by_token(model, ids)
        with patch.object(utils, "_USE_NF4_KERNELS", False):
            found["off"] = loss_token_by_token(model, ids)
        forget_kernel_plans(model)
        with patch.multiple(utils, gemv_nf4_planned=raise_kernel_error,
                gemv_nf4=raise_kernel_error):
            found["fails"] = loss_token_by_token(model, ids)
    utils._USE_NF4_KERNELS = used
    assert max(abs(found[k] - found["works"])
               for k in ("works, forced", "off", "fails")) < 0.02, found
    return found

def make_untied_model(tokenizer_folder):
    "A small model with an embedding of its own, in a folder"
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    folder = tempfile.mkdtemp()
    config = LlamaConfig(
        vocab_size=49152, hidden_size=256, intermediate_size=512,
        num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, eos_token_id=2, pad_token_id=0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder

@check_on_gpu
def offloaded_embedding(given):
    "A model whose untied embedding Unsloth moves to the CPU still computes on the GPU, and its loss stays"
    from unsloth.models.vision import offload_spare_embeddings
    from descgen.layers import layer_device
    from descgen.losses import completion_loss
    recipe = make_recipe(model_id=make_untied_model(given["embedded"]), load_in_4bit=False)
    model, tokenizer = load_trained(recipe)
    examples = make_examples(given, tokenizer)
    before, moved = completion_loss(model, examples, recipe), offload_spare_embeddings(model)
    after = completion_loss(model, examples, recipe)
    embedding = next(model.get_input_embeddings().parameters()).device
    found = {"bytes moved": moved, "embedding on": str(embedding),
             "layers on": str(layer_device(model)),
             "before": before, "after": after}
    assert moved and found["embedding on"] == "cpu" and found["layers on"].startswith("cuda"), found
    assert abs(before - after) < 1e-3, found
    return found

@check_on_gpu
def memory_that_runs_out(given):
    "What PyTorch raises on a full card is recognised"
    import torch
    from descgen.train import _is_out_of_memory
    try:
        torch.empty(1 << 42, dtype=torch.uint8, device="cuda")
    except RuntimeError as e:
        assert _is_out_of_memory(e), e
        return [type(e).__name__, str(e)[:80]]
    raise AssertionError("4 TB were allocated")

@check_on_gpu
def skipped_steps_are_counted(given):
    "In fp16 with a far too large loss scale the first steps are skipped: the log counts them, and training goes on"
    import torch
    from datasets import Dataset
    from descgen.formatting import template_parts
    from descgen.packing import Packs
    from descgen.train import skipped_steps, train
    recipe = make_recipe(
        model_id=given["embedded"], load_in_4bit=False,
        bf16=False, fp16=True, max_steps=12, warmup_steps=0,
        per_device_train_batch_size=1, gradient_accumulation_steps=1, learning_rate=1e-3)
    model, tokenizer = load_trained(recipe)
    packs = Packs(Dataset.from_list(given["rows"][:64]),
        tokenizer, template_parts(tokenizer), 512, "completion")
    def large_scaler(*args, **kw):
        return torch.amp.GradScaler("cuda", init_scale=2.0**20)
    with patch("accelerate.accelerator.get_grad_scaler", large_scaler):
        history = train(model, tokenizer, packs, recipe)
    steps = [h for h in history if "loss" in h]
    found = {"skipped": skipped_steps(history), "losses": [float(h["loss"]) for h in steps],
             "norms": [str(h.get("grad_norm")) for h in steps]}
    assert 0 < found["skipped"] < 12, found
    return found

@check_on_gpu
def float32_is_refused(given):
    "bf16=False with fp16=False is refused on a card, where Unsloth would train in 16 bits"
    try:
        make_recipe(model_id=given["embedded"], bf16=False, fp16=False)
    except ValueError as e:
        return str(e)
    raise AssertionError("float32 was not refused")

def run(args):
    import unsloth # before transformers
    args.work.mkdir(parents=True, exist_ok=True)
    given = {"embedded": str(model_folder("embedded", args.work, args.small)),
             "rows": read_rows(args.rows)}
    found, failed = {}, []
    for name, function in CHECKS.items():
        if not name.startswith(args.only):
            continue
        try:
            found[name] = function(given)
        except Exception as e:
            traceback.print_exc()
            found[name] = f"FAILED {type(e).__name__}: {e}"
            failed.append(name)
        print(name, json.dumps(found[name], indent=1), flush=True)
    save_result(args.results, f"gpu-fallbacks{'-small' if args.small else ''}", found)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
