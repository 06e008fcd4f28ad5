# make demo = a small environment + three minutes of the real thing, no training
# make run  = environment + the cpu profile + its report
# make test = environment + lint + every test        make lint = layout, rules and types alone        make fix = write the layout
# make book = the reading edition of a run (RUN=outputs/reference/cpu) in outputs/book/site
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
PROFILE ?= cpu
PACKAGES = settings.ini setup.py pyproject.toml constraints-cpu.txt

.PHONY: demo run lint fix book test test-eval test-clients test-sglang test-loads env env-eval env-clients env-sglang sglang-venv clean
run: env
	$(BIN)/tpro-nb run $(PROFILE)

# What only developers need comes with `make run`, into the same environment.
demo: $(VENV)/.demo
	$(BIN)/tpro-nb demo $(DEMO)
$(VENV)/.demo: $(PACKAGES) | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints-cpu.txt -e '.[demo]'
	touch $@

env: $(VENV)/.done
$(BIN)/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; try make PYTHON=python3.12"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
$(VENV)/.done: $(PACKAGES) | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints-cpu.txt -e '.[dev]'
	touch $@

# Layout and rules of notebooks, tests and C; types of the library that nbdev exports (its own layout is nbdev's).
KERNELS = $(wildcard tpro_nb/kernels/*.[ch])
lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(if $(KERNELS),$(BIN)/clang-format --dry-run -Werror $(KERNELS))

fix: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(if $(KERNELS),$(BIN)/clang-format -i $(KERNELS))

# Chapters without a stage are executed on toys where they changed, and kept in outputs/reference/chapters.
RUN ?= outputs/reference/cpu
$(VENV)/.book: $(VENV)/.done
	$(BIN)/python -m pip install -q -c constraints-cpu.txt -e '.[book]'
	touch $@
book: $(VENV)/.book
	$(BIN)/python nbs/_book/build.py --run $(RUN)

# nbdev-test runs every chapter on toys; pytest does the rest, the whole smoke profile through the real runner among it, in two processes.
test: env lint
	TPRO_NB_RUN=none OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2 --timing
	TPRO_NB_RUN=none OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder --durations=15 -rs

# lm-eval and statsmodels (multiple choice by likelihood, effects of an ablation): 30 more packages, so they are asked for by name.
# They want older versions of some that are here, so they lie in an environment on top of this one, which stays as it is.
EVAL = $(VENV)/eval
env-eval: $(EVAL)/.done
$(EVAL)/.done: $(VENV)/.done
	$(BIN)/python -m venv --without-pip $(EVAL)
	$(BIN)/python -c 'import sys, sysconfig; print(f"import site; site.addsitedir({sysconfig.get_path(sys.argv[1])!r})")' purelib \
	  > $$($(EVAL)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	$(EVAL)/bin/python -m pip install -q -c constraints-cpu.txt -e '.[eval]'
	$(EVAL)/bin/python -c 'import lm_eval, statsmodels'
	touch $@
test-eval: env-eval
	TPRO_NB_RUN=none $(EVAL)/bin/python -m pytest tests/test_evaluation_public.py tests/test_ablate.py -rs

# Others that load what is written here, each in an environment of its own: an older transformers, llama.cpp, mergekit (which races its rules against ours).
LOADS = $(VENV)/loads
$(LOADS)/.done: $(VENV)/.done
	for name in transformers4 llama mergekit; do test -x $(LOADS)/$$name/bin/python || $(PYTHON) -m venv $(LOADS)/$$name; done
	$(LOADS)/transformers4/bin/python -m pip install -q 'transformers==4.57.*' jinja2
	$(LOADS)/llama/bin/python -m pip install -q 'xllamacpp>=2026.10'
	$(LOADS)/mergekit/bin/python -m pip install -q 'mergekit>=0.1.5'
	touch $@
test-loads: $(LOADS)/.done
	TPRO_NB_LOADS=$(LOADS) TPRO_NB_RUN=none $(BIN)/python -m pytest tests/test_loads.py -rs

# Clients of the server that other people wrote, in an environment on top of this one, as above; what does not install is skipped by name.
CLIENTS = $(VENV)/clients
env-clients: $(CLIENTS)/.done
$(CLIENTS)/.done: $(VENV)/.done
	$(BIN)/python -m venv --without-pip $(CLIENTS)
	$(BIN)/python -c 'import sys, sysconfig; print(f"import site; site.addsitedir({sysconfig.get_path(sys.argv[1])!r})")' purelib \
	  > $$($(CLIENTS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	for client in litellm langchain-openai llm 'lm-eval[api]' guidellm; do $(CLIENTS)/bin/python -m pip install -q $$client || echo "$$client: not installed"; done
	npm install --silent --no-audit --no-fund --prefix $(CLIENTS)/js openai || echo "openai for JavaScript: not installed"
	touch $@
test-clients: env-clients
	TPRO_NB_RUN=none OMP_NUM_THREADS=1 $(CLIENTS)/bin/python -m pytest tests/test_server_clients.py -rs

# SGLang pins other versions, so it lives in an environment of its own, outside the clone, one for each content of its requirement files.
SGLANG_REQ  = tests/sglang/requirements-sglang-cpu.txt tests/sglang/requirements-sglang-cpu-nodeps.txt
SGLANG_VENV = $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/tpro_nb/venv-sglang-$(shell cat $(SGLANG_REQ) | sha256sum | cut -c1-12)
sglang-venv:
	@echo $(SGLANG_VENV)
env-sglang:
	test -e $(SGLANG_VENV)/.done || { $(PYTHON) -m venv $(SGLANG_VENV) && \
	  $(SGLANG_VENV)/bin/python -m pip install -q -c constraints-cpu.txt -r tests/sglang/requirements-sglang-cpu.txt && \
	  $(SGLANG_VENV)/bin/python -m pip install -q --no-deps -r tests/sglang/requirements-sglang-cpu-nodeps.txt && touch $(SGLANG_VENV)/.done; }
	@echo "SGLang's environment: $(SGLANG_VENV)"

# The real SGLang on a CPU over stand-ins for its kernels: a nano model trained here, and the export of the profile's run where there is one.
SGLANG_JSON   ?= outputs/reference/sglang.json
SGLANG_EXPORT ?= $(patsubst %/hot_token_map.pt,%,$(wildcard outputs/$(PROFILE)/13_serving/hot_token_map.pt))
test-sglang: env env-sglang
	$(BIN)/python tests/sglang/run_sglang.py --python $(SGLANG_VENV)/bin/python $(if $(SGLANG_JSON),--out $(SGLANG_JSON)) --export $(SGLANG_EXPORT)

clean:
	rm -rf $(VENV) build *.egg-info
