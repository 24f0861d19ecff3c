# make demo    set up; a model that we ship reads and points; fetch two small real models, ask them something
# make test    set up, fetch three small real models, run the default tests
# make test-all, make peers, make sanitize, make fuzz, make bench, make cuda, make gpu-check, make metal-check: see below
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
RUN := $(VENV)/bin/pyengine-run
SAMPLES := converters/demo/samples
SEES := converters/demo/weights/demo-q8_0.gguf
JOBS ?= $(shell $(PYTHON) -c "import os; print(os.cpu_count() or 1)")
SOURCES := setup.py pyproject.toml $(shell find csrc pyengine converters bench -name '*.py' -o -name '*.[ch]' -o -name '*.cpp' -o -path 'pyengine/server/page_files/*' | grep -v csrc/gen)

.PHONY: demo test test-all peers sanitize fuzz bench weights cuda metal-check gpu-check gpu-sanitize gpu-figures clean

demo: $(VENV)/installed
	@echo "1. A small vision model of our own reads the word in $(SAMPLES)/word.png:"
	@$(RUN) $(SEES) "What does it say?" --image $(SAMPLES)/word.png --temperature 0
	@mkdir -p build
	@echo "2. It finds the star in $(SAMPLES)/shapes.png, in pixels of the picture; build/demo-boxes.png shows it:"
	@$(RUN) $(SEES) "Where is the purple star?" --image $(SAMPLES)/shapes.png --temperature 0 --draw build/demo-boxes.png
	@echo "3. It reads a number from the form $(SAMPLES)/form.png:"
	@$(RUN) $(SEES) "What is the TOTAL?" --image $(SAMPLES)/form.png --temperature 0
	@echo "4. It says how something moves in three pictures, $(SAMPLES)/move-1.png to 3:"
	@$(RUN) $(SEES) "Which way does it move?" $(foreach n,1 2 3,--image $(SAMPLES)/move-$(n).png) --temperature 0
	@echo "5. Two questions of one conversation; the picture is encoded once, as --verbose says:"
	@printf 'What does it say?\nWhat colour is the text?\n' | $(RUN) $(SEES) --lines --image $(SAMPLES)/word.png --temperature 0 --verbose
	@echo "6. Two text models are fetched into models/:"
	@$(PY) -m converters.weights models
	@echo "7. Qwen2.5-Coder 0.5B answers a question:"
	@$(RUN) models/qwen2.5-coder-0.5b-q4_k_m.gguf "What is the capital of France?" --temperature 0
	@echo "8. Gemma 3 270M, a base model, continues a text; what is cut says so, and --verbose how fast it was:"
	@$(RUN) models/gemma3-270m-q4_k_m.gguf "The three primary colours are" --temperature 0 --max-tokens 24 --verbose
	@echo "9. To chat in a browser: $(RUN) serve $(SEES) models/qwen2.5-coder-0.5b-q4_k_m.gguf, then open http://127.0.0.1:8080"

# loadfile: a file's tests stay in one process, which compiles or converts what they share once.
test: $(VENV)/installed $(VENV)/test-installed
	$(PY) -m converters.weights models --all
	$(PY) -m pytest -n $(JOBS) --dist loadfile -m "not slow"

# The slow tests too, and new examples for the property tests; those that compare with llama.cpp run after `make peers`.
test-all: $(VENV)/installed $(VENV)/test-installed
	$(PY) -m converters.weights models --all
	PYENGINE_TEST_EXAMPLES=new $(PY) -m pytest -n $(JOBS) --dist loadfile

# Build llama.cpp from its source package for this machine, for the comparisons.
peers: $(VENV)/installed
	CMAKE_ARGS=-DGGML_NATIVE=ON $(PY) -m pip install -q --no-binary llama-cpp-python -r requirements/peers.txt

# Kernels, whole tiny models and damaged files under the address, undefined-behaviour and thread sanitizers: docs/testing.md.
sanitize: $(VENV)/installed $(VENV)/test-installed
	bash tests/sanitize.sh $(PY)

# Damaged inputs for each reader, an hour each unless FUZZ_SECONDS says otherwise; what is found lies in build/fuzz.
FUZZ_SECONDS ?= 3600
FUZZ_TARGETS ?=
fuzz: $(VENV)/installed $(VENV)/test-installed
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(PY) tests/fuzz/fuzzing.py $(FUZZ_TARGETS)

bench: $(VENV)/installed
	$(PY) -m bench models

# The CUDA kernels for all cards, with nvcc; PYENGINE_CUDA_TARGETS="90a" for some only.
cuda:
	$(PYTHON) -m pyengine.backends.cuda

# On a machine with a card, nvcc, NumPy, pybind11, cffi and Pillow (PyTorch is compared with where it is), without a network: build for
# this card, check every kernel and small models, time everything, write bench/results/gpu-NAME.json; under 9 minutes.
CARD ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | sed 's/[.]//; s/^90$$/90a/')
gpu-check:
	$(PYTHON) setup.py -q build_ext --inplace
	PYENGINE_CUDA_TARGETS="$(CARD)" $(PYTHON) -m pyengine.backends.cuda
	$(PYTHON) -m bench.gpu.check

# The same on small sizes under compute-sanitizer, after gpu-check.
gpu-sanitize:
	@mkdir -p build
	compute-sanitizer --tool memcheck --error-exitcode 9 $(PYTHON) -m bench.gpu.check --tiny --only ops,kernels,agree --json build/memcheck.json
	compute-sanitizer --tool racecheck --error-exitcode 9 $(PYTHON) -m bench.gpu.check --tiny --only kernels,agree --json build/racecheck.json

# On a Mac: check every kernel and small models on its GPU, time everything, write bench/results/metal-NAME.json. docs/metal.md.
metal-check: $(VENV)/installed $(VENV)/test-installed
	$(PY) -m pip install -q pyobjc-framework-Metal
	$(PY) -m bench.gpu.metal

# docs/gpu-kernels.md: registers, occupancy and requests to memory of the kernels, with nvcc and the emulator; no card.
gpu-figures: $(VENV)/installed
	PYENGINE_EMULATE=checked $(PY) -m bench.gpu.figures

weights: $(VENV)/installed
	$(PY) -m converters.weights models --all

$(VENV)/created:
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -r requirements/build.txt -r requirements/run.txt
	touch $@

$(VENV)/installed: $(VENV)/created requirements/build.txt requirements/run.txt $(SOURCES)
	$(PY) -m pip install -q -r requirements/build.txt -r requirements/run.txt
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/test-installed: $(VENV)/created requirements/test.txt
	$(PY) -m pip install -q -r requirements/test.txt
	touch $@

clean:
	rm -rf build csrc/gen pyengine/_engine*.so pyengine/_abi.py
