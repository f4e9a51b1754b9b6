"""Make a catalogue in the shape of LF-Amazon-1.3M's trn.json: its row count, keys, lengths, entities, empty and repeated contents.

    python bench/make_catalogue.py outputs/bench/trn.json --rows 2248619

The words are those of real product rows, cut into pieces of five and put together again at random, so that no two contents are alike
unless they were made so. What is known of the real file stands in the constants; what is not known (how its losses divide into empty, short
and repeated contents, how many are near copies) is a guess and says so.
"""
import argparse, json, os, random, re
from itertools import islice
from pathlib import Path

from tqdm import tqdm

ROWS = 2_248_619
MEDIAN, SIGMA, LONGEST, LONGEST_TITLE = 398, 1.0, 197_622, 1_999 # characters; the quartiles 194 and 805 give the width
EMPTY, SHORT, REPEAT = .27, .02, .10 # guesses that leave the 1.36 million rows that are known to be left
NEAR = .02 # a guess: an earlier content with a few of its pieces exchanged
DIRTY = .3 # a guess: rows with numeric entities
ENTITIES = ["&#8217;", "&#8220;", "&#8221;", "&#8211;", "&#8212;", "&#233;", "&amp;", "&#x27;"]

def pieces(files):
    "Runs of five words, and titles, from real rows"
    rows = [json.loads(line) for f in files for line in open(f, encoding="utf-8")]
    words = re.sub(r"<[^>]*>|&\S+;", " ", " ".join(r["content"] for r in rows)).split()
    return [" ".join(words[i:i + 5]) for i in range(0, len(words) - 5, 5)], [w for r in rows for w in r["title"].split()]

def dirty(text, rng):
    "The same text with some of its spaces' neighbours written as entities"
    words = text.split(" ")
    for _ in range(1 + len(words)//40): words[rng.randrange(len(words))] += rng.choice(ENTITIES)
    return " ".join(words)

def content(pool, rng, recent):
    "A content of random length: new, empty, short, repeated, or nearly repeated"
    kind = rng.random()
    if kind < EMPTY: return ""
    if kind < EMPTY + SHORT: return rng.choice(pool)[:15]
    if kind < EMPTY + SHORT + REPEAT and recent: return rng.choice(recent)
    if kind < EMPTY + SHORT + REPEAT + NEAR and recent: return near(rng.choice(recent), pool, rng)
    n = min(int(rng.lognormvariate(0, SIGMA)*MEDIAN), 40_000)
    text = " ".join(rng.choices(pool, k=1 + n//30))[:max(n, 25)]
    return dirty(text, rng) if rng.random() < DIRTY else text

def near(text, pool, rng):
    "One word in fifty exchanged, at least one"
    words = text.split(" ")
    for _ in range(1 + len(words)//50): words[rng.randrange(len(words))] = rng.choice(pool).split(" ")[0]
    return " ".join(words)

def rows(n, pool, words, seed=42):
    "The rows, one after the other"
    rng, recent = random.Random(seed), []
    for i in range(n):
        text = content(pool, rng, recent)
        if len(text) > 25:
            if len(recent) < 50_000: recent.append(text)
            elif i % 20 == 0: recent[rng.randrange(50_000)] = text
        title = " ".join(rng.choices(words, k=max(1, int(rng.lognormvariate(2.1, .5)))))
        if i == n//2: title, text = (title + " ")*LONGEST_TITLE, (text or "long ")*LONGEST
        if rng.random() < .02: title += "\n"
        if rng.random() < .05: title = dirty(title, rng)
        targets = sorted(rng.randrange(1_305_265) for _ in range(int(rng.expovariate(1/6))))
        yield {"uid": f"{i:010d}", "title": title[:LONGEST_TITLE], "content": text[:LONGEST], "target_ind": targets, "target_rel": [1.0]*len(targets)}

def make_catalogue(path, n=ROWS, source="../shared/data", seed=42):
    "Write the file whole or not at all; one that is there is left as it is"
    path, source = Path(path), Path(source)
    if path.exists(): return path
    files = sorted(source.glob("leipzig_*.jsonl")) or ["data/sample.jsonl"]
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    with open(aside, "w", encoding="utf-8") as f:
        for row in tqdm(rows(n, *pieces(files), seed), total=n, desc=path.name): f.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(aside, path)
    return path

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path"); parser.add_argument("--rows", type=int, default=ROWS)
    args = parser.parse_args()
    print(make_catalogue(args.path, args.rows))
