#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat << 'END'
usage: bash run_tests.sh [--lint | --no-lint] [arguments for pytest]

Lint (flake8), types (mypy), then the quick tests (pytest); fails if any of them does.

  bash run_tests.sh --no-lint tests/metrics -x                  some tests only
  bash run_tests.sh --lint                                      lint and types only
  bash run_tests.sh -m ""                                       slow tests as well

The environment is found or made as for run_eval_pipeline.sh, with the extra `test` of setup.cfg.
END
}

lint=yes tests=yes
case "${1:-}" in
    -h | --help) usage; exit ;;
    --lint) tests=no; shift ;;
    --no-lint) lint=no; shift ;;
esac

cd "$(dirname -- "${BASH_SOURCE[0]}")"
. ./environment.sh
prepare test

failed=""
if [ "$lint" = yes ]; then
    "$python" -m flake8 pipeline tests || failed="$failed flake8"
    "$python" -m mypy || failed="$failed mypy"
fi
if [ "$tests" = yes ]; then "$python" -m pytest "$@" || failed="$failed pytest"; fi
if [ -n "$failed" ]; then fail "failed:$failed"; fi
