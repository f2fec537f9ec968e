#!/usr/bin/env bash
# 8b on 2 hosts of 8 GPUs, one process a host. Made by
#   jaxtrain launch ray -- --config=configs/8b.py --mesh.fsdp=16
# Every host of the cluster has this repository in the same folder; the job starts there.
set -euo pipefail

exec ray job submit -- \
  bash -c 'cd "$0" && exec "$@"' "$PWD" \
  .venv/bin/python -m jaxtrain.launch.on_ray 2 8 20 \
  .venv/bin/python -m jaxtrain train --config=configs/8b.py --mesh.fsdp=16
