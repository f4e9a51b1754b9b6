"""Each recipe can be used: its parameters exist, its values are allowed, and each differs from the default."""
import pytest
import yaml

from conftest import ROOT
from descgen.recipe import check_recipe, read_defaults
from descgen.sweep import expand_sweep

DEFAULTS = read_defaults(ROOT/"fine_tune_llama3.ipynb")
PATHS = sorted((ROOT/"recipes").glob("*.yaml"))
SWEEP = ROOT/"recipes"/"sweep.yaml"
FSDP = ROOT/"recipes"/"fsdp.yaml" # Accelerate's configuration: tests/test_fsdp.py
RECIPES = [path for path in PATHS if path not in (SWEEP, FSDP)]
CARDS = ("t4", "a100", "h100")

def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))

def redundant(values, base=DEFAULTS):
    "Names of the values that a recipe need not state"
    return [name for name, value in values.items() if value == base[name]]

@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_passes_and_states_only_what_differs(path):
    base = DEFAULTS | read(ROOT/"recipes"/"best.yaml") if path.stem in CARDS else DEFAULTS
    check_recipe(base | read(path))
    assert not redundant(read(path), base)

def test_recipe_with_unknown_name_or_wrong_value_is_refused():
    for wrong in ({"source": 2}, {"targets": "suported"}, {"sources": -1}, {"source_sets": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            check_recipe(DEFAULTS | wrong)
    assert redundant({"sources": 0, "targets": "supported"}) == ["sources"]

@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_first_line_says_what_a_recipe_is_for(path):
    assert path.read_text(encoding="utf-8").startswith("# ")

@pytest.mark.parametrize("card", CARDS)
def test_sources_combine_with_learning_and_card(card):
    parts = [read(ROOT/"recipes"/f"{name}.yaml") for name in ("best", "sources", card)]
    recipe = check_recipe(DEFAULTS | parts[0] | parts[1] | parts[2])
    assert (recipe.sources, recipe.targets, recipe.loss_on) == (2, "supported", "completion")
    assert recipe.learning_rate == parts[0]["learning_rate"]

def test_every_set_of_the_sweep_passes():
    sets = expand_sweep(read(SWEEP))
    assert len(sets) > 20
    for values in sets:
        check_recipe(DEFAULTS | values)

def test_readme_names_every_recipe():
    page = (ROOT/"README.md").read_text(encoding="utf-8")
    assert not [path.name for path in PATHS if path.name not in page]
