#!/usr/bin/env bash
# Train on this machine, with a process for each GPU; where a process dies, all start again from the newest checkpoint.
#
#     launch/local.sh --config cifar10 --run.name mine       options are the trainer's
#     RANKS=2 launch/local.sh                                two processes: the digits on the CPU
#
# RANKS     processes; default: one for each GPU, or for each core where there is no GPU
# RESTARTS  how often they may start again, default 3; a mistake in the options is tried as often
# PYTHON    interpreter, default python3
#
# SIGTERM and SIGUSR1 make it save and stop. Exit code: 0 done; 75 stopped and saved, the same command goes on; else failed.
set -euo pipefail
# shellcheck source=launch/run_folder.sh
source "$(dirname "${BASH_SOURCE[0]}")/run_folder.sh"
run_folder "local-$(date +%Y%m%d-%H%M%S)-$$" "$@"
rm -f "$folder/PREEMPTED" # what is there afterwards is about this start

"${PYTHON:-python3}" -m torch.distributed.run --standalone --nproc-per-node="${RANKS:-auto}" \
    --max-restarts="${RESTARTS:-3}" -m iic_dist.train --run.name "$name" "$@" &
agent=$!
trap 'kill -TERM "$agent" 2>/dev/null || true' TERM USR1
while kill -0 "$agent" 2>/dev/null; do wait "$agent" || true; done # a trapped signal ends a wait early
status=0
wait "$agent" || status=$?

# After a signal the agent exits with 1 even where every process saved and exited with 0: the marker tells.
if [ -e "$folder/PREEMPTED" ]; then
    echo "$folder: stopped and saved; the same command with --run.name $name goes on" >&2
    exit 75
fi
exit "$status"
