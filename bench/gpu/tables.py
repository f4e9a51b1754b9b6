"""The tables of the last GPU run, from what it kept in outputs/bench/gpu.

    python bench/gpu/tables.py            # print them
    python bench/gpu/tables.py --write    # and put them between the markers in bench/README.md
"""
import re, statistics, sys

from measure import ROOT, kept
from precision import WAYS

def table(head, rows): return ["", "| " + " | ".join(head) + " |", "|" + "---|"*len(head), *("| " + " | ".join(map(str, r)) + " |" for r in rows), ""] if rows else []

HEAD = ["useful tokens a second", "peak memory", "card's rate", "share of it"]

def speed_row(name, runs):
    "A table's row: medians, and the least memory, for what ran before in a process may have left some; the reason where a way did not run"
    ran = [r for r in runs if "gb" in r]
    if not ran: return [*name.split(": ", 1), runs[0]["failed"], *[""]*3]
    middle = {k: statistics.median(r[k] for r in ran) for k in ("tokens a second", "card", "share of the card")}
    return [*name.split(": ", 1), f"{middle['tokens a second']:,.0f}" + f" ({len(ran)} runs)"*(len(ran) > 1), f"{min(r['gb'] for r in ran):.1f} GB", f"{middle['card']/1e12:.0f} TFLOP/s", f"{middle['share of the card']:.0%}"]

def speed():
    "Tokens a second, memory and share of the card's rate"
    both, alone = [kept(f"speed-{side}-llama").get("found", {}) for side in ("unsloth", "plain")], kept("speed-settings-llama").get("found", {})
    rows = sorted(speed_row(*item) for found in both for item in found.items())
    lines = ["Training Llama 3.2 1B's shape on all tokens; the card's rate in bf16 products was measured before each process.", *table(["settings", "", *HEAD], rows)] if rows else []
    return lines + (["What each setting does, descgen alone.", *table(["settings", *HEAD], [speed_row(*item) for item in alone.items()])] if alone else [])

def generate():
    "Descriptions a minute"
    found = {side: kept(f"generate-{side}-llama") for side in ("unsloth", "plain")}
    sizes = list(found["unsloth"] or found["plain"])
    cell = lambda side, size: f"{found[side][size]['a minute']:,.0f}" if size in found[side] else ""
    return (["Descriptions of 128 tokens a minute, 4 bits, with an adapter."] + table(["batch", "descgen", "transformers + PEFT"], [[s, cell("unsloth", s), cell("plain", s)] for s in sizes])) if sizes else []

def losses_of(model, bits):
    "The same adapters, judged in every way; before training first"
    mine, plain = kept(f"precision-unsloth-{model}-{bits}"), kept(f"precision-plain-{model}-{bits}")
    of = lambda found, key: f"{found[key]:.4f}" if key in found else ""
    names = [k.removeprefix("loss of ").removesuffix(", stock") for k in mine if k.startswith("loss of ") and k.endswith(", stock")]
    rows = [["before", of(plain, "loss of first, float32"), of(mine, "before"), "", of(plain, "loss of first, bf16 eager")]] if mine else []
    rows += [[f"{n} steps", of(plain, f"loss of {n}, float32"), *(of(mine, f"loss of {n}, {w}") for w in WAYS), of(plain, f"loss of {n}, bf16 eager")] for n in names]
    return [[f"{model}, {bits} bits", *r] for r in rows + [[f"float32 {n} steps", of(plain, f"loss of float32 {n}, float32"), "", "", ""] for n in (4, 24) if f"loss of float32 {n}, float32" in plain]]

def decoding_of(model, bits):
    "The forced text's loss, token by token, and the time of a step in the speed measurement"
    mine, plain = kept(f"precision-unsloth-{model}-{bits}"), kept(f"precision-plain-{model}-{bits}").get("decoding, float32", {})
    times = kept(f"precision-speed-{model}-{bits}").get("decoding", {})
    def cell(way, n): return f"{mine[f'decoding, {way}'][n]:.4f}" + (f" ({times[f'decoding, {way}'][n + ', ms a step']:.1f} ms)" if times else "")
    return [[f"{model}, {bits} bits", n, f"{plain[n]:.4f}" if plain else "", *(cell(w, n) for w in WAYS)] for n in ("one at a time", "sixteen") if "decoding, stock" in mine]

