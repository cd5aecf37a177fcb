# Short names for what tools/setup.sh, CMake, CTest and pytest do.
BUILD = build/venv
PYTEST_ARGS ?=
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo test setup build cpptest pytest lint format clean

demo: setup  ## convert, distil and measure the default model; writes demo-out/
	.venv/bin/dijiang demo

test: cpptest pytest

setup:
	tools/setup.sh

build: setup  ## with the C++ tests
	cmake -S . -B $(BUILD) -DDIJIANG_TESTS=ON >/dev/null
	cmake --build $(BUILD)

cpptest: build
	ctest --test-dir $(BUILD) --output-on-failure --no-tests=error -j 2

pytest: build
	python -m pytest -p no:cacheprovider --durations=15 $(PYTEST_ARGS)

lint: setup
	ruff check .
	ruff format --check .
	git ls-files '*.cpp' '*.h' '*.cu' | xargs clang-format --dry-run -Werror

format: setup
	ruff check --fix .
	ruff format .
	git ls-files '*.cpp' '*.h' '*.cu' | xargs clang-format -i

clean:
	rm -rf build dist python/dijiang/*.so
