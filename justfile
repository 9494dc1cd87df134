set positional-arguments := true

export PENSTOCK_DATA := env("PENSTOCK_DATA", justfile_directory() / ".penstock")
export PENSTOCK_TARGETS := env("PENSTOCK_TARGETS", PENSTOCK_DATA / "targets.json")
export PENSTOCK_COMMAND := "./just penstock"
export PATH := justfile_directory() / ".venv/bin:" + env("PATH", "/usr/local/bin:/usr/bin:/bin")

# Tests and benchmarks start systems of their own, and must not see the clone's.
elsewhere := "env -u PENSTOCK_DATA -u PENSTOCK_TARGETS -u PENSTOCK_COMMAND -u PENSTOCK_TEST_WORKERS"

# List the recipes
[private]
default:
    @just --justfile "{{ justfile() }}" --list --unsorted

# Run the main job: start Penstock, build this repository's wheel on it, bring the wheel back to ./out
demo:
    @sh deploy/demo/demo.sh

# Start everything on this machine, in the background (what is in .penstock goes on)
up *args:
    @penstock up --detach "$@"

# Stop everything; the data stays
down:
    @penstock down

# The command line on this clone's system: ./just penstock builds
[no-cd]
[no-exit-message]
penstock *args:
    @penstock "$@"

# Run the tests, with real servers and processes (PENSTOCK_TEST_WORKERS says how many at once)
test *args:
    {{ elsewhere }} pytest -n "${PENSTOCK_TEST_WORKERS:-3}" --dist worksteal "$@"

# Kill things while builds run, and feed in what must be refused
faults *args:
    {{ elsewhere }} pytest -n "${PENSTOCK_TEST_WORKERS:-2}" --dist worksteal tests/faults "$@"

# Break a running system for hours, and simulated ones for millions of steps; prints figures (--help says more)
soak *args:
    {{ elsewhere }} python -m tests.soak "$@"

# Format, lint, types, imports, schemas: quick, and first in CI
check:
    ruff format --check .
    ruff check .
    mypy
    lint-imports
    python -m proto.schemas --check

# Mend what can be mended by itself
fix:
    ruff format .
    ruff check --fix .

# Write the JSON Schemas of every event
schemas:
    python -m proto.schemas

# Measure the running system; prints figures
bench *args:
    {{ elsewhere }} python -m tests.bench "$@"

# Pin the dependencies again (requirements.lock)
lock *args:
    uv pip compile --universal --generate-hashes --all-extras --no-emit-index-url --no-header --quiet "$@" -o requirements.lock pyproject.toml

# Remove what the tools made; the environment and the data stay
clean:
    rm -rf dist out .mypy_cache .ruff_cache .hypothesis .import_linter_cache .grimp_cache
