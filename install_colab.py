"""Install descgen on Colab: what its image lacks or has too old, at the versions of the lock files.

The packages of the running kernel and torch stay as they are. `requirements-colab.txt` lists the names.
"""
import subprocess, sys
from argparse import ArgumentParser
from importlib import invalidate_caches
from importlib.metadata import distributions, packages_distributions

PIP = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
LIST = ["-r", "requirements-colab.txt", "-c", "requirements.lock", "-c", "requirements-gpu.lock"]
IMPORTS = "import unsloth, torch, trl, peft, datasets, polars, papermill, descgen.train"


def versions(
)->dict[str, str]: # name to version
    "The installed packages"
    invalidate_caches()
    return {d.name: d.version for d in distributions()}


def test_imports(
)->None:
    "Import what the notebook imports, in a process of its own; RuntimeError shows why it fails"
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f"The installed packages do not import:\n{done.stderr[-2000:]}")


def imported(
    names:list[str], # packages
)->list[str]: # those that the running kernel imported before
    "Packages of which the kernel still holds the replaced version"
    return [n for module, found in packages_distributions().items() for n in found if n in names and module in sys.modules]


def install(
)->None:
    "Install, test the imports and print in one line what changed"
    before = versions()
    subprocess.run(PIP + LIST, check=True)
    subprocess.run(PIP + ["--no-build-isolation", "-e", "."], check=True)
    after = versions()
    test_imports()
    added = after.keys() - before.keys()
    replaced = sorted(n for n in before if after.get(n) != before[n])
    assert "torch" not in replaced, f"torch {before['torch']} became {after['torch']}"
    print(f"Packages added: {len(added)}; replaced: {', '.join(replaced)}; torch stays at {after['torch']}")
    if stale := imported(replaced): print(f"Restart the session, then run all cells: {', '.join(stale)} was imported before")


if __name__ == "__main__":
    ArgumentParser(description=__doc__).parse_args() # only --help: nothing is installed for it
    install()
