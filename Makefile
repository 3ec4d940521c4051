# Every target sets up what it needs in .venv; `make demo` and `make test` are the two to know.
PYTHON ?= python3
# Any requirement pip understands, such as TORCH="torch==2.13.0".
TORCH ?= torch torchvision
OLD_TORCH ?= torch==2.13.0
# Test processes at a time, of one thread each: most tests are small. The tests of one file stay together.
JOBS ?= 2
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile

.PHONY: demo test test-pure test-interpret test-old-torch test-wheel sanitize fuzz soak lint format bench build clean

demo: .venv/.installed
	$(BIN)/clusterq demo --output runs/demo

test: .venv/.installed
	$(PYTEST)

# The op suite on the PyTorch reference alone, as on a machine without a compiler.
test-pure: .venv/.installed
	CLUSTERQ_BACKEND=reference $(PYTEST) tests/test_fake_quant*.py tests/test_bn_stats*.py tests/test_alignment.py tests/test_centroids*.py tests/test_kmeans.py tests/test_codebook*.py tests/test_op_*.py tests/test_library.py

# Triton kernels in Triton's interpreter, which has to be chosen before triton is imported.
test-interpret: .venv/.installed
	CLUSTERQ_BACKEND=triton TRITON_INTERPRET=1 $(BIN)/pytest tests/test_kernels_interpret.py

# The library built against the torch of .venv, loaded in an older torch.
test-old-torch: .venv/.installed .venv-old/.installed
	CLUSTERQ_OLD_PYTHON=$(CURDIR)/.venv-old/bin/python $(BIN)/pytest tests/test_stable_abi.py

# The wheel of an sdist, installed in the environment of the older torch, tested without a compiler and away from this
# checkout; WHEEL_TESTS=tests for the whole suite.
test-wheel: .venv/.installed .venv-old/.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/wheel.py --jobs $(JOBS) .venv-old $(WHEEL_TESTS)

# Op tests with the CPU kernels under the address and undefined-behaviour sanitizers of g++, on memory filled with NaN;
# SANITIZE="tests/test_alignment.py" for others.
sanitize: .venv/.installed
	$(BIN)/python tests/sanitize.py --jobs $(JOBS) $(SANITIZE)

# Every reader of foreign files on 10,000 mutated inputs; FUZZ="--seed 7 npz" for others.
fuzz: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz_readers.py $(FUZZ)

# Whole runs for half an hour: memory that grows, files that stay open. SOAK="--minutes 480" for a night.
soak: .venv/.installed
	$(BIN)/python -W ignore bench/soak.py $(SOAK)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' | xargs $(BIN)/clang-format --dry-run --Werror

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' | xargs $(BIN)/clang-format -i

bench: .venv/.installed
	$(BIN)/python bench/report.py

build: .venv/.installed
	$(BIN)/python setup.py -q build_ext --inplace

clean:
	rm -rf build clusterq/_build.json clusterq/*.so *.egg-info

# torch goes in first, so that the extension is built against it and not against a second copy.
.venv/.installed: pyproject.toml setup.py build_backend.py $(wildcard csrc/*.* csrc/*/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; \
	  echo "Could not create .venv: on Debian and Ubuntu, apt-get install python3-venv python3-dev g++" >&2; exit 1; }
	$(PIP) --upgrade pip
	$(PIP) $(TORCH)
	$(PIP) -e '.[demo,test]'
	touch $@

.venv/.dev: .venv/.installed
	$(PIP) ruff mypy clang-format pre-commit
	touch $@

.venv-old/.installed:
	test -x .venv-old/bin/python || $(PYTHON) -m venv .venv-old
	.venv-old/bin/pip install --quiet --disable-pip-version-check '$(OLD_TORCH)' numpy safetensors tqdm
	touch $@
