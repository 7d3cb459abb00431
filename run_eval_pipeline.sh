#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat << 'END'
usage: bash run_eval_pipeline.sh [EXPERIMENT] [key=value ...] [--json] [--debug]

Runs all stages of an experiment, skipping what is done, and prints its table: the same command resumes.
EXPERIMENT is a name in configs/experiments (default: quickstart) or a path to a .yaml file.

  bash run_eval_pipeline.sh                                     the quick start: no download, no GPU
  bash run_eval_pipeline.sh quickstart embed.batch_size=8
  bash run_eval_pipeline.sh my_experiment.yaml

The pipeline works in the root of the repository: relative paths inside configurations start there.
The active environment is used if it has what setup.cfg asks for; else .venv is made on first use (uv or pip).
PLUMBLINE_PYTHON=/path/to/python3 chooses the Python (3.11 or newer) that .venv is made with.
All other commands: .venv/bin/python -m pipeline --help
END
}

case "${1:-}" in
    -h | --help) usage; exit ;;
    *.yaml | *.yml)
        # a path is meant from where the user stands
        if [ -f "$1" ]; then
            experiment="$(cd "$(dirname -- "$1")" && pwd)/$(basename -- "$1")"
            shift
            set -- "$experiment" "$@"
        fi ;;
esac
if [[ "${1:--}" == -* || "$1" =~ ^[A-Za-z_][A-Za-z0-9_.]*= ]]; then set -- quickstart "$@"; fi

cd "$(dirname -- "${BASH_SOURCE[0]}")"
. ./environment.sh
prepare core
exec "$python" -m pipeline run "$@"
