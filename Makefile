# Two commands for a newcomer, `make run` and `make test`; the others are for those who stay.
PYTHON ?= python3
VENV   := .venv
READY  := $(VENV)/.ready
ENTER  := . $(VENV)/bin/activate &&
CUDA   := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
LOCKS  := requirements.lock $(if $(CUDA),requirements-gpu.lock)
# Another build of the locked version: make run TORCH=torch==2.13.0+cpu
TORCH  ?= $(shell grep -o '^torch==[^ ;]*' requirements.lock)

# Without a GPU, or with `CUDA=` on the command line, no command sees a CUDA device.
ifeq ($(strip $(CUDA)),)
export CUDA_VISIBLE_DEVICES :=
endif

# Where there is no GPU, the recipe for a CPU. More parameters with ARGS: make run ARGS="-p max_steps 20"
RECIPE := $(if $(CUDA),,-f recipes/cpu.yaml)
NAME   := $(if $(CUDA),gpu,cpu)
RUN    := outputs/runs/latest
ARGS   ?=

.PHONY: run test fuzz test-slow test-long test-multi test-browser processors sync pages readme lab

# Each run has a folder of its own in outputs/runs; `latest` is the one that finished last.
run: $(READY)
	@$(ENTER) descgen run --name $(NAME) $(RECIPE) $(ARGS)
	@$(ENTER) jupyter nbconvert --log-level ERROR --CoalesceStreamsPreprocessor.enabled=True --to html $(RUN)/notebook.ipynb
	@printf '\nexecuted notebook  %s (and .html)\nadapter            %s\nbefore and after   %s\n' $(RUN)/notebook.ipynb $(RUN)/adapter $(RUN)/report.html

test: $(READY)
	@$(ENTER) nbdev_test --timing
	@$(ENTER) python -m pytest -q -m 'not slow and not long and not browser and not multi' tests
	@$(MAKE) --no-print-directory sync

# The readers, the cleaning and the command's parameters tried on 5,000 examples per test, other ones each time.
fuzz: $(READY)
	@$(ENTER) FUZZ_RANDOM=1 FUZZ_EXAMPLES=$(or $(EXAMPLES),5000) nbdev_test --timing --file_re '^(10|11|12|90)'

# Tests that take minutes, two files at a time; those of a real run look at the one that `make run` made last.
test-slow: $(READY)
	@$(ENTER) OMP_NUM_THREADS=1 python -m pytest -v -n 2 --dist loadfile -m 'slow and not long' tests

# Exports that take several minutes more, and more memory.
test-long: $(READY)
	@$(ENTER) python -m pytest -v -m long tests

# Trainings in two processes, each with a core of its own.
test-multi: $(READY)
	@$(ENTER) OMP_NUM_THREADS=1 python -m pytest -v -m multi tests

# The page in Chromium. Where there is none, the tests are skipped, and the last lines say why.
test-browser: $(READY)
	@$(ENTER) python -m pytest -v -rs -m browser tests

# The chapters that compute, as on a processor without bf16 arithmetic; those of single layers and of training, as on a laptop with AVX2.
processors: $(READY)
	@if [ -r /proc/cpuinfo ] && ! grep -q bf16 /proc/cpuinfo; then \
		echo "Without bf16: the same as make test, because this processor has no bf16."; \
	else \
		echo "Without bf16:" && $(ENTER) UNSLOTH_CPU_BF16=0 nbdev_test --file_re '^(3|4[0-5]|50|61|62|91)'; \
	fi
	@echo "With AVX2:"
	@$(ENTER) ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 nbdev_test --file_re '^(3|41|44|45)'

# Exporting, cleaning and rendering again must change nothing.
sync: $(READY)
	@before=$$(cat descgen/*.py nbs/*.ipynb *.ipynb README.md | sha256sum); \
	$(ENTER) nbdev_export && nbdev_clean && nbdev_clean --fname fine_tune_llama3.ipynb && $(MAKE) --no-print-directory readme && \
	after=$$(cat descgen/*.py nbs/*.ipynb *.ipynb README.md | sha256sum); \
	[ "$$before" = "$$after" ] && echo "In sync: notebooks, module and README." || \
	{ echo "Not in sync: exporting, cleaning and rendering changed files. Look at git diff and commit what they wrote."; exit 1; }

readme: $(READY)
	@$(ENTER) jupyter nbconvert --log-level ERROR --no-input --to markdown nbs/index.ipynb --output-dir . --output README.md

# The main notebook's page shows the run that `make run` made last, and the README its record.
pages: $(READY)
	@$(ENTER) python .ci/store_outputs.py $(RUN)/notebook.ipynb && nbdev_clean --fname fine_tune_llama3.ipynb
	@$(ENTER) jupyter nbconvert --log-level ERROR --to notebook --execute --inplace nbs/index.ipynb && nbdev_clean
	@$(MAKE) --no-print-directory readme

lab: $(READY)
	$(ENTER) jupyter lab fine_tune_llama3.ipynb

# torch comes first and with what it needs; a torch that pip finds on the disk or in its cache is not fetched again.
$(READY): requirements.lock requirements-gpu.lock settings.ini setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"descgen needs Python 3.11 to 3.13, and $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12 …")'
	@echo "Setting up $(VENV) (once, a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(ENTER) pip install -q --disable-pip-version-check '$(TORCH)'
	@$(ENTER) pip install -q --disable-pip-version-check --no-deps $(addprefix -r ,$(LOCKS))
	@$(ENTER) pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(ENTER) python -c "from descgen.model import embedded_model; embedded_model()"
	@touch $@
