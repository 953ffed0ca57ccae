#!/usr/bin/env bash
# Every sweep ends here: the cells on standard input go to runner.py, with --cells to standard output, narrowed by ENVS.
if [ "${1:-}" = --cells ]; then
    cells=$(cat)
    for env in $ENVS; do # by the names that runner.py takes
        named="--(env-id|dataset) '?([^ ]*/)?$env(NoFrameskip)?(-v[0-9]+)?'?( |$)"
        grep -qE -- "$named" <<<"$cells" || {
            echo "error: ENVS: this sweep has no $env" >&2
            exit 2
        }
        any="${any:+$any|}$named"
    done
    grep -E -- "$any" <<<"$cells"
    exit
fi
python="${PYTHON:-.venv/bin/python}"
if ! command -v "$python" >/dev/null; then
    echo "error: there is no $python; PYTHON=... names an interpreter that has requirements-benchmark.txt" >&2
    exit 2
fi
exec "$python" benchmark/runner.py "$@"
