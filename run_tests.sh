#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat << 'END'
usage: bash run_tests.sh [--lint | --no-lint | --lavis] [arguments for pytest]

Lint (flake8), types (mypy), then the quick tests (pytest); fails if any of them does.

  bash run_tests.sh --no-lint tests/metrics -x                  some tests only
  bash run_tests.sh --lint                                      lint and types only
  bash run_tests.sh -m ""                                       slow tests as well
  bash run_tests.sh --lavis                                     only what needs salesforce-lavis, in .venv-lavis,
                                                                which is made on first use (6 GB)

The environment is found or made as for run_eval_pipeline.sh, with the extra `test` of setup.cfg.
END
}

lint=yes tests=yes lavis=no
case "${1:-}" in
    -h | --help) usage; exit ;;
    --lint) tests=no; shift ;;
    --no-lint) lint=no; shift ;;
    --lavis) lint=no tests=no lavis=yes; shift ;;
esac

cd "$(dirname -- "${BASH_SOURCE[0]}")"
. ./environment.sh
if [ "$lavis" = yes ]; then
    prepare lavis
    its_python=$python
fi
prepare test

failed=""
if [ "$lint" = yes ]; then
    "$python" -m flake8 pipeline tests || failed="$failed flake8"
    "$python" -m mypy || failed="$failed mypy"
fi
if [ "$tests" = yes ]; then "$python" -m pytest "$@" || failed="$failed pytest"; fi
if [ "$lavis" = yes ]; then
    say "in .venv-lavis: the encoder lavis beside LAVIS itself"
    "$its_python" -m pytest tests/lavis "$@" || failed="$failed pytest-in-.venv-lavis"
    say "in the main environment: mini M-BEIR by way of .venv-lavis, and our BLIP towers beside LAVIS's"
    PLUMBLINE_LAVIS="$its_python" "$python" -m pytest tests/lavis "$@" || failed="$failed pytest"
fi
if [ -n "$failed" ]; then fail "failed:$failed"; fi
