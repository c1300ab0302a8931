# Each target makes what it needs: python3, venv, pip and make are enough to start.
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
DATA ?=
FACES ?= 400

# The GPU where there is one, else two processes on the CPU.
GPUS := $(shell nvidia-smi -L 2>/dev/null | wc -l)
ifeq ($(GPUS),0)
LAUNCH := $(BIN)/accelerate launch --config_file launchers/accelerate/cpu.yaml -m sega_dist.train
else ifeq ($(GPUS),1)
LAUNCH := $(BIN)/python -m sega_dist.train
else
LAUNCH := $(BIN)/accelerate launch --config_file launchers/accelerate/gpu.yaml --num_processes $(GPUS) -m sega_dist.train
endif

.PHONY: help demo test test-all lint clean

help:
	@echo "make demo            shards, trains, evaluates and upscales procedural faces in a few minutes"
	@echo "make demo DATA=Z     the same on a folder or a zip of faces"
	@echo "make test            the tests that take seconds each; make test-all adds the slow ones"
	@echo "make lint            ruff and mypy"

$(BIN)/.program: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(BIN)/.dev: $(BIN)/.program
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(BIN)/.program
	rm -rf $(DEMO)
ifeq ($(DATA),)
	$(BIN)/sega-dist synthetic $(DEMO)/faces --images $(FACES)
	$(BIN)/sega-dist shard $(DEMO)/faces $(DEMO)/shards
else
	$(BIN)/sega-dist shard '$(DATA)' $(DEMO)/shards
endif
	$(LAUNCH) --preset tiny_x4 --data $(DEMO)/shards --out $(DEMO)/run
	$(BIN)/sega-dist evaluate $(DEMO)/run --data $(DEMO)/shards --out $(DEMO) --save 6
	$(BIN)/sega-dist upscale $(DEMO)/run $(DEMO)/lr $(DEMO)/upscaled
	@echo
	@echo "The network never saw these images. Its loss included a pixel term (loss.w_pixel=1), which favours PSNR."
	@echo "pictures:  $(DEMO)/grid.png (LR, bicubic, SR, HR)   $(DEMO)/run/curves.png   $(DEMO)/upscaled/"
	@echo "figures:   $(DEMO)/metrics.json   $(DEMO)/per_image.csv"

test: $(BIN)/.dev
	$(BIN)/python -m pytest -m "not slow"

test-all: $(BIN)/.dev
	$(BIN)/python -m pytest

lint: $(BIN)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