def precision():
    "Losses, what comes through, and what it costs"
    which = [("llama", 4), ("llama", 16), ("embedded", 4), ("embedded", 16)]
    head = ["base", "adapter trained by", "float32", "Unsloth", "Unsloth, added once", "transformers + PEFT, bf16"]
    lines = ["Loss of the same adapter weights on other rows, nats a completion token."] + table(head, [r for m, b in which for r in losses_of(m, b)])
    through = [[f"{m}, {b} bits", name, *(f"{v:.3f}" for v in found.values())] for m, b in which for name, found in kept(f"precision-unsloth-{m}-{b}").get("come through", {}).items()]
    if through: lines += ["Share of an adapter's addition that comes through in a middle layer, after four steps."] + table(["base", "matrix", "Unsloth", "addmm that begins at 1 times the addition", "added once", "addition in half units"], through)
    kept_shares = [[*name.split(", ", 1), f"{v['stock']:.3f}" if "stock" in v else "", f"{v['added once']:.3f}"] for name, v in kept("adding").items()]
    if kept_shares: lines += ["The same of random numbers in the shape of Llama's gate, 0.013 half units in the last place at scale 1."] + table(["type", "scale", "Unsloth", "added once"], kept_shares)
    decoded = [r for m, b in which for r in decoding_of(m, b)]
    if decoded: lines += ["Loss of a forced text where `generate` computes each token by itself, after four steps; time of a step."] + table(["base", "rows", "float32, whole", "Unsloth", "descgen"], decoded)
    costs = [[f"{m}, {b} bits", name, *(f"{r[w]:,.0f}" for w in WAYS), f"{r['added once']/r['stock'] - 1:+.1%}"] for m, b in which for name, r in kept(f"precision-speed-{m}-{b}").items() if name != "decoding"]
    if costs: lines += ["What it costs: training tokens a second."] + table(["base", "settings", "Unsloth", "added once", ""], costs)
    return lines if any(line.startswith("| llama") or line.startswith("| embedded") for line in lines) else []

def correct():
    "Proofs, as they were found"
    def said(v): return f"{v:.3g}" if isinstance(v, float) else " and ".join(map(said, v)) if isinstance(v, list) else str(v)
    rows = [[model, what, ", ".join(f"{k} {said(v)}" for k, v in (found.items() if isinstance(found, dict) else [("nats a token", found)]))]
        for model in ("llama", "embedded") for what, found in kept(f"correct-{model}").items()]
    return (["What holds on this card."] + table(["model", "", ""], rows)) if rows else []

def notebook():
    "The main notebook's runs"
    rows = [[model, r["plan"]["steps"], f"{r['plan']['tokens']:,}", f"{r['seconds']:.0f} s", f"{r['peak_memory_gb']:.1f} GB", " → ".join(f"{r['test_loss'][k]:.3f}" for k in ("before", "after"))]
        for model in ("llama", "embedded") if (r := kept(f"notebook-{model}"))]
    return (["The main notebook by Papermill, with its defaults."] + table(["model", "steps", "tokens", "all of it", "peak memory", "test loss"], rows)) if rows else []

def tables(): return "\n".join([kept("machine").get("machine", ""), "", *speed(), *generate(), *precision(), *correct(), *notebook()])

if __name__ == "__main__":
    text = tables()
    print(text)
    if "--write" in sys.argv:
        readme = ROOT/"bench"/"README.md"
        page, n = re.subn(r"(?s)(<!-- gpu -->\n).*?(<!-- /gpu -->)", lambda m: f"{m[1]}{text}\n{m[2]}", readme.read_text(encoding="utf-8"))
        if not n: sys.exit("bench/README.md has no <!-- gpu --> and <!-- /gpu --> to write between")
        readme.write_text(page, encoding="utf-8")
