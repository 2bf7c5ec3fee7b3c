# One command each; every target makes its own environment and works offline once that exists.
PYTHON ?= python3
VENV   ?= .venv
NEWEST ?= .venv-newest
NEWEST_TORCH ?= .venv-newest-torch
RUN     = $(VENV)/bin/python
WORKERS ?= 2
# One room of tests for `make room`.
ROOM ?= decode
# Tests of every operator's reference against something that this project did not write.
ORACLES = tests/attention/test_peers.py tests/decode/test_decode.py tests/delta_rule/test_truth.py tests/causal_conv/test_causal_conv.py \
          tests/causal_conv/test_causal_conv_qkv.py tests/deltanet/test_contract.py
# What `test-newest` runs; CI takes the rooms whose code JAX's versions treat differently.
NEWEST_TESTS ?= tests
ifeq ($(shell command -v nvidia-smi),)
export JAX_PLATFORMS ?= cpu
endif
export HF_HUB_OFFLINE = 1
# Compiled programs outlive a run. JAX keys them by program and by its own version; the folder, by the processor's features.
CPU := $(shell (uname -m; grep -m1 ^flags /proc/cpuinfo || sysctl -n machdep.cpu.brand_string) 2>/dev/null | cksum | cut -d' ' -f1)
export JAX_COMPILATION_CACHE_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/gqa_jax/programs-$(CPU)
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES ?= -1

.PHONY: demo test test-all quick oracles room mutants peers check format notebooks bench test-newest test-newest-torch test-gpu clean

demo: $(VENV)/.ready
	$(RUN) -m gqa_jax demo

test: $(VENV)/.ready
	$(RUN) -m pytest -q -n $(WORKERS) --dist worksteal tests

# An answer within a minute: text, types, and the operators' truth, side by side.
quick: $(VENV)/.ready
	$(MAKE) --no-print-directory --output-sync -j2 check oracles

oracles: $(VENV)/.ready
	$(RUN) -m pytest -q -n $(WORKERS) --dist worksteal $(ORACLES)

# The tests of one room: make room ROOM=delta_rule
room: $(VENV)/.ready
	$(RUN) -m pytest -q -n $(WORKERS) --dist worksteal tests/$(ROOM)

# Every slow sweep too, not this commit's eighth of them.
test-all: $(VENV)/.ready
	GQA_JAX_ALL=1 $(RUN) -m pytest -q -n $(WORKERS) --dist worksteal tests

# Puts each fault of tests/mutants.py into a copy of the project; the suite must notice every one.
mutants: $(VENV)/.ready
	$(RUN) -m tests.mutants

# Peers' own test files against this library, from checkouts in $(PEERS)/jax, $(PEERS)/fla, ...: tests/peers/__main__.py.
peers: $(VENV)/.ready
	$(RUN) -m tests.peers $(PEERS)

check: $(VENV)/.ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m basedpyright
	$(RUN) -m pytest -q -p no:cacheprovider --noconftest tests/test_house.py

format: $(VENV)/.ready
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

notebooks: $(VENV)/.ready
	$(RUN) -m pytest -q tests/test_notebooks.py

bench: $(VENV)/.ready
	$(RUN) -m benchmarks.run

# JAX 0.12.x without torch: the core must not need it.
test-newest: $(NEWEST)/.ready
	$(NEWEST)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not torch" $(NEWEST_TESTS)

# The newest torch and transformers with the default JAX: what torch.compile and Hugging Face have changed since.
test-newest-torch: $(NEWEST_TORCH)/.ready
	$(NEWEST_TORCH)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal tests/interop

test-gpu: $(VENV)/.ready
	JAX_PLATFORMS=cuda,cpu GQA_JAX_TEST_PLATFORM=gpu XLA_PYTHON_CLIENT_PREALLOCATE=false $(RUN) -m pytest -q -m gpu tests

$(VENV)/.ready: pyproject.toml constraints/default.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 12), f"Python 3.12 or newer is needed, got {sys.version}"'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --disable-pip-version-check -c constraints/default.txt -e '.[demo,torch,hf,export,aot,test,dev]'
	touch $@

$(NEWEST)/.ready: pyproject.toml constraints/newest.txt
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install -q --disable-pip-version-check -c constraints/newest.txt -e '.[demo,test]'
	touch $@

$(NEWEST_TORCH)/.ready: pyproject.toml constraints/newest-torch.txt
	$(PYTHON) -m venv $(NEWEST_TORCH)
	$(NEWEST_TORCH)/bin/python -m pip install -q --disable-pip-version-check -c constraints/newest-torch.txt -e '.[torch,hf,export,test]'
	touch $@

clean:
	rm -rf $(VENV) $(NEWEST) $(NEWEST_TORCH) build dist *.egg-info
