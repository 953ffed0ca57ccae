#!/usr/bin/env bash
# Every sweep ends here: the cells on standard input go to runner.py, with --cells to standard output.
if [ "$*" = --cells ] && [ -z "$ENVS" ]; then exec cat; fi
python="${PYTHON:-.venv/bin/python}"
if ! command -v "$python" >/dev/null; then
    echo "error: there is no $python; PYTHON=... names an interpreter that has requirements-benchmark.txt" >&2
    exit 2
fi
exec "$python" benchmark/runner.py "$@"
