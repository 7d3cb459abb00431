#!/usr/bin/env bash
# The chain of arrays by hand, for those who like to see it: bash slurm/submit.sh EXPERIMENT [key=value ...]
# WORKERS=8 elements embed; SBATCH_* variables (sbatch(1)) choose partition, account and the like.
# `python -m pipeline run EXPERIMENT --on slurm cluster=NAME` does the same with resources for each stage.
set -euo pipefail
cd "$(dirname -- "${BASH_SOURCE[0]}")/.."
if [ $# -eq 0 ]; then sed -n '2,4s/^# //p' "$0"; exit 2; fi
workers="${WORKERS:-4}" python="${PYTHON:-$([ -x .venv/bin/python ] && echo "$PWD/.venv/bin/python" || echo python)}"
mkdir -p slurm-logs

submit() { sbatch --parsable --requeue --open-mode=append --signal=B:USR1@120 --kill-on-invalid-dep=yes "$@"; }
array() { submit --output="slurm-logs/%x.%A_%a.log" --array="0-$(($1 - 1))" "${@:2}"; }

collect=$(array 1 --job-name=collect slurm/stage.sbatch --python "$python" collect "$@")
embed=$(array "$workers" --job-name=embed --dependency="afterok:$collect" slurm/stage.sbatch --python "$python" embed "$@")
index=$(array 1 --job-name=index --dependency="afterok:$embed" slurm/stage.sbatch --python "$python" index "$@")
retrieve=$(array "$workers" --job-name=retrieve --dependency="afterok:$index" slurm/stage.sbatch --python "$python" retrieve "$@")
last=$(submit --output="slurm-logs/%x.%j.log" --job-name=score --dependency="afterok:$retrieve" \
    slurm/stage.sbatch --python "$python" run "$@")
echo "collect $collect, embed $embed ($workers elements), index $index, retrieve $retrieve, score $last"
echo "watch: squeue --me; logs: slurm-logs/"
