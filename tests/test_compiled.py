"""Compiled layers give the loss and the gradients of the usual path, with kernels made for this processor."""
import pytest

LENGTHS = [30, 50, 7, 41]

def small_model():
    "A random Llama with adapters that are not zero"
    import unsloth, torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from descgen.model import TARGETS
    torch.manual_seed(42)
    config = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=TARGETS))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return model

def make_batch():
    "Examples of different lengths in one batch"
    import torch
    torch.manual_seed(42)
    ids = torch.randint(1, 96, (1, sum(LENGTHS)))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return {"input_ids": ids, "labels": ids.masked_fill(positions == 0, -100), "position_ids": positions}

def backpropagate(loss, model):
    "The loss, and the gradients of the adapter in one vector"
    import torch
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

@pytest.mark.slow
@pytest.mark.parametrize("fp8", [False, True])
def test_compiled_layers_equal_the_same_operations_one_by_one(fp8):
    from descgen.compiled import CompiledLoss, pad_batch
    batch, found = pad_batch(make_batch(), 160), {}
    for compiled in (False, True):
        model = small_model()
        found[compiled] = backpropagate(CompiledLoss(model, fp8=fp8, compiled=compiled)(**batch), model)
    assert abs(found[True][0] - found[False][0]) < 1e-5*found[False][0]
    difference = (found[True][1] - found[False][1]).abs().max()/found[False][1].abs().max()
    assert difference < (1e-2 if fp8 else 1e-5) # a rounding error may change a number in 8 bits

@pytest.mark.slow
def test_both_layers_are_one_program_and_equal_the_usual_path():
    import torch
    from descgen.compiled import compiled_training
    from descgen.layers import patch_model
    batch, usual_model, model = make_batch(), patch_model(small_model()), small_model()
    usual = backpropagate(usual_model(**batch, use_cache=False).loss, usual_model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with compiled_training(model.train(), length=160):
        found = backpropagate(model(**batch, use_cache=False).loss, model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 # the other one is that of the output matrix
    assert abs(found[0] - usual[0]) < 1e-5*usual[0]
    assert (found[1] - usual[1]).abs().max() < 1e-5*usual[1].abs().max()
