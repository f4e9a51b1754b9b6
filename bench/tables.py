"""Render the tables of bench/README.md from the results.

    python -m bench tables            # write them between their markers
    python -m bench tables --check    # only tell whether the page is up to date

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`. Markers without a result keep their text.
"""
import re
import sys
from functools import partial

from .measure import ROOT, read_result

README = ROOT/"bench"/"README.md"

def add_options(parser):
    parser.add_argument("--check", action="store_true",
        help="write nothing; end with 1 if the page would change")

def all_tables(folder):
    "Marker → text, of all subjects"
    from .__main__ import SUBJECTS, load_subject
    found = {}
    for name in SUBJECTS:
        make = getattr(load_subject(name), "tables", None)
        if make:
            found |= make(partial(read_result, folder))
    return {marker: "\n".join(lines) for marker, lines in found.items()}

def render(page, tables):
    "The page with each table between its markers"
    for marker, text in tables.items():
        pattern = rf"(?s)(<!-- {re.escape(marker)} -->\n).*?(<!-- /{re.escape(marker)} -->)"
        page, n = re.subn(pattern, lambda m: f"{m[1]}{text}\n{m[2]}", page)
        if n != 1:
            sys.exit(f"bench/README.md must have <!-- {marker} --> and <!-- /{marker} --> once; "
                     f"found {n} times.")
    return page

def run(args):
    page = README.read_text(encoding="utf-8")
    rendered = render(page, all_tables(args.results))
    if args.check:
        sys.exit(None if page == rendered
            else "bench/README.md is not up to date: python -m bench tables")
    README.write_text(rendered, encoding="utf-8")
