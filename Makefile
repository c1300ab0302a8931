# Each target makes what it needs: python3, venv, pip and make are enough to start.
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
DATA ?=
FACES ?= 400
# Processes for the tests; those of several ranks mostly wait, for each other and for programs to start.
JOBS ?= 2

# The GPU where there is one, else two processes on the CPU.
GPUS := $(shell nvidia-smi -L 2>/dev/null | wc -l)
ifeq ($(GPUS),0)
LAUNCH := $(BIN)/accelerate launch --config_file launchers/accelerate/cpu.yaml -m sega_dist.train
else ifeq ($(GPUS),1)
LAUNCH := $(BIN)/python -m sega_dist.train
else
LAUNCH := $(BIN)/accelerate launch --config_file launchers/accelerate/gpu.yaml --num_processes $(GPUS) -m sega_dist.train
endif

# make gpu on a machine without network: its own python, and a folder of packages that it lacks.
GPU_PYTHON ?= $(BIN)/python
SITE ?=
GPU_OUT ?= runs/gpu

.PHONY: help demo test test-all test-slurm soak gpu gpu-step lint clean

help:
	@echo "make demo            shards, trains, evaluates, upscales procedural faces in a few minutes, and shows it on a page"
	@echo "make demo DATA=Z     the same on a folder or a zip of faces"
	@echo "make test            the tests that take seconds each; make test-all adds the slow ones"
	@echo "make test-slurm      the job scripts on a real SLURM of four nodes, all on this machine"
	@echo "make lint            ruff and mypy"
	@echo "make gpu             checks, tunes and times the kernels on this machine's GPU, in under ten minutes"
	@echo "make gpu-step        the same for whole training steps: PART=check, bench or train, under nine minutes each"
	@echo "make soak            seventy kills, real cables, the kernels' tests on the oldest Triton, every kernel for every chip"

$(BIN)/.program: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(BIN)/.dev: $(BIN)/.program
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,deepspeed,export]'
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
	$(BIN)/sega-dist evaluate $(DEMO)/run --data $(DEMO)/shards --save 6
	$(BIN)/sega-dist upscale $(DEMO)/run $(DEMO)/run/eval/lr $(DEMO)/upscaled
	$(BIN)/sega-dist report $(DEMO)/run --out $(DEMO)/report.html
	@echo
	@echo "The network never saw these images. Its loss included a pixel term (loss.w_pixel=1), which favours PSNR."
	@echo "all of it: $(DEMO)/report.html (open it in a browser)"
	@echo "pictures:  $(DEMO)/run/eval/grid.png (LR, bicubic, SR, HR)   $(DEMO)/run/curves.png   $(DEMO)/upscaled/"
	@echo "figures:   $(DEMO)/run/eval/metrics.json   $(DEMO)/run/eval/per_image.csv"

test: $(BIN)/.dev
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist worksteal

test-all: $(BIN)/.dev
	$(BIN)/python -m pytest -m "not soak and not slurm" -n $(JOBS) --dist worksteal

# Wants Debian's slurmctld, slurmd and slurm-client; starts a cluster of its own on the loopback, and ends it.
test-slurm: $(BIN)/.dev
	$(BIN)/python -m pytest -m slurm

soak: $(BIN)/.soak
	$(BIN)/python -m pytest -m soak
	SEGA_DIST_KILLS="20 50" $(BIN)/python -m pytest -s tests/test_survival.py -k no_kill
	$(SOAK)/python -m pytest -p no:cacheprovider tests/test_kernels.py
	TRITON_INTERPRET=0 $(SOAK)/python -m sega_dist.kernels.aot --arch sm_80 sm_89 sm_90 sm_100 gfx942 --dtype bf16 fp16 fp32
	TRITON_INTERPRET=0 $(BIN)/python -m sega_dist.kernels.aot --arch sm_80 sm_89 sm_90 sm_100 gfx942 --dtype bf16 fp16 fp32

# Triton 3.6 is the oldest that is supported; its interpreter wants a numpy before 2.4.
SOAK := .venv-soak/bin
$(BIN)/.soak: $(BIN)/.dev
	$(PYTHON) -m venv .venv-soak
	$(SOAK)/python -m pip install --quiet --disable-pip-version-check -c constraints-soak.txt -e '.[dev]'
	touch $@

gpu: $(if $(findstring $(BIN),$(GPU_PYTHON)),$(BIN)/.dev)
	PYTHONPATH=$(SITE):$(CURDIR) TRITON_INTERPRET=0 $(GPU_PYTHON) -m sega_dist.bench.gpu --out $(GPU_OUT)

# PART=check, bench or train; train wants FACES_ZIP, TEST_ZIP and VGG19.
PART ?= check
FACES_ZIP ?=
TEST_ZIP ?=
VGG19 ?=
gpu-step: $(if $(findstring $(BIN),$(GPU_PYTHON)),$(BIN)/.dev)
	PYTHONPATH=$(SITE):$(CURDIR) TRITON_INTERPRET=0 timeout -k 20 530 $(GPU_PYTHON) -m sega_dist.bench.gpu_step --part $(PART) \
	  --out $(GPU_OUT)-step $(if $(FACES_ZIP),--faces $(FACES_ZIP)) $(if $(TEST_ZIP),--test $(TEST_ZIP)) \
	  $(if $(VGG19),--vgg19 $(VGG19))

lint: $(BIN)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-soak build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
