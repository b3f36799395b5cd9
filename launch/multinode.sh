#!/usr/bin/env bash
# Train on several machines: start this on each of them, within ten minutes, with the same values and options.
#
#     HEAD=node0:29400 NODES=2 NODE_RANK=0 launch/multinode.sh --run.name mine --config cifar10     on node0
#     HEAD=node0:29400 NODES=2 NODE_RANK=1 launch/multinode.sh --run.name mine --config cifar10     on the other
#
# HEAD       host and port of machine 0, which the others can reach; it needs a private network: the port has no password
# NODES      machines
# NODE_RANK  number of this one, from 0
# ADDRESS    of this machine among the others; default: what its host name stands for. Where a machine has several
#            networks, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose the one that the processes talk over.
# RANKS      processes of each machine; default: one for each GPU, or for each core where there is no GPU
# RESTARTS   how often they may start again, default 3; a mistake in the options is tried as often
# PYTHON     interpreter, default python3
#
# Slurm's and Kubeflow's own variables serve for NODES, NODE_RANK, RANKS and HEAD where these are not set. --run.name is
# required, and --run.root must be a folder that all machines share: whichever of them gets rank 0 writes there.
# A machine that was lost may come back by the same command. Machine 0 holds the rendezvous: when it is lost, start all again.
set -euo pipefail
head=${HEAD:-${PET_MASTER_ADDR:+$PET_MASTER_ADDR:${PET_MASTER_PORT:-29400}}}
nodes=${NODES:-${PET_NNODES:-${SLURM_NNODES:-}}}
node_rank=${NODE_RANK:-${PET_NODE_RANK:-${SLURM_NODEID:-}}}
# shellcheck source=launch/run_folder.sh
source "$(dirname "${BASH_SOURCE[0]}")/run_folder.sh"
run_folder "" "$@"
for needed in "HEAD:$head" "NODES:$nodes" "NODE_RANK:$node_rank" "--run.name:$name"; do
    if [ -z "${needed#*:}" ]; then
        echo "error: ${needed%%:*} is not given; the first lines of $0 say how to call it" >&2
        exit 2
    fi
done

# What counts the restarts of a killed process is known to each agent alone: the ranks must not share the agents' store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "${PYTHON:-python3}" -m torch.distributed.run --nnodes="$nodes" \
    --nproc-per-node="${RANKS:-${PET_NPROC_PER_NODE:-auto}}" --max-restarts="${RESTARTS:-3}" \
    ${ADDRESS:+--local-addr="$ADDRESS"} --rdzv-backend=c10d --rdzv-id="$name" --rdzv-endpoint="$head" \
    --rdzv-conf="is_host=$((node_rank == 0))" --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m iic_dist.train "$@"
