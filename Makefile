# SPDX-License-Identifier: Apache-2.0
#
# Everything works on a fresh machine: targets make the virtual environment .venv where it is missing.
#
#   PYTHON=...       another interpreter that has torch and the packages of pyproject.toml; no .venv is made
#   BASE_PYTHON=...  interpreter that .venv is made from (default: python3)
#   TORCH=...        torch of .venv, 2.11 or later, with pip's options: TORCH="torch --index-url ..."
#   WORKERS=...      processes that run tests side by side (default: 2); 0: pytest itself runs them
#   LEVELS=...       CPU levels to build, e.g. x86-64-v3 (default: SPATIALFLOW_CPU_LEVELS, otherwise all)
#   SPATIALFLOW_CUDA=on|off|auto   CUDA library (default: where nvcc is found)
#   CMAKE_CUDA_ARCHITECTURES=... or TORCH_CUDA_ARCH_LIST=...   its GPUs (default: those of this machine, otherwise 9.0)
BASE_PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := $(CURDIR)/.venv
PYTHON ?= $(VENV)/bin/python
WORKERS ?= 2
LEVELS ?= $(SPATIALFLOW_CPU_LEVELS)
OPS ?=
TESTS ?= tests
CONFIG ?=
IMAGES ?=
WEIGHTS ?=

export PATH := $(VENV)/bin:$(PATH)
export SPATIALFLOW_CPU_LEVELS := $(LEVELS)
export SPATIALFLOW_CUDA ?= auto
ifeq ($(CMAKE_CUDA_ARCHITECTURES)$(TORCH_CUDA_ARCH_LIST),)
gpus := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | \
	sed -n 's/^\([0-9]*\)\.\([0-9]\)$$/\1\2-real/p' | sed 's/^90-/90a-/' | sort -u | paste -sd ';' -)
export CMAKE_CUDA_ARCHITECTURES := $(or $(gpus),90a-real)
test-sass: export CMAKE_CUDA_ARCHITECTURES := 90a-real
endif

ifeq ($(PYTHON),$(VENV)/bin/python)
packages := $(VENV)/packages
environment := $(VENV)/complete
endif

# requirements: the list NAME = [...] of pyproject.toml, quoted for the shell. extra: the file that marks an extra as
# installed in .venv.
requirements = $(shell awk '/^$(1) = \[.*\]/ {print; exit} /^$(1) = \[/ {on = 1} /^\]/ {on = 0} on' \
	pyproject.toml | grep -o '"[^"]*"')
extra = $(if $(packages),$(VENV)/$(1).extra)

.PHONY: help build test test-simt test-simt-sanitize sanitize sanitize-threads test-sass nvcc mutation-round fuzz \
	fuzz-planted bench gpu-check gpu-check-dry gpu-pack demo docs clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 20

.PHONY: lint format test-wheel test-migration coverage

