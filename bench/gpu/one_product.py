"""A way to add a LoRA adapter's product so that a 16-bit base does not swallow it.

Unsloth multiplies by the base, rounds to 16 bits, and adds the adapter's product to what was rounded: of an addition below half a unit in the last place most
is lost. Here the adapter stands beside the base in one matrix, [W, s·B], and its inner values beside the input, [x, A·x]: one matrix multiplication, which sums in
float32 and rounds once. (`addmm` does not help on a GPU: cuBLAS rounds the product before it adds, whichever of the two products comes second.)

The input is copied once for all matrices that read it. The backward pass stays Unsloth's own.
"""
import sys, weakref
from contextlib import contextmanager
from functools import cache

import torch

_kept = {} # the input that was copied last, and the copy; gone with the input

def _fits(X, W, W_quant):
    "Whether this is a forward pass over a weight of the input's 16 bits, or of 4 that unpack to them; a transposed one is of a backward pass"
    if W.shape[0] == 1 or not W.is_contiguous() or X.dtype not in (torch.bfloat16, torch.float16): return False
    return W.dtype == X.dtype if W_quant is None else type(W_quant).__name__ == "QuantState" and W_quant.dtype == X.dtype

def _room(X, rank):
    "The rows of an input with room for an adapter's inner values behind them"
    if _kept.get("of", bool)() is not X or _kept["copy"].shape[1] != X.shape[-1] + rank:
        _kept.clear()
        copy = X.new_empty(X.numel()//X.shape[-1], X.shape[-1] + rank)
        copy[:, :X.shape[-1]] = X.reshape(len(copy), -1)
        _kept.update(of=weakref.ref(X, lambda _: _kept.clear()), copy=copy)
    return _kept["copy"]

def _left(X, X_lora, A):
    "[x, A·x]; traced code, which cannot keep a copy, makes it each time"
    rows, A = X_lora.reshape(-1, X.shape[-1]), A.to(X.dtype).t()
    if torch.compiler.is_compiling(): return torch.cat([X.reshape(rows.shape), rows @ A], 1)
    copy = _room(X, A.shape[1])
    torch.mm(rows, A, out=copy[:, X.shape[-1]:])
    return copy

def _product(X, X_lora, W, W_quant, A, B, s, use_global_buffer):
    "X times the base and X_lora times the adapter, in one"
    from unsloth.kernels.utils import fast_dequantize
    W = fast_dequantize(W, W_quant, use_global_buffer=use_global_buffer, dtype=X.dtype)
    return (_left(X, X_lora, A) @ torch.cat([W, (B*s).to(X.dtype)], 1).t()).view(*X.shape[:-1], -1)

@cache
def training():
    "Unsloth's functions of a forward pass, and what replaces them"
    from unsloth.kernels import fast_lora, utils
    stock, stock_ext = utils.matmul_lora, fast_lora._matmul_lora_ext
    def matmul_lora(X, W, W_quant, A, B, s, out=None, use_global_buffer=True):
        if A is None or not _fits(X, W, W_quant): return stock(X, W, W_quant, A, B, s, out, use_global_buffer)
        return _product(X, X, W, W_quant, A, B, s, use_global_buffer)
    def _matmul_lora_ext(X, X_lora, W, W_quant, A, B, S, bias):
        if A is None or bias is not None or not _fits(X, W, W_quant): return stock_ext(X, X_lora, W, W_quant, A, B, S, bias)
        return _product(X, X_lora, W, W_quant, A, B, S, False)
    return {stock: matmul_lora, stock_ext: _matmul_lora_ext}

@cache
def decoding():
    "Unsloth's layer for one token at a time, and one whose sum is made in float32: a token's output is small, so that costs nothing"
    from unsloth.kernels import utils
    stock = utils.fast_linear_forward
    def fast_linear_forward(proj, X, temp_lora=None, out=None):
        W, W_quant, A, B, s, bias = utils.get_lora_parameters_bias(proj)
        if X.shape[1] != 1 or A is None or bias is not None or not _fits(X, W, W_quant): return stock(proj, X, temp_lora, out)
        rows, W = X.reshape(len(X), -1), utils.fast_dequantize(W, W_quant, use_global_buffer=True, dtype=X.dtype)
        delta = (rows @ A.to(X.dtype).t()).float() @ (B.float()*s).t()
        exact = (torch.mm(rows, W.t(), out_dtype=torch.float32) + delta)[:, None]
        return exact.to(X.dtype) if out is None else out.copy_(exact)
    return {stock: fast_linear_forward}

def swap(replacements):
    "Put functions in the place of others, in each of Unsloth's modules that holds one; returns how many places there were"
    places = [(m, name, value) for key, m in list(sys.modules.items()) if key.startswith("unsloth") for name, value in list(vars(m).items())
        if any(value is old for old in replacements)]
    for module, name, old in places: setattr(module, name, replacements[old])
    return len(places)

@contextmanager
def one_product(on=True, decode=False):
    "Unsloth with the adapter and the base in one product; where there is no GPU, as it is"
    change = training() | (decoding() if decode else {}) if on and torch.cuda.is_available() else {}
    swap(change)
    try: yield
    finally: swap({new: old for old, new in change.items()})
