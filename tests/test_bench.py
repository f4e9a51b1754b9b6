"""The measurements of `bench` start, and the page shows their results."""
import json
import re
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser

import pytest

from bench.__main__ import SUBJECTS, list_subjects, load_subject, make_parser
from bench.data import (NOT_COUNTED, FirstStepReached, calls, cells_to_first_step, sources_index,
    sources_rows, stop_first_step, summarize_sources)
from bench.measure import RESULTS, interleaved, medians, read_result, save_result
from bench.tables import README, all_tables, render
from conftest import ROOT

def test_every_subject_is_listed_with_one_line():
    lines = list_subjects().splitlines()
    for name in SUBJECTS:
        assert [line for line in lines if re.match(rf"  {name} +\w|  {name} +`", line)], name

@pytest.mark.parametrize("name", SUBJECTS)
def test_subject_imports_and_explains_its_options(name, capsys):
    assert callable(load_subject(name).run)
    with pytest.raises(SystemExit) as end:
        make_parser(name).parse_args(["--help"])
    assert end.value.code == 0
    assert "--results" in capsys.readouterr().out

def test_every_file_of_bench_is_a_subject_or_is_used():
    paths = [p.relative_to(ROOT/"bench").with_suffix("") for p in (ROOT/"bench").rglob("*.py")]
    modules = {p.as_posix().replace("/", ".") for p in paths}
    helpers = {"__init__", "__main__", "gpu.__init__", "measure", "markdown", "gpu.card"}
    assert modules - helpers == set(SUBJECTS.values())

