# SPDX-License-Identifier: Apache-2.0
PYTHON ?= python3
LEVELS ?=

.PHONY: build
build:  ## compile the libraries into the source tree, with the torch of $(PYTHON)
	cmake -S . -B build/develop -G Ninja -DPython_EXECUTABLE=$$(command -v $(PYTHON)) \
	  -DSPATIALFLOW_CPU_LEVELS=$(LEVELS) -DSPATIALFLOW_CUDA=$${SPATIALFLOW_CUDA:-off} > build.log 2>&1 || (cat build.log; exit 1)
	cmake --build build/develop
