"""How much of an adapter's small addition this card's products keep, by scale and type.

    python -m bench gpu-rounding

Unsloth's way and descgen's, with random numbers in the shape of Llama's gate. `descgen.layers` is tried in
compiled code, too, and so are the sums of compiled training.
"""
from ..markdown import circumstances, markdown_table
from ..measure import save_result
from .card import CARD, device, has_gpu
from .precision import share_left

SCALES = (0.25, 0.5, 1., 1.3, 2., 2.8284271, 4.)
COMPILED_SCALES = (1., 2.)

def add_options(parser):
    parser.add_argument("--small", action="store_true",
        help="the result is a try; without a GPU all is small")

def add_as_unsloth(X, X_lora, W, A, B, s):
    "The small product added onto the large one"
    return (X @ W.t()).addmm_(X_lora @ A.to(X.dtype).t(), B.to(X.dtype).t(), alpha=s)

def add_as_compiled_training(X, X_lora, W, A, B, s):
    "Both products in one sum"
    from descgen.compiled import add_products
    return add_products([X_lora @ A.to(X.dtype).t(), X], [(s*B).to(X.dtype).t(), W.t()])

def share_of(add, X, W, A, B, s):
    "How much of the addition is left"
    base, exact = X.float() @ W.float().t(), s*(X.float() @ A.t() @ B.t())
    return share_left(add(X, X, W, A, B, s).float(), base, exact)

def half_units(X, W, A, B):
    "The median size of the addition at scale 1, in half units in the last place of the base's output"
    base, exact = X.float() @ W.float().t(), X.float() @ A.t() @ B.t()
    return (exact.abs()/(base.abs()*2**-9)).median().item()

def make_matrices():
    "Input, weight, and the adapter's two matrices; the input and the weight in each type"
    import torch
    torch.manual_seed(0)
    rows, width, out = (16384, 2048, 8192) if has_gpu() else (64, 256, 512)
    X, W = torch.randn(rows, width, device=device()), torch.randn(out, width, device=device())*0.03
    A, B = torch.randn(16, width, device=device())*0.02, torch.randn(out, 16, device=device())*1e-5
    X, W = X.bfloat16(), W.bfloat16()
    return {"bfloat16": (X, W, A, B), "float16": (X.half(), W.half(), A, B)}

def run(args):
    import unsloth, torch # unsloth before transformers and peft
    from descgen.layers import addmm_lora
    found, given = [], make_matrices()
    for name, matrices in given.items():
        for s in SCALES:
            shares = {"unsloth": share_of(add_as_unsloth, *matrices, s),
                      "descgen": share_of(addmm_lora, *matrices, s)}
            found.append({"type": name, "scale": s, "compiled": False, **shares})
    for s in COMPILED_SCALES if has_gpu() else ():
        share = share_of(torch.compile(addmm_lora), *given["bfloat16"], s)
        found.append(
            {"type": "bfloat16", "scale": s, "compiled": True, "unsloth": None, "descgen": share})
    for s in SCALES:
        share = share_of(add_as_compiled_training, *given["bfloat16"], s)
        found.append(
            {"type": "bfloat16", "scale": s, "compiled": False, "training": True, "unsloth": None, "descgen": share})
    summary = {"half_units": half_units(*given["bfloat16"]), "shares": found}
    save_result(args.results, f"gpu-rounding{'-small' if args.small else ''}", summary)

def tables(read):
    record = read("gpu-rounding")
    if not record:
        return {}
    rows = []
    s = record["summary"]
    for f in s["shares"]:
        way = ", compiled training" if f.get("training") else ", compiled" if f["compiled"] else ""
        scale = f"{f['scale']}{way}"
        unsloth = "" if f["unsloth"] is None else f"{f['unsloth']:.3f}"
        rows.append([f["type"], scale, unsloth, f"{f['descgen']:.3f}"])
    about = f"The addition at scale 1 is {s['half_units']:.3f} half units in the last place. "
    about += circumstances(record, *CARD)
    table = markdown_table(["type", "scale", "Unsloth", "descgen"], rows)
    return {"gpu-rounding": [about, "", *table]}