# .venv without the package itself, whose libraries take minutes to compile.
$(VENV)/packages: pyproject.toml
	$(BASE_PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q $(TORCH)
	$(VENV)/bin/python -m pip install -q $(call requirements,requires) $(call requirements,dependencies) \
	  $(call requirements,panoptic) $(call requirements,test)
	@touch $@

$(VENV)/complete: $(VENV)/packages setup.py
	$(VENV)/bin/python -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/%.extra: $(packages)
	$(PYTHON) -m pip install -q $(call requirements,$*)
	@touch $@

# Threads of OpenMP that spin while they wait would slow the other workers.
pytest = OMP_WAIT_POLICY=passive $(PYTHON) -m pytest -n $(WORKERS) --dist worksteal

cpp_files = $(shell find csrc tests benchmarks -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

lint: $(call extra,lint)  ## formatting, style, types and spelling; `make format` corrects what can be corrected
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	clang-format --dry-run -Werror $(cpp_files)
	$(PYTHON) -m mypy
	codespell
	$(if $(shell command -v actionlint),actionlint,@echo "actionlint: skipped, not installed")

format: $(call extra,lint)  ## format Python and C++, and correct what ruff can
	$(PYTHON) -m ruff check --fix
	$(PYTHON) -m ruff format
	clang-format -i $(cpp_files)

build: $(environment)  ## compile the libraries into the source tree
	$(PYTHON) setup.py -q build_ext --inplace

test: build  ## the whole test suite; TESTS=tests/test_nms.py for a part
	$(pytest) $(TESTS)

# The installed package, without the source tree: sdist, wheel and environment lie in build/wheel.
WHEEL_TESTS ?= test_nms.py test_roi_align.py test_panoptic_formats.py test_pretrained.py test_configs.py test_lazy_import.py
test-wheel: $(environment)  ## source distribution, wheel from it, and tests of the installed wheel
	rm -rf build/wheel && $(PYTHON) setup.py -q sdist --dist-dir build/wheel
	$(PYTHON) -m venv build/wheel/environment
	cd build/wheel && export PATH="$$PWD/environment/bin:$$PATH" && \
	  pip install -q $(TORCH) && pip wheel -q --no-deps -w . *.tar.gz && \
	  pip install -q *.whl $(call requirements,panoptic) $(call requirements,test) && \
	  tar xf *.tar.gz --strip-components 1 --wildcards '*/tests' && pytest $(addprefix tests/,$(WHEEL_TESTS)) && \
	  spatialflow benchmark group_norm_relu --seconds 0.01

# torchvision that fits the installed torch; pip would otherwise replace torch.
test-migration: build  ## compare with torchvision, which is installed for it (docs/migration.md)
	$(PYTHON) -m pip freeze | grep '^torch==' > build/torch.txt
	$(PYTHON) -m pip install -q -c build/torch.txt $(or $(TORCHVISION),$(call requirements,migration))
	$(PYTHON) -m pytest tests/test_migration.py

# The operator tests, unchanged, on the CUDA kernels interpreted on the CPU (docs/simt.md).
SIMT_TESTS ?= $(sort $(wildcard tests/test_brute_force_*.py)) tests/test_naive_kernels.py \
	tests/test_kernel_count.py tests/test_sm90.py \
	$(sort $(wildcard $(shell sed -n 's,^    \([a-z0-9_]*\).*,tests/test_\1.py tests/test_\1_*.py,p' cmake/ops.cmake)))
configure = cmake --log-level=WARNING -S . -B build/$(1) -G Ninja -DPython_EXECUTABLE=$$(command -v $(PYTHON)) \
	-DSPATIALFLOW_SIMT=on -DSPATIALFLOW_CUDA=off
simt_build = $(call configure,simt) && cmake --build build/simt --target spatialflow_schema spatialflow_simt

# Tests of kernels for compute capability 9.0 run twice more: with asynchronous work done late, and done early
# (docs/simt.md).
sm90_names := sm90 conv1x1 flow_conv2d flow_conv2d_active fused_subnets deform_conv2d deform_conv2d_packed
SM90_TESTS ?= $(filter $(sm90_names:%=tests/test_%.py),$(SIMT_TESTS))
simt_tests = SPATIALFLOW_BACKEND=simt $(pytest)
sm90_tests = $(if $(SM90_TESTS),SPATIALFLOW_SIMT_SM90=$(1) $(simt_tests) -k "sm90 or float16" $(SM90_TESTS))

test-simt: $(environment)  ## operator tests on the CUDA kernels, interpreted; SIMT_TESTS=tests/test_nms.py for a part
	$(simt_build)
	$(simt_tests) $(SIMT_TESTS)
	$(call sm90_tests,late)
	$(call sm90_tests,early)

# Sanitizers (docs/sanitizers.md) and coverage use their own libraries, in build/<folder>/package.
# Reports of sanitizers go to file descriptor 2, which pytest would capture.
SANITIZE_LEVEL ?= $(if $(filter x86_64,$(shell uname -m)),x86-64-v3,native)
not_sanitized := $(addprefix tests/test_,naive_kernels.py kernel_count.py)
SANITIZE_TESTS ?= $(filter-out $(not_sanitized),$(SIMT_TESTS)) \
	$(addprefix tests/test_,panoptic_formats.py panoptic_quality.py panoptic_drawing.py threads.py)
SANITIZE_FUZZ ?= 300
instrumented_build = $(call configure,$(1)) $(2) \
	"-DSPATIALFLOW_PACKAGE_DIR=$(CURDIR)/build/$(1)/package" && \
	cmake --build build/$(1) --target spatialflow_schema _evaluation $(3)
runtime = $(foreach name,$(1),$(shell $(CXX) -print-file-name=lib$(name).so))
address := address,undefined
with_address = PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	UBSAN_OPTIONS=print_stacktrace=1 LD_PRELOAD="$(call runtime,asan ubsan stdc++)"
with_thread = OMP_NUM_THREADS=4 OMP_WAIT_POLICY=passive TSAN_OPTIONS=ignore_noninstrumented_modules=1 \
	setarch -R env LD_PRELOAD="$(call runtime,tsan stdc++)"
sanitized_tests = $(PYTHON) -m pytest --capture=sys

sanitize: $(environment)  ## tests of operators and scoring, then the fuzzer, with AddressSanitizer and UBSan
	$(call instrumented_build,sanitized,-DSPATIALFLOW_SANITIZE=$(address),spatialflow_cpu_$(SANITIZE_LEVEL))
	SPATIALFLOW_BACKEND=cpu_sanitized $(with_address) $(sanitized_tests) $(SANITIZE_TESTS)
	$(with_address) $(PYTHON) tests/fuzz --backend cpu_sanitized --seconds $(SANITIZE_FUZZ)

sanitize-threads: $(environment)  ## eight Python threads calling operators and scoring, with ThreadSanitizer
	$(call instrumented_build,thread_sanitized,-DSPATIALFLOW_SANITIZE=thread,spatialflow_cpu_$(SANITIZE_LEVEL))
	SPATIALFLOW_BACKEND=cpu_thread_sanitized $(with_thread) $(sanitized_tests) tests/test_threads.py

test-simt-sanitize: $(environment)  ## most tests of test-simt with AddressSanitizer and UBSan
	$(call instrumented_build,sanitized,-DSPATIALFLOW_SANITIZE=$(address),spatialflow_simt)
	SPATIALFLOW_BACKEND=simt_sanitized $(with_address) $(sanitized_tests) \
	  $(filter-out $(not_sanitized),$(SIMT_TESTS))

# Lines of Python and C++ that TESTS execute. Counts of an earlier run are removed.
coverage: $(environment) $(call extra,coverage)  ## line coverage of Python and C++; TESTS=tests/test_nms.py for a part
	$(call instrumented_build,coverage,-DSPATIALFLOW_COVERAGE=on,spatialflow_cpu_$(SANITIZE_LEVEL))
	find build/coverage -name '*.gcda' -delete && $(PYTHON) -m coverage erase
	SPATIALFLOW_BACKEND=cpu_coverage $(PYTHON) -m coverage run -m pytest $(TESTS)
	$(PYTHON) -m coverage combine -q && $(PYTHON) -m coverage report
	$(PYTHON) -m gcovr --merge-lines --filter csrc/ build/coverage

# Limits for registers, loops and loads of the machine code (docs/sass.md). Libraries that `build` made are used.
nvcc:
	@command -v $${CUDACXX:-nvcc} >/dev/null || { echo "no nvcc: put it on PATH or set CUDACXX" >&2; exit 1; }

test-sass: export SPATIALFLOW_CUDA := on
test-sass: nvcc build $(call extra,sass)  ## check the machine code of the CUDA kernels without a GPU; needs nvcc
	$(PYTHON) tools/check_sass.py

mutation-round: build  ## break one line at a time and check that tests or sanitizers notice; takes some minutes
	$(PYTHON) tools/mutation_round.py

SECONDS ?= 120
SEED ?= 0
fuzz: BACKEND := $(if $(filter command line environment,$(origin BACKEND)),$(BACKEND),cpu)
fuzz: build  ## fuzz operators and file readers (docs/fuzzing.md); SECONDS=1200 SEED=1 OPS="nms roi_align" BACKEND=simt
	$(if $(filter simt,$(BACKEND)),$(simt_build))
	$(PYTHON) tests/fuzz --seconds $(SECONDS) --seed $(SEED) --backend $(BACKEND) $(if $(OPS),--ops $(OPS))

fuzz-planted: build  ## plant known faults one at a time and check that the fuzzer finds each; TEXT=stride for some
	$(PYTHON) tools/fuzz_planted.py $(TEXT)

bench: build  ## time every operator against its baselines; OPS="roi_align nms" for some
	$(PYTHON) -m spatialflow benchmark $(OPS)

# The libraries are not compiled here; those built elsewhere are enough. BACKEND=simt is a dry run without a GPU.
BACKEND ?= cuda
ARGS ?=
gpu-check:  ## accuracy and speed on a GPU, at most 8 minutes; ARGS="--second" goes on; without a GPU, error 77
	$(if $(wildcard $(PYTHON)),$(PYTHON),$(BASE_PYTHON)) tools/gpu_check.py --backend $(BACKEND) $(ARGS)

gpu-check-dry: build  ## every step of both runs of gpu-check without a GPU, on the interpreter and the CPU
	$(simt_build)
	$(PYTHON) tools/gpu_check.py --backend simt
	$(PYTHON) tools/gpu_check.py --backend simt --second

FILE ?= gpu.tgz
gpu-pack: build  ## archive for gpu-check on a machine without a network; FILE=gpu.tgz
	$(PYTHON) tools/gpu_pack.py $(FILE)

# Without IMAGES and WEIGHTS: scenes that the packaged weights were not trained on, with their ground truth.
demo_scored := $(if $(IMAGES)$(WEIGHTS),,yes)
demo_model := --model $(or $(WEIGHTS),demo) $(if $(CONFIG),--config $(CONFIG))
command = $(PYTHON) -m spatialflow

demo:  ## environment, build, 50 scenes: maps, PQ, overlays and speed in demo/; IMAGES="a.jpg folder" WEIGHTS=f CONFIG=c
	@begin=$$(date +%s) && $(MAKE) --no-print-directory build && built=$$(date +%s) && rm -rf demo && \
	$(if $(IMAGES),,$(command) synthesize demo/scenes --count 50 --size 256x384 --seed 2 &&) \
	$(command) predict $(or $(IMAGES),demo/scenes/images) --output demo/prediction $(demo_model) && \
	$(if $(demo_scored),$(MAKE) --no-print-directory demo-score &&) \
	echo "seconds: environment and build $$((built - begin)), demo $$(($$(date +%s) - built))" && \
	echo "Look at demo/prediction/overlays$(if $(demo_scored), and demo/pictures/index.html)."

.PHONY: demo-score
demo-score:
	$(command) evaluate demo/scenes/panoptic.json demo/prediction --per-class
	$(command) visualize demo/scenes/images --ground-truth demo/scenes/panoptic.json --prediction demo/prediction \
	  $(demo_model) --output demo/pictures
	$(PYTHON) benchmarks/end_to_end.py --config demo --short-edges 256 \
	  --providers spatialflow reference --images demo/scenes/images --count 10 --output demo/speed

# MkDocs and its theme are separate from .venv, and need no build of the package. The pages load nothing from a network.
docs_environment := $(CURDIR)/build/docs-environment
$(docs_environment)/complete: pyproject.toml
	$(BASE_PYTHON) -m venv $(docs_environment)
	$(docs_environment)/bin/python -m pip install -q $(call requirements,docs)
	@touch $@

docs: $(docs_environment)/complete  ## the documentation site, in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(docs_environment)/bin/python -m mkdocs build --strict

clean:  ## remove build products and .venv
	rm -rf $(VENV) build dist demo spatialflow/lib spatialflow/_evaluation*.so spatialflow.egg-info
