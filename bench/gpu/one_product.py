"""Unsloth with and without descgen's one product for base and adapter (`descgen.layers`), in one process."""
from contextlib import contextmanager

import torch

@contextmanager
def one_product(on=True, decode=False):
    "Unsloth with the adapter and the base in one product, or as it comes; where there is no GPU, as it is. Decoding is Unsloth's own either way"
    from descgen.layers import swap, unsloth_functions
    if torch.cuda.is_available(): swap(unsloth_functions() if on else {new: old for old, new in unsloth_functions().items()})
    try: yield
    finally:
        if torch.cuda.is_available(): swap({new: old for old, new in unsloth_functions().items()})
