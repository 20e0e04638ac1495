# Every target installs what it needs into .venv (parity: into .venv-parity) and can be the first one you run.
PY ?= python3
BIN := $(CURDIR)/.venv/bin
OS := $(shell uname)
# mlx-lm's names for MLX's builds: none on a Mac, cuda13 with an NVIDIA driver, else cpu
MLX := $(if $(filter Darwin,$(OS)),,$(if $(shell command -v nvidia-smi),cuda13,cpu))
empty :=
comma := ,
bracket = $(if $(1),[$(subst $(empty) $(empty),$(comma),$(1))])
extra = $(call bracket,$(strip $(1) $(MLX)))
LIMIT := $(if $(shell command -v timeout),timeout 2400)
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
# MLX's own products on Linux are some thirty times as slow as OpenBLAS's (nbs/05_blas)
OPENBLAS := $(firstword $(wildcard /usr/lib/*-linux-gnu/libopenblas.so.0 /usr/lib64/libopenblas.so.0 /usr/lib/libopenblas.so.0))
QUICK := MLX_DISABLE_COMPILE=1 XLSTM_METAL_TUNED=$(CURDIR)/build/none.json $(if $(OPENBLAS),LD_PRELOAD=$(OPENBLAS))
SERIAL := $(if $(filter Darwin,$(OS)),--n_workers 0)
# for the shell cells of notebooks
export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test browser openblas parity docs lab export gpu-report bundled clean
help:            ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' Makefile | expand -t 16

demo: .venv/run         ## stream text from the bundled model
	$(BIN)/xlstm-metal generate --prompt 'class Queue:' --max-tokens 120

test: .venv/dev         ## a fresh export changes nothing; notebooks; pytest
	sh tests/fresh_export.sh
	$(QUICK) $(LIMIT) $(BIN)/nbdev_test $(SERIAL)
	MLX_DISABLE_COMPILE=1 $(LIMIT) $(BIN)/python -m pytest -n 2 --dist loadfile

browser:        ## Chromium for tests/test_app.py, where there is none (Debian)
	command -v chromium >/dev/null || { $(SUDO) apt-get -qq update && $(SUDO) apt-get -qq install -y --no-install-recommends chromium; }

openblas:       ## OpenBLAS, which test and docs use, where there is none (Debian)
	test -n "$(OPENBLAS)" || { $(SUDO) apt-get -qq update && $(SUDO) apt-get -qq install -y --no-install-recommends libopenblas0-pthread; }

parity: .venv-parity/run ## live against transformers and NX-AI's package
	.venv-parity/bin/python tests/parity.py
	MLX_DISABLE_COMPILE=1 .venv-parity/bin/python -m pytest tests/test_convert.py tests/test_torch_training.py

docs: .venv/dev build/npm/node_modules/katex ## the site, in build/docs
	rm -rf build/docs-src build/docs
	$(QUICK) $(BIN)/python docs/prepare.py build/docs-src
	$(BIN)/sphinx-build -q -W --keep-going -b html -c docs build/docs-src build/docs

lab: .venv/dev          ## the notebooks, in JupyterLab
	$(BIN)/jupyter lab nbs/index.ipynb

export: .venv/dev       ## package, kernels and README from the notebooks
	find xlstm_metal -name '*.py' ! -name __init__.py ! -name __main__.py -delete
	$(BIN)/nbdev_export
	$(BIN)/python docs/document.py
	$(BIN)/python -c 'from xlstm_metal.kernel_text import export_kernels; export_kernels()'
	$(BIN)/nbdev_clean
	$(BIN)/python docs/readme.py

gpu-report: .venv/run   ## check and time all kernels on this machine's GPU
	$(BIN)/python tests/gpu.py --report build/gpu-report

bundled: .venv/dev .venv-parity/run ## the bundled model anew: its text is these two environments; needs a GPU
	rm -rf build/bundled
	$(BIN)/nbdev_test --path nbs/train/79_bundled.ipynb --flags 'slow gpu' --n_workers 0 --do_print

clean:          ## remove everything that make made
	rm -rf .venv .venv-parity build dist *.egg-info

.venv/bin/python:
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "xlstm-metal needs Python 3.11 or newer: make PY=python3.12 ...")'
	$(PY) -m venv .venv
.venv/run: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -q -e '.$(call extra,)'
	touch $@
.venv/dev: pyproject.toml .venv/run
	$(BIN)/python -m pip install -q -e '.$(call extra,dev)'
	touch $@
# torch first and by exactly this version: a looser request would take a build with gigabytes of CUDA
.venv-parity/run: pyproject.toml
	$(PY) -m venv .venv-parity
	.venv-parity/bin/python -m pip install -q torch==2.13.0
	.venv-parity/bin/python -m pip install -q -e '.$(call extra,parity)'
	.venv-parity/bin/python -m pip install -q --no-deps xlstm==2.0.6 mlstm_kernels==2.0.6 tirex-ts==1.4.2
	touch $@
build/npm/node_modules/katex:
	npm install --silent --prefix build/npm katex@0.16.22
