"""Make a catalogue of any size in the shape of LF-Amazon-1.3M's trn.json.

    python -m bench catalogue outputs/bench/trn.json --rows 2248619

It has that file's row count, keys, lengths, entities, empty contents and duplicates. The words come from real
product rows, cut into runs of five and put together again at random. So two contents are alike only if they
were made alike. The constants say what is known of the real file and what is a guess.
"""
import json
import os
import random
import re
from pathlib import Path

ROWS = 2_248_619
MEDIAN, SIGMA = 398, 1.0 # characters of a content; the quartiles 194 and 805 give the width
LONGEST, LONGEST_TITLE = 197_622, 1_999 # characters
# guesses that leave the 1.36 million rows that are known to be left
EMPTY, SHORT, DUPLICATE = .27, .02, .10
NEAR_DUPLICATE = .02 # a guess: an earlier content with a few of its words exchanged
DIRTY = .3 # a guess: rows with numeric entities
ENTITIES = ["&#8217;", "&#8220;", "&#8221;", "&#8211;", "&#8212;", "&#233;", "&amp;", "&#x27;"]
KEPT = 50_000 # earlier contents to duplicate

def add_options(parser):
    parser.add_argument("path", type=Path)
    parser.add_argument("--rows", type=int, default=ROWS)
    add_words_option(parser)

def add_words_option(parser):
    "The option that all users of a catalogue have"
    parser.add_argument("--words", nargs="+", type=Path,
                        default=[Path("data/sample.jsonl")], metavar="FILE",
                        help="JSON Lines files whose words the rows are made of")

def runs_of_words(files):
    "Runs of five words from the contents of files, and the words of their titles"
    rows = [json.loads(line) for f in files for line in open(f, encoding="utf-8")]
    words = re.sub(r"<[^>]*>|&\S+;", " ", " ".join(r["content"] for r in rows)).split()
    runs = [" ".join(words[i:i + 5]) for i in range(0, len(words) - 5, 5)]
    return runs, " ".join(r["title"] for r in rows).split()

def add_entities(text, rng):
    "The same text with entities after one word in forty"
    words = text.split(" ")
    for _ in range(1 + len(words)//40):
        words[rng.randrange(len(words))] += rng.choice(ENTITIES)
    return " ".join(words)

def exchange_words(text, runs, rng):
    "The same text with one word in fifty exchanged, at least one"
    words = text.split(" ")
    for _ in range(1 + len(words)//50):
        words[rng.randrange(len(words))] = rng.choice(runs).split(" ")[0]
    return " ".join(words)

def new_content(runs, rng):
    "A content of random length"
    n = min(int(rng.lognormvariate(0, SIGMA)*MEDIAN), 40_000)
    text = " ".join(rng.choices(runs, k=1 + n//30))[:max(n, 25)]
    return add_entities(text, rng) if rng.random() < DIRTY else text

def make_content(runs, rng, recent):
    "A content: empty, short, a duplicate, a near-duplicate or new"
    kind = rng.random()
    if kind < EMPTY:
        return ""
    if kind < EMPTY + SHORT:
        return rng.choice(runs)[:15]
    if kind < EMPTY + SHORT + DUPLICATE and recent:
        return rng.choice(recent)
    if kind < EMPTY + SHORT + DUPLICATE + NEAR_DUPLICATE and recent:
        return exchange_words(rng.choice(recent), runs, rng)
    return new_content(runs, rng)

def remember(text, i, recent, rng):
    "Keep a content, so that later rows can duplicate it"
    if len(text) <= 25:
        return
    if len(recent) < KEPT:
        recent.append(text)
    elif i % 20 == 0:
        recent[rng.randrange(KEPT)] = text

def make_rows(n, runs, words, seed=42):
    "The rows, one after the other"
    rng, recent = random.Random(seed), []
    for i in range(n):
        text = make_content(runs, rng, recent)
        remember(text, i, recent, rng)
        title = " ".join(rng.choices(words, k=max(1, int(rng.lognormvariate(2.1, .5)))))
        if i == n//2: # the longest of all
            title, text = (title + " ")*LONGEST_TITLE, (text or "long ")*LONGEST
        if rng.random() < .02:
            title += "\n"
        if rng.random() < .05:
            title = add_entities(title, rng)
        targets = sorted(rng.randrange(1_305_265) for _ in range(int(rng.expovariate(1/6))))
        yield {"uid": f"{i:010d}", "title": title[:LONGEST_TITLE], "content": text[:LONGEST],
               "target_ind": targets, "target_rel": [1.0]*len(targets)}

def make_catalogue(path, n, files, seed=42):
    "Write the file completely or not at all; an existing file stays as it is"
    path = Path(path)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    with open(unfinished, "w", encoding="utf-8") as f:
        for row in make_rows(n, *runs_of_words(files), seed):
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(unfinished, path)
    return path

def run(args):
    print(make_catalogue(args.path, args.rows, args.words))
