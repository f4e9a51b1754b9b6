"""The run that `make run` made last learnt something, and its files say so."""
import html

import nbformat, pytest

from conftest import ROOT
from descgen.compare import changed_files
from descgen.evaluation import read_evaluation
from descgen.files import load_manifest
from descgen.manifest import Manifest
from descgen.metrics import BASE, VERIFIED
from descgen.verdict import outcome, summary

pytestmark = pytest.mark.slow

@pytest.fixture(scope="module")
def run():
    "The folder of the last run"
    folder = ROOT/"outputs/runs/latest"
    if not folder.exists():
        pytest.skip("no run: `make run` makes one")
    return folder.resolve()

@pytest.fixture(scope="module")
def evaluation(run):
    return read_evaluation(run/"evaluation.json")

def test_main_run_learns(run, evaluation):
    loss = load_manifest(run)["test_loss"]
    assert loss["after"] < loss["before"]
    scores = evaluation.scores["all"]
    assert outcome("loss", scores["differences"][BASE]["loss"], scores["rows"]) == "better"

def test_verified_texts_have_fewer_unsupported_claims_than_the_base(evaluation):
    scores = evaluation.scores["all"]
    assert scores["values"][VERIFIED]["unsupported_claims"]["value"] == 0
    found = scores["verified"][BASE]["unsupported_claims"]
    assert outcome("unsupported_claims", found, scores["rows"]) == "better"

def test_executed_notebook_holds_no_error(run):
    outputs = [o for c in nbformat.read(run/"notebook.ipynb", 4).cells
               for o in c.get("outputs", [])]
    assert outputs and not [o for o in outputs if o.output_type == "error"]

def test_manifest_is_as_documented(run):
    manifest = load_manifest(run)
    assert manifest["state"] == "finished" and manifest["model"]["files"]["model.safetensors"]
    documented = Manifest.model_json_schema()["properties"].keys()
    assert manifest.keys() == documented - {"id", "why", "failed", "resumed_from", "skipped_steps"}
    assert not changed_files(run)

def test_adapter_loads_and_describes(run):
    from descgen.describer import Describer
    from descgen.inference import Sampling
    described, = Describer(run/"adapter").describe(["Tin Whistle in D (Brass)"], Sampling(32, greedy=True))
    assert described.text

def test_report_says_what_the_evaluation_found(run, evaluation):
    page = html.unescape((run/"report.html").read_text(encoding="utf-8"))
    for sentence in summary(evaluation).split(". "):
        assert sentence.strip(". ") in page