def test_command_lists_and_refuses_unknown_names():
    done = subprocess.run([sys.executable, "-m", "bench"],
        cwd=ROOT, capture_output=True, text=True, check=True)
    assert "gpu-speed" in done.stdout
    wrong = subprocess.run([sys.executable, "-m", "bench", "sped"],
        cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode and "sped" in wrong.stderr and "gpu-speed" in wrong.stderr

def test_start_needs_no_heavy_library():
    code = ("import sys; from bench.__main__ import list_subjects; list_subjects(); "
            "print({'torch', 'polars', 'unsloth'} & {*sys.modules})")
    done = subprocess.run([sys.executable, "-c", code],
        cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

def test_every_way_of_sources_has_a_label():
    from bench.sources import BEST, CHECKED, LABELS, WAYS
    assert {*WAYS, *CHECKED, *BEST} <= {*LABELS}
    assert {way for way, _ in [*CHECKED.values(), *BEST.values()]} <= {*WAYS}

def sources_files(folder, with_verified):
    "Files of texts of the way `supported` with two seeds, and the options that find them"
    from bench.sources import add_options, path_of
    parser = ArgumentParser()
    add_options(parser)
    options = ["rows.jsonl", "--name", "a", "--ways", "supported", "--seeds", "1", "2"]
    args = parser.parse_args(options)
    found = {name: 1 for name in ("prompt_tokens", "steps", "training_seconds", "writing_seconds")}
    found |= {"texts": ["It is red. It weighs 9 kg."], "machine": {}, "versions": {},
              "rows": [{"title": "Pot", "sources": []}]}
    for seed, has_verified in zip(args.seeds, with_verified):
        path = path_of(args, "supported", seed)
        path.parent.mkdir(exist_ok=True)
        more = {"verified": [f"It is light, {seed}."], "drafts": [f"It is best, {seed}."]} if has_verified else {}
        path.write_text(json.dumps(found | more), encoding="utf-8")
    return args

@pytest.mark.parametrize("with_verified", [(True, True), (True, False), (False, False)])
def test_sources_take_verified_texts_or_leave_sentences_out(with_verified, tmp_path, monkeypatch):
    from bench import sources
    from descgen.verified import Checks
    monkeypatch.setattr(sources, "SCRATCH", tmp_path)
    texts, written, rows, *_ = sources.collect(sources_files(tmp_path, with_verified))
    sources.add_checked_texts(texts, written, rows, Checks())
    written_again = [["It is light, 1."], ["It is light, 2."]]
    left_out = [["It is red."]]*2
    assert texts["verified"] == (written_again if all(with_verified) else left_out)
    assert texts.get("drafts") == ([["It is best, 1."], ["It is best, 2."]] if all(with_verified) else None)
    assert texts["anywhere"] == texts["strict"] == left_out
    is_new = sources.label_of("verified", {"written_again": [way for way, _ in written]}) == sources.LABEL_WRITTEN_AGAIN
    assert is_new == all(with_verified)
    assert sources.label_of("verified", {}) == sources.LABELS["verified"]

def test_page_shows_the_results():
    page, tables = README.read_text(encoding="utf-8"), all_tables(RESULTS)
    assert render(page, tables) == page, "bench/README.md is not up to date: python -m bench tables"
    assert set(re.findall(r"<!-- /(.*?) -->", page)) == set(tables)

def test_every_result_is_shown():
    read = set()
    def noting(name):
        read.add(name)
        return read_result(RESULTS, name)
    for name in SUBJECTS:
        getattr(load_subject(name), "tables", lambda read: None)(noting)
    assert {p.stem for p in RESULTS.glob("*.json")} - read == set()

def test_render_needs_each_marker_once():
    assert render("<!-- a -->\nold\n<!-- /a -->", {"a": "new"}) == "<!-- a -->\nnew\n<!-- /a -->"
    with pytest.raises(SystemExit, match="found 0 times"):
        render("nothing", {"a": "new"})

def test_cell_that_trains_is_found_by_its_call():
    assert calls("history = train(model, packs)", "train") and calls("run.train()", "train")
    assert not calls("from descgen.train import train\nplot(train, 'train(')", "train")

def test_cells_before_the_training_load_a_model_and_judge_it():
    *before, last = cells_to_first_step()
    assert calls(last.source, "train")
    assert not any("%" in line[:1] for cell in before for line in cell.source.splitlines())
    for name in NOT_COUNTED:
        assert [cell for cell in before if calls(cell.source, name)], name
    assert not any(calls(last.source, name) for name in NOT_COUNTED)

def test_every_trainer_stops_at_its_first_step(tmp_path):
    import unsloth
    import torch
    from transformers import Trainer, TrainingArguments
    class Model(torch.nn.Linear):
        def forward(self, x):
            return {"loss": super().forward(x).sum()}
    arguments = TrainingArguments(str(tmp_path), max_steps=1,
        report_to="none", use_cpu=True, disable_tqdm=True)
    def make_trainer():
        return Trainer(Model(2, 1), arguments, train_dataset=[{"x": torch.ones(2)}])
    with stop_first_step(), pytest.raises(FirstStepReached):
        make_trainer().train()
    assert make_trainer().train().global_step == 1

def test_ways_take_turns():
    order = []
    def way(name, value):
        return lambda: order.append(name) or value
    rounds = interleaved({"a": way("a", 1), "b": way("b", 3)}, 2, alternate=True)
    assert order == ["a", "b", "b", "a"]
    assert medians(rounds) == {"a": 1, "b": 3}

def test_writing_is_measured_after_a_third_of_the_titles():
    from bench.processes import texts_per_second
    assert texts_per_second([(5., 1), (10., 1), (12., 2), (13., 2)], 6) == 4/3

def test_entries_are_found_while_a_partial_file_is_written(tmp_path):
    from bench.processes import watch_texts
    path, ended, found = tmp_path/"texts.part", threading.Event(), []
    watcher = threading.Thread(target=watch_texts, args=(path, ended, found))
    watcher.start()
    for piece in (b'{"settings": {}}\n{"window": 0, "n_', b'lines": 2}\n{"uid": 1}\n',
                  b'{"uid": 2}\n{"window": 0, "n_lines": 3}\n{"uid": "left incom'):
        with open(path, "ab") as f:
            f.write(piece)
        time.sleep(0.1)
    path.unlink()
    ended.set()
    watcher.join()
    assert [n for _, n in found] == [2, 3]

def test_a_result_tells_how_it_was_measured(tmp_path):
    save_result(tmp_path, "x-small", {"seconds": 2.0},
        [{"seconds": 1.0}, {"seconds": 3.0}], rounds=2)
    record = read_result(tmp_path, "x-small")
    assert record["summary"] == {"seconds": 2.0} and len(record["raw"]) == record["rounds"] == 2
    assert {"processor", "cores", "gpu", "memory_gb"} <= set(record["machine"])
    assert ("python" in record["versions"]
            and record["command"].startswith("python -m bench") and record["date"])
    assert read_result(tmp_path, "other") is None

def test_sources_stand_in_the_main_table_if_they_were_measured():
    index = {"seconds": 2.0, "disk_gb": .5, "rows": 1000, "build_gb": 1.0,
             "titles_per_second": 400.0, "training_rows_per_second": 900.0}
    took = {"first": {"seconds": 4.0}, "again": {"seconds": 3.0}}
    found = {"start": [{"sources_start": took}],
             "sources": [{"sources_index": {"first": index, "again": index | {"build_gb": .7}}}]}
    cells = {row[0]: row[2] for row in sources_rows(summarize_sources(found))}
    assert cells["start to first step with two sources, second run"] == "3.0 s"
    assert cells["peak memory while it is built"] == "0.70 GB" # of the second run, whose rows are prepared
    assert cells["sources of titles, one title at a time"] == "400 per second"
    assert sources_rows(None) == [] # a result from before

def test_index_of_sources_is_measured(tmp_path):
    found = sources_index(ROOT/"data"/"sample.jsonl", tmp_path)
    assert found["rows"] > 500 and min(found.values()) > 0
    assert len([*tmp_path.glob("sources-*")]) == 1
