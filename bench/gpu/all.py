"""Everything that is measured on a GPU, by one command.

    python -m bench gpu                            # all; much of the time is imports, compilation and loading
    python -m bench gpu --only speed write         # some of it
    python -m bench gpu --missing                  # only what has no result yet: after an interruption
    python -m bench gpu --small                    # without a GPU: a tiny model, a little of everything

Parts of a group start together, so that their libraries load at once, and then measure one after the other.
Their logs are in outputs/bench/gpu.
"""
import os
import subprocess
import sys
import time
from dataclasses import dataclass

from ..measure import ROOT, SCRATCH
from .card import GPU_SCRATCH, add_model_options
from .precision import BASES
from .write import ALL_SIDES

KINDS = ["speed", "settings", "compiled", "write", "proofs", "precision", "rounding", "notebook", "fallbacks"]

@dataclass(frozen=True)
class Part:
    "A subject with its words on the command line"
    kind: str # of KINDS, or "models"
    subject: str
    words: tuple = () # before WORK, and part of the result's name
    options: tuple = ()
    takes_models: bool = True # WORK and --rows

    def name(self):
        "Of the result and of the log"
        return "-".join([self.subject, *self.words])

def add_options(parser):
    parser.add_argument("--only", nargs="*", choices=KINDS)
    parser.add_argument("--match", default="",
        help="only parts with this in their name, such as embedded")
    parser.add_argument("--missing", action="store_true", help="only parts without a result")
    parser.add_argument("--rounds", type=int, help="of gpu-speed and gpu-compiled")
    add_model_options(parser, with_model=False)
    work = next(a for a in parser._actions if a.dest == "work")
    work.nargs, work.default = "?", SCRATCH/"gpu-models"

def precision_parts(side, bases):
    return [Part("precision", "gpu-precision", (side, model, str(bits))) for model, bits in bases]

def make_groups():
    "Parts that start together, one group after the other"
    models = ("llama", "embedded")
    proofs = [Part("proofs", "gpu-proofs", (model,)) for model in models]
    rounding = Part("rounding", "gpu-rounding", takes_models=False)
    speeds = [Part("speed", "gpu-speed", (side, "llama")) for side in ("unsloth", "plain")]
    settings = Part("settings", "gpu-speed", ("settings", "llama"))
    compiled = [Part("compiled", "gpu-compiled", words)
                for words in (("speed", "llama"), ("profile", "llama"), ("loss", "embedded"))]
    writes = [Part("write", "gpu-write", (side, "llama")) for side in ALL_SIDES]
    return [
        [Part("models", "gpu-models", (model,)) for model in models],
        [*proofs, *precision_parts("unsloth", BASES), rounding],
        [*precision_parts("plain", BASES),
         Part("notebook", "gpu-notebook", ("embedded",), ("--max-steps", "60"))],
        [*speeds, settings, *writes, *precision_parts("speed", BASES[:2])],
        compiled,
        [Part("notebook", "gpu-notebook", ("llama",))],
        [Part("fallbacks", "gpu-fallbacks")]]

def needs_gpu(part):
    "4 bits, and TRL without Unsloth"
    return "4" in part.words or part.name().startswith(("gpu-precision-speed", "gpu-speed-plain"))

def is_wanted(part, args):
    "Whether the command line asks for a part"
    if part.kind == "models":
        return True
    if args.small and needs_gpu(part):
        return False
    asked = (not args.only or part.kind in args.only) and args.match in part.name()
    result = args.results/f"{part.name()}{'-small' if args.small else ''}.json"
    return asked and not (args.missing and result.exists())

def start(part, args):
    "A part as a process of its own, with a log of its own"
    words = [*part.words, *([args.work.resolve()] if part.takes_models else []), *part.options]
    words += ["--results", args.results]
    if part.takes_models:
        words += ["--rows", args.rows.resolve()]
    if args.small:
        words += ["--small"]
    if part.subject in ("gpu-speed", "gpu-compiled") and args.rounds:
        words += ["--rounds", args.rounds]
    # of two processes in one folder, one finds half a file
    compiled = GPU_SCRATCH/f"compiled-{part.name()}"
    own = {"UNSLOTH_COMPILE_LOCATION": str(compiled), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "bench", part.subject, *map(str, words)]
    with open(GPU_SCRATCH/f"{part.name()}.log", "w") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | own)

def run_group(parts, args):
    "Run parts together; print how each ended and when"
    begin = time.time()
    running = {part.name(): start(part, args) for part in parts}
    for name, process in running.items():
        code = process.wait()
        print(f"{time.time() - begin:6.0f} s  {name}"
            + (f"  FAILED ({code})" if code else ""), flush=True)
        if code:
            log = (GPU_SCRATCH/f"{name}.log").read_text(errors="replace")
            print("\n".join(log.splitlines()[-12:]), flush=True)

def run(args):
    GPU_SCRATCH.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    for parts in make_groups():
        wanted = [part for part in parts if is_wanted(part, args)]
        run_group(wanted, args)
