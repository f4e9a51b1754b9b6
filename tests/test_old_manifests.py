"""A manifest of schema 1 is read under the names that the present code writes."""
from dataclasses import fields

from descgen.dataset import Funnel
from descgen.files import upgrade_manifest
from descgen.plan import Plan

LABELS = ["rows for training", "effective batch (packs)",
    "steps", "packs to train on", "rows to train on", "epochs",
    "tokens to train on", "tokens per second (measured on one pack)", "memory in GB (estimate)",
    "minutes of training (estimate)",
    "minutes of evaluation (estimate)", "minutes in all (estimate)"]

def test_funnel_has_the_fields_of_the_dataclass():
    funnel = upgrade_manifest(
        {"schema": 1, "funnel": {"lines read": 9, "for training": 9}})["funnel"]
    assert funnel.keys() == {field.name for field in fields(Funnel)}

def test_plan_has_the_fields_of_the_dataclass():
    plan = upgrade_manifest({"schema": 1, "plan": dict.fromkeys(LABELS, 1)})["plan"]
    assert plan.keys() == {field.name for field in fields(Plan)}
