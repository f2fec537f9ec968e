#!/usr/bin/env bash
# 8b on 2 hosts of 8 GPUs, one process a host. Made by
#   jaxtrain launch mpi --host_names node1 node2 -- --config=configs/8b.py --mesh.fsdp=16
# To change it, run that again; to start it as it is, run this file in the repository's folder, which all hosts share.
set -uo pipefail

restarts=20

stopping=""
running=""
stop() {
  stopping=yes
  [[ -z $running ]] || kill -USR1 "$running"
}
trap stop TERM INT USR1

for ((turn = 0; turn <= restarts; turn++)); do
  export JAXTRAIN_EXIT_CODES=runs/8b/launch/mpi-$$-$turn # each process leaves its own here
  mkdir -p "$JAXTRAIN_EXIT_CODES"
  # A session of its own, so that Ctrl-C reaches the script alone; a fresh port, because the last one may still be held.
  setsid mpirun -np 2 --host node1:1,node2:1 --map-by ppr:1:node --bind-to none \
    -x JAXTRAIN_COORDINATOR=node1:$((61440 + turn)) \
    -x JAXTRAIN_EXIT_CODES \
    .venv/bin/python -m jaxtrain train --config=configs/8b.py --mesh.fsdp=16 &
  running=$!
  wait "$running"
  code=$?
  while kill -0 "$running" 2>/dev/null; do # a signal ends the wait, not mpirun
    wait "$running"
    code=$?
  done
  running=""

  ended_with() { grep -qx "$1" "$JAXTRAIN_EXIT_CODES"/* 2>/dev/null; } # whether a process did
  ended_with 76 && code=76 # saved after a signal
  ((code == 0)) && exit 0
  for refused in 2 1; do
    if ended_with $refused; then
      echo "error: starting again would end the same way; see above" >&2
      exit $refused
    fi
  done
  if [[ -n $stopping ]] || ((code == 76)); then
    echo "stopped; the same command goes on from the newest checkpoint" >&2
    exit 76
  fi
  ((turn < restarts)) || break
  echo "exit code $code: restart $((turn + 1)) of at most $restarts in 10 s" >&2
  sleep 10
done
echo "error: lost after $restarts restarts; look at the log" >&2
exit "$code"
