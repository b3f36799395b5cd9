#!/usr/bin/env bash
# Show the runs in TensorBoard on this machine's own address alone: it has no password.
#
#     launch/tensorboard.sh                                 runs/ on port 6006
#     launch/tensorboard.sh --logdir elsewhere --port 7007  options are TensorBoard's
#
# From another machine: ssh -L 6006:localhost:6006 THIS_MACHINE, then open http://localhost:6006 there.
# PYTHON  interpreter, default python3
set -euo pipefail
exec "${PYTHON:-python3}" -m tensorboard.main --logdir runs "$@" --host localhost
