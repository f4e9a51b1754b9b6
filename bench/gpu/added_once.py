"""Unsloth with and without descgen's way to add an adapter (`descgen.layers`), in one process."""
from contextlib import contextmanager

import torch

@contextmanager
def added_once(on=True):
    "Unsloth with the adapter and the base rounded once, or as it comes; where there is no GPU, as it is"
    from descgen.layers import patch_functions, unsloth_replacements
    if torch.cuda.is_available(): patch_functions(unsloth_replacements() if on else {new: old for old, new in unsloth_replacements().items()})
    try: yield
    finally:
        if torch.cuda.is_available(): patch_functions({new: old for old, new in unsloth_replacements().items()})
