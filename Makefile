# `make` lists the targets. TORCH_INDEX=URL names another index for torch, for people behind a mirror; PYTHON3=python3.12
# another Python to begin with.
PYTHON3 ?= python3
CPU_INDEX = https://download.pytorch.org/whl/cpu
PYTHON = .venv/bin/python
INSTALL = $(PYTHON) -m pip install --quiet
STAGES = model-eval model-infer
COPIES = net.py stage entrypoint.sh .dockerignore
CHECK_PYTHON = $(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "make: Python 3.11 or newer is needed: make PYTHON3=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }

.PHONY: help test data local serve copies lint audit bench chaos cluster-test tools-test scaling
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /make \1 - /p' $(MAKEFILE_LIST)

test: .venv/for-tests ## set up what the tests need and run them: a fast tier, and one in real containers
	$(PYTHON) -m pytest tests

data: ## put the MNIST data set into ./data ahead of time, and verify it
	@$(CHECK_PYTHON)
	@$(PYTHON3) data/fetch.py

local: .venv/for-stages ## without Docker: set up a virtual environment, and run the three programs in order
	@$(PYTHON) data/fetch.py
	$(PYTHON) model-train/train.py --data data --model model
	$(PYTHON) model-eval/evaluate.py --data data --model model
	$(PYTHON) model-infer/infer.py --data data --model model

serve: .venv/for-stages ## without Docker: draw on the model that `make local` has trained (FLAGS="--port 8001": elsewhere)
	$(PYTHON) model-infer/serve.py --data data --model model $(FLAGS)

bench: .venv/for-bench ## measure speed, accuracy, memory and sizes against PyTorch's example (FLAGS=--quick: shortened)
	@$(PYTHON) data/fetch.py
	$(PYTHON) tests/bench/bench.py $(FLAGS)

chaos: .venv/for-tests ## try failures at many moments, and all broken files (FLAGS="-k accurate --kills 2": fewer)
	REQUIRE_CONTAINERS=1 $(PYTHON) -m pytest tests/containers/chaos.py $(FLAGS)

cluster-test: .venv/for-tests ## what faults do to a training on two nodes (FLAGS="-k network": some; takes 9 minutes)
	REQUIRE_CONTAINERS=1 $(PYTHON) -m pytest tests/containers/cluster_faults.py tests/containers/slurm_faults.py $(FLAGS)

tools-test: .venv/for-tests ## what dvc, MLflow and Prometheus make of the results (downloads the first two)
	$(PYTHON) -m pytest tests/other_programs.py tests/prometheus.py $(FLAGS)

scaling: .venv/for-tests ## measure training on two nodes, simulate it on up to 64, and draw docs/scaling.png
	$(PYTHON) tests/bench/scaling.py $(FLAGS)

copies: ## copy what the three images share from model-train to the others, and the version to their labels
	@for stage in $(STAGES); do \
		rm -rf $$stage/stage && cp -r $(addprefix model-train/,$(COPIES)) model-train/requirements*.txt $$stage/; done
	@version=$$(sed -n 's/^VERSION = "\(.*\)".*/\1/p' model-train/stage/__init__.py) && \
		sed -i.old "s/\(image\.version=\)\"[^\"]*\"/\1\"$$version\"/" model-*/Dockerfile.* && rm model-*/*.old

lint: .venv/for-tests ## format the code and report lint and type errors
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .
	@for folder in data model-train model-eval model-infer; do \
		(cd $$folder && ../$(PYTHON) -m mypy --config-file ../pyproject.toml .) || exit 1; done

audit: .venv/for-tests ## look up known vulnerabilities of the pinned packages; needs network access
	$(INSTALL) pip-audit==2.10.1
	$(PYTHON) -m pip_audit --strict --disable-pip --require-hashes --requirement model-train/requirements.txt
	$(PYTHON) -m pip_audit --strict --disable-pip --require-hashes $(addprefix --requirement ,$(OWN))
	$(PYTHON) -m pip_audit --strict --disable-pip --no-deps --requirement model-train/requirements-torch.txt

# Each of these files is made last, so that what has failed is not taken for done. --clear: pip would keep a build of
# torch that is of the right version, but cannot be imported.
OWN = model-infer/requirements-serve.txt model-eval/requirements-export.txt
.venv/for-stages: model-train/requirements-torch.txt model-train/requirements.txt $(OWN)
	@$(CHECK_PYTHON)
	$(PYTHON3) -m venv --clear .venv
ifdef TORCH_INDEX
	$(INSTALL) --no-deps --index-url $(TORCH_INDEX) --requirement $< || \
		{ echo "make: cannot install torch from TORCH_INDEX=$(TORCH_INDEX)" >&2; exit 1; }
else
	$(INSTALL) --no-deps --index-url $(CPU_INDEX) --requirement $< || \
		{ echo "make: cannot install torch from $(CPU_INDEX). On PyPI it comes with CUDA: downloading about 2.7 GB" >&2; \
		$(INSTALL) --requirement $<; }
endif
	$(INSTALL) --no-deps --require-hashes --requirement model-train/requirements.txt
	$(INSTALL) --no-deps --require-hashes $(addprefix --requirement ,$(OWN))
	@$(PYTHON) -c "import torch, torchvision" 2>.venv/error || { exec >&2; tail -n 1 .venv/error; \
		echo "make: torch cannot be imported: $(or $(TORCH_INDEX),$(CPU_INDEX)) must serve its builds for the CPU"; exit 1; }
	@touch $@

.venv/for-tests: .venv/for-stages tests/requirements.txt
	$(INSTALL) --no-deps --require-hashes --requirement tests/requirements.txt
	@touch $@

.venv/for-bench: .venv/for-tests tests/bench/requirements.txt
	$(INSTALL) --no-deps --require-hashes --requirement tests/bench/requirements.txt
	@touch $@
