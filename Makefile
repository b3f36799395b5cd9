# make demo | test | test-all | bench | lint | clean. Everything is installed first, once.
# make gpu: all that a CUDA GPU can say about this tree, in less than 9 minutes. PYTHON is used as it is, with torch and
# without an installation or a network.
#
# PYTHON  interpreter to use (3.11 or newer). If it has torch and torchvision, its own environment is used as it is
#         and the rest is added to it; else a virtual environment is made in VENV.
# SEED    of the demo; RANKS of the demo.
# OUTPUT  of make gpu, default benchmarks/results/gpu.json; COMMIT where the tree has no git.
# CIFAR10 of make gpu: an archive or folder of its images to train on with the time that is left, again until it has ended.

PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
RANKS ?= 2

HAS_TORCH := $(shell $(PYTHON) -c 'import importlib.util as u; print(all(map(u.find_spec, ("torch", "torchvision"))))' 2>/dev/null)
ifeq ($(HAS_TORCH),True)
PY := $(PYTHON)
STAMP := .installed-$(shell $(PYTHON) -c 'import hashlib, sys; print(hashlib.sha256(sys.prefix.encode()).hexdigest()[:8])')
else
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
endif

.PHONY: install demo test test-all bench gpu lint clean

install: $(STAMP)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*) | $(if $(filter True,$(HAS_TORCH)),,$(VENV)/bin/python)
	$(PY) -c 'import torch, torchvision' 2>/dev/null || $(PY) -m pip install -q torch torchvision
	$(PY) -m pip install -q 'setuptools>=77' wheel ninja pybind11
	$(PY) -m pip install -q --no-build-isolation -e '.[dev]'
	touch $@

demo: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --nproc_per_node=$(RANKS) -m iic_dist.train --run.seed $(SEED)

test: $(STAMP)
	$(PY) -m pytest -m 'not slow'

test-all: $(STAMP)
	$(PY) -m pytest

bench: $(STAMP)
	$(PY) benchmarks/bench_iic.py
	$(PY) benchmarks/bench_nt_xent.py
	$(PY) benchmarks/bench_loader.py
	$(PY) benchmarks/bench_train_step.py
	$(PY) benchmarks/bench_scaling.py --device cpu
	$(PY) benchmarks/bench_augment.py

gpu:
	$(PYTHON) benchmarks/gpu.py $(if $(OUTPUT),--output $(OUTPUT)) $(if $(CIFAR10),--cifar10 $(CIFAR10))

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf $(VENV) .installed-* build *.egg-info
