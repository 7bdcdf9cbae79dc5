# make help lists the targets. ARGS goes to the program: make test ARGS="-k ref", make demo ARGS=--help.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

# A machine with an NVIDIA driver gets what slabs on GPUs need as well.
comma := ,
EXTRAS := dev$(if $(wildcard /dev/nvidiactl),$(comma)cuda)

# The first of these that runs, is 3.11 or newer and can make environments. 3.11 comes first
# because it is the oldest that featcache supports.
PYTHONS := python3.11 python3 python3.12 python3.13 python3.14
PYTHON ?= $(shell for python in $(PYTHONS); do \
	"$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
	>/dev/null 2>&1 && echo "$$python" && break; done)

# Fails where the environment does not run or lacks a distribution that the dev extra asks for. It
# is tried on every call, so that an environment that lost something is repaired.
CHECK = $(BIN)/python -c 'import re, importlib.metadata as metadata; \
	[metadata.version(re.match(r"[\w.-]+", line)[0]) for line in metadata.requires("featcache") \
	if not re.search("extra == .(cuda|docs|fuzz)", line)]'
ifneq ($(wildcard $(STAMP)),)
ifneq ($(shell $(CHECK) >/dev/null 2>&1 && echo whole),whole)
$(shell rm -f $(STAMP))
endif
endif

# Each example is a program of its own, whose modules import each other from its folder.
EXAMPLES := $(sort $(dir $(wildcard examples/*/*.py)))

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-hosts test test-vllm test-sglang lint format bench docs soak fuzz clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 10

venv: $(STAMP) ## make or repair .venv, with everything that the other targets need

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "featcache needs Python 3.11 or newer with venv (tried: $(PYTHONS)); name one with make PYTHON=..." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "installing featcache[$(EXTRAS)] into $(VENV) (torch is 200 MB where the index has it for the CPU, else 3 GB with CUDA)"
	@test -t 1 || quiet=--quiet; $(BIN)/python -m pip install $$quiet --disable-pip-version-check --no-input -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP) ## run the demo
	$(BIN)/python examples/demo $(ARGS)

# NIXL is larger than all else together, so it has a folder of its own. Without its dependencies: what the
# owners use of it needs none but numpy and torch, which are here.
NIXL := .venv-hosts
NIXL_NEEDS = import tomllib; \
	print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["reach"], sep="\n")

$(NIXL)/.installed: $(STAMP) pyproject.toml
	@echo "installing NIXL into $(NIXL) (200 MB)"; mkdir -p $(NIXL); $(BIN)/python -c '$(NIXL_NEEDS)' > $(NIXL)/needs.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --no-deps --upgrade --target $(NIXL) -r $(NIXL)/needs.txt 2>$(NIXL)/pip.txt \
		|| { echo "NIXL can't be installed: $$(grep -m1 '^ERROR' $(NIXL)/pip.txt || tail -n1 $(NIXL)/pip.txt)" >&2; exit 1; }
	@touch $@

demo-hosts: $(NIXL)/.installed ## run the demo over two hosts: network namespaces (root), else two owners on the loopback device
	PYTHONPATH=$(NIXL) $(BIN)/python examples/demo --hosts $(ARGS)

test: $(STAMP) ## run the tests; those that need a GPU are skipped where there is none
	$(BIN)/pytest -q -n auto --maxprocesses 8 --dist worksteal $(ARGS)

test-vllm: ## run the connector's tests in vLLM itself, in an environment of their own
	@PYTHON=$(PYTHON) tests/integrations/vllm/run $(ARGS)

test-sglang: ## run the plugin's tests in SGLang itself, in an environment of their own
	@PYTHON=$(PYTHON) tests/integrations/sglang/run $(ARGS)

lint: $(STAMP) ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src tests
	$(BIN)/mypy $(wildcard examples/*.py)
	@set -e; for example in $(EXAMPLES); do \
		echo "$(BIN)/mypy $$example"; MYPYPATH="$$example" $(BIN)/mypy "$$example"; done

format: $(STAMP) ## put the sources in format and mend what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## measure on host memory
	$(BIN)/python tests/bench/host.py $(ARGS)

# The site has an environment of its own: it reads the sources, so it needs neither torch nor featcache.
DOCS_VENV := .venv-docs
DOCS_STAMP := $(DOCS_VENV)/.installed
ifneq ($(filter docs,$(MAKECMDGOALS)),)
ifneq ($(shell $(DOCS_VENV)/bin/mkdocs --version >/dev/null 2>&1 && echo whole),whole)
$(shell rm -f $(DOCS_STAMP))
endif
endif
# What the docs extra of pyproject.toml asks for, a line each.
DOCS_NEEDS = import tomllib; \
	print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")

$(DOCS_STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "the site needs Python 3.11 or newer with venv (tried: $(PYTHONS)); name one with make PYTHON=..." >&2; exit 1; }
	@echo "making $(DOCS_VENV) with $(PYTHON)"; $(PYTHON) -m venv --clear $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -c '$(DOCS_NEEDS)' > $(DOCS_VENV)/needs.txt
	@$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-input -r $(DOCS_VENV)/needs.txt
	@touch $@

docs: $(DOCS_STAMP) ## build the site of docs/ into site/ and check its links; ARGS=--check opens it in Chromium too
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict
	PYTHONPATH=tests $(DOCS_VENV)/bin/python -m docs.built site $(ARGS)

MINUTES ?=

soak: $(STAMP) ## a storm of kills, stops and limits: make soak MINUTES=30, ARGS="--keyed --reads 10000000"
	$(BIN)/python -m tests.soak $(if $(MINUTES),--minutes $(MINUTES)) $(ARGS)

fuzz: $(STAMP) ## fuzz what decodes refs, messages and frames: make fuzz MINUTES=30
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz $(if $(MINUTES),--minutes $(MINUTES)) $(ARGS)

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) $(DOCS_VENV) $(NIXL) .venv-vllm .venv-sglang site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests $(wildcard examples) -name __pycache__ -type d -prune -exec rm -rf {} +
