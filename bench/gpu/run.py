"""Everything that is measured on a GPU, by one command; the tables are printed last.

    python bench/gpu/run.py                      # all of it; much of the time goes into imports, compilation and loading
    python bench/gpu/run.py --only speed generate    # some of it; what was measured before is kept, and a second call goes on where the first was
    python bench/gpu/run.py --small              # a try without a GPU: a tiny model, a little of everything

Parts that take time side by side are started together, so that their libraries load at once, and then measure by turns. Results and logs: outputs/bench/gpu.
`python bench/gpu/tables.py --write` puts the tables into bench/README.md.
"""
import argparse, os, subprocess, sys, time
from pathlib import Path

from measure import KEPT, keep, machine
from tables import tables

HERE = Path(__file__).parent
BITS = [("llama", 4), ("llama", 16), ("embedded", 4), ("embedded", 16)]

def parts(work):
    "Groups of commands: those of a group run together, one group after the other"
    def precision(side, *which): return [("precision", f"precision-{side}-{m}-{b}", ["precision.py", side, m, b, work]) for m, b in which]
    def both(script): return [(script, f"{script}-{side}-llama", [f"{script}.py", side, "llama", work]) for side in ("unsloth", "plain")]
    def notebook(model, steps): return ("notebook", f"notebook-{model}", ["notebook.py", model, work, "--max-steps", steps])
    return [[("models", f"models-{m}", ["models.py", m, work]) for m in ("llama", "embedded")],
        [("correct", f"correct-{m}", ["correct.py", m, work]) for m in ("llama", "embedded")] + precision("unsloth", *BITS) + [("precision", "adding", ["adding.py"])],
        precision("plain", *BITS) + [notebook("embedded", 60)],
        both("speed") + [("settings", "speed-settings-llama", ["speed.py", "settings", "llama", work])] + both("generate") + precision("speed", *BITS[:2]),
        [notebook("llama", 200)]]

def start(name, command, args):
    "One part as a process of its own, with a log of its own"
    plain = command[0] in ("models.py", "adding.py") # which read no rows
    small = [] if not args.small or command[0] == "adding.py" else ["small"] if plain else ["--small"]
    rows = [] if plain else ["--rows", args.rows]
    own = {"UNSLOTH_COMPILE_LOCATION": str((KEPT/f"compiled-{name}").resolve()), "PYTHONUNBUFFERED": "1"} # of two processes in one folder, one finds half a file
    with open(KEPT/f"{name}.log", "w") as log:
        return subprocess.Popen([sys.executable, *map(str, [HERE/command[0], *command[1:], *rows, *small])], stdout=log, stderr=log, env=os.environ | own)

def together(group, args):
    "Run a group; say of each part how it ended and when"
    begin = time.time()
    running = {name: start(name, command, args) for name, command in group}
    for name, process in running.items():
        code = process.wait()
        print(f"{time.time() - begin:6.0f} s  {name}" + (f"  FAILED ({code})" if code else ""), flush=True)
        if code: print("\n".join((KEPT/f"{name}.log").read_text(errors="replace").splitlines()[-12:]), flush=True)

def main(args):
    KEPT.mkdir(parents=True, exist_ok=True)
    keep("machine", {"machine": machine()})
    for group in parts(args.work):
        asked = [(name, command) for kind, name, command in group if kind == "models" or (not args.only or kind in args.only) and args.match in name]
        wanted = [(name, command) for name, command in asked if not (KEPT/f"{name}.json").exists()]
        if args.small: wanted = [w for w in wanted if "-4" not in w[0] and "speed-plain" not in w[0] and "precision-speed" not in w[0]] # 4 bits, and TRL without Unsloth, want a GPU
        together(wanted, args)
    print(tables())

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=["speed", "settings", "generate", "correct", "precision", "notebook"])
    parser.add_argument("--match", default="", help="only parts with this in their name, such as embedded")
    parser.add_argument("--work", type=Path, default=Path("outputs/bench/gpu-models"), help="where the models are made")
    parser.add_argument("--rows", type=Path, default=Path("data/sample.jsonl")); parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    main(args)
