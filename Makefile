# SPDX-License-Identifier: Apache-2.0
#
# Everything works on a fresh machine: targets make the virtual environment .venv where it is missing.
#
#   PYTHON=...       another interpreter that has torch and the packages of pyproject.toml; no .venv is made
#   BASE_PYTHON=...  interpreter that .venv is made from (default: python3)
#   TORCH=...        torch of .venv (default: the version this project is tested with; any from 2.11 on works)
#   LEVELS=...       CPU levels to build, e.g. x86-64-v3 (default: all)
#   SPATIALFLOW_CUDA=on|off|auto, CMAKE_CUDA_ARCHITECTURES=...   CUDA library (default: where nvcc is found, for 90a)
BASE_PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := $(CURDIR)/.venv
PYTHON ?= $(VENV)/bin/python
LEVELS ?=
OPS ?=
TESTS ?= tests

export PATH := $(VENV)/bin:$(PATH)
export SPATIALFLOW_CPU_LEVELS := $(LEVELS)
export SPATIALFLOW_CUDA ?= auto
export CMAKE_CUDA_ARCHITECTURES ?= 90a-real

ifeq ($(PYTHON),$(VENV)/bin/python)
environment := $(VENV)/complete
endif

.PHONY: help build test bench demo clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 10

$(VENV)/complete: pyproject.toml setup.py
	$(BASE_PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q "$(TORCH)" "setuptools>=77" "cmake>=3.22" ninja "pybind11>=2.13"
	$(VENV)/bin/python -m pip install -q --no-build-isolation -e ".[test]"
	@touch $@

build: $(environment)  ## compile the libraries into the source tree
	$(PYTHON) setup.py -q build_ext --inplace

test: build  ## the whole test suite; TESTS=tests/test_nms.py for a part
	$(PYTHON) -m pytest $(TESTS)

bench: build  ## time every operator against its peers; OPS="roi_align nms" for some
	$(PYTHON) -m spatialflow.cli benchmark $(OPS)

clean:  ## remove what was built, the environment included
	rm -rf $(VENV) build dist spatialflow/lib spatialflow/_evaluation*.so spatialflow.egg-info
