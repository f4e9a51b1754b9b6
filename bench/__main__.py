"""Measurements of descgen beside other ways to do the same, and beside the machine's limit.

    python -m bench                   # this list
    python -m bench NAME --help       # what a measurement does, and its options
    python -m bench NAME [options]    # measure, and write bench/results/NAME[-VARIANT].json
    python -m bench tables            # render all results into bench/README.md

Start it in the project's folder.
"""
import argparse
import sys
from importlib import import_module
from pathlib import Path

from .measure import RESULTS, ROOT

SUBJECTS = { # name → module
    "data": "data", "formats": "formats", "train": "train",
    "sweep": "sweep", "write": "write", "generate": "generate", "serve": "serve", "sources": "sources",
    "processes": "processes", "fsdp": "fsdp", "evaluate": "evaluate", "runs": "runs", "catalogue": "catalogue",
    "tables": "tables",
    "gpu": "gpu.all", "gpu-models": "gpu.models",
    "gpu-speed": "gpu.speed", "gpu-compiled": "gpu.compiled", "gpu-write": "gpu.write",
    "gpu-hours": "gpu.hours", "gpu-texts": "gpu.texts",
    "gpu-precision": "gpu.precision", "gpu-rounding": "gpu.rounding", "gpu-proofs": "gpu.proofs",
    "gpu-notebook": "gpu.notebook", "gpu-fallbacks": "gpu.fallbacks"}

def load_subject(name):
    "The module of a subject"
    return import_module(f"bench.{SUBJECTS[name]}")

def make_parser(name):
    "The options of a subject"
    module = load_subject(name)
    parser = argparse.ArgumentParser(prog=f"python -m bench {name}", description=module.__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    module.add_options(parser)
    parser.add_argument("--results", type=Path, default=RESULTS,
                        help="folder of the results (default: bench/results)")
    return parser

def list_subjects():
    "Each name with the first line of its module"
    lines = [f"  {name:15}{load_subject(name).__doc__.splitlines()[0]}" for name in SUBJECTS]
    return "\n".join([__doc__, *lines])

def main(words):
    "Run the subject that the command line names"
    if not words or words[0] in ("-h", "--help"):
        return print(list_subjects())
    name, *options = words
    if name not in SUBJECTS:
        sys.exit(f"No measurement is named {name!r}. Choose from: {', '.join(SUBJECTS)}.")
    args = make_parser(name).parse_args(options)
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT)) # for `import descgen`
    args.results = args.results.resolve()
    load_subject(name).run(args)

if __name__ == "__main__":
    main(sys.argv[1:])
