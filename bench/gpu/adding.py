"""How much of an adapter's small addition a card's products keep, by scale and type: added as Unsloth adds, and as `descgen.layers` does; in compiled code, too.

    python bench/gpu/adding.py
"""
import unsloth # before transformers and peft
import torch

from descgen.layers import addmm_lora
from measure import device, has_gpu, keep
from precision import left_of

SCALES = (0.25, 0.5, 1., 1.3, 2., 2.8284271, 4.)

def as_unsloth(X, X_lora, W, A, B, s): return (X @ W.t()).addmm_(X_lora @ A.to(X.dtype).t(), B.to(X.dtype).t(), alpha=s)

def kept_of(add, X, W, A, B, s):
    "How much of the addition is left"
    base, exact = X.float() @ W.float().t(), s*(X.float() @ A.t() @ B.t())
    return left_of(add(X, X, W, A, B, s).float(), base, exact)

if __name__ == "__main__":
    torch.manual_seed(0)
    rows, width, out = (16384, 2048, 8192) if has_gpu() else (64, 256, 512)
    X, W = torch.randn(rows, width, device=device()), torch.randn(out, width, device=device())*0.03
    A, B = torch.randn(16, width, device=device())*0.02, torch.randn(out, 16, device=device())*1e-5
    given = {str(t).removeprefix("torch."): (X.bfloat16().to(t), W.bfloat16().to(t), A, B) for t in (torch.bfloat16, torch.float16)}
    found = {f"{name}, {s}": {"stock": kept_of(as_unsloth, *of, s), "added once": kept_of(addmm_lora, *of, s)} for name, of in given.items() for s in SCALES}
    if has_gpu(): found |= {f"bfloat16, {s}, compiled": {"added once": kept_of(torch.compile(addmm_lora), *given["bfloat16"], s)} for s in (1., 2.)}
    for name, shares in keep("adding", found).items(): print(f"{name:28}", *(f"{way} {share:.3f}" for way, share in shares.items()))
