#!/bin/bash
# Runs rayembed on the machines of a Slurm job: sbatch cluster/slurm.sh run experiment.yaml [section.key=value ...]
# A Ray of all its machines is started by one srun, with a token of its own, and ends with the job. When the time is
# nearly over, or the job is preempted, it is queued again and goes on from what output_dir holds.
#SBATCH --job-name=rayembed
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=rayembed-%j.log
set -euo pipefail

if (($# == 0)); then
    echo "usage: sbatch $0 JOB EXPERIMENT.yaml [section.key=value ...]" >&2
    exit 2
fi
# shellcheck disable=SC1091 # rayembed is installed there; the folder is seen by all machines
source "${RAYEMBED_VENV:-.venv}/bin/activate"

again='' driver='' leave_s=${RAYEMBED_LEAVE_S:-120}
first_port=$((20000 + SLURM_JOB_ID % 1000 * 10)) # two jobs may have a machine in common
export first_port
# A job's script runs on its first machine, where the head will be.
RAY_ADDRESS=$(python -c 'import ray; print(ray.util.get_node_ip_address())'):$first_port
export RAY_ADDRESS
export RAY_TMPDIR=/tmp/rayembed-$SLURM_JOB_ID RAY_USAGE_STATS_ENABLED=0
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # when Slurm ends Ray, nothing runs any more that could be waited for
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=${RAYEMBED_TOKENS:-$HOME/.ray}/slurm-$SLURM_JOB_ID
(
    umask 077
    mkdir -p "${RAY_AUTH_TOKEN_PATH%/*}"
    python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH"
)

alive='import ray; ray.init(logging_level="ERROR"); nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]];'
answers() { # whether the head of this job's Ray can be reached
    (: <"/dev/tcp/${RAY_ADDRESS%:*}/${RAY_ADDRESS##*:}") 2>/dev/null
}

# shellcheck disable=SC2329 # srun calls it
machine() { # Ray on one machine, until it is told to end
    mkdir -p "$RAY_TMPDIR/ray"
    local pid status=0 options=(--block "--num-cpus=$SLURM_CPUS_PER_TASK" --dashboard-agent-listen-port=0) # 0: any port
    if ((SLURM_NODEID == 0)); then
        options+=(--head "--port=$first_port" --dashboard-host=127.0.0.1 "--dashboard-port=$((first_port + 1))")
        options+=("--ray-client-server-port=$((first_port + 2))")
    else
        options+=("--address=$RAY_ADDRESS")
        until answers; do sleep 1; done
    fi
    ray start "${options[@]}" &
    pid=$!
    trap 'kill "$pid"' TERM
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || status=$?; done
    rm -rf "$RAY_TMPDIR"
    return "$status" # srun ends the others where one has failed
}
export -f answers machine

srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 bash -c machine &
machines=$!
# shellcheck disable=SC2329 # the trap calls it
end() { # of what was started here, however this script ends
    local status=$?
    # shellcheck disable=SC2086 # there may be no driver
    kill $driver "$machines" 2>/dev/null || true
    wait "$machines" || true
    rm -f "$RAY_AUTH_TOKEN_PATH"
    if [[ $again && $status != 0 ]]; then
        echo "slurm.sh: the time is nearly over; the job is queued again and goes on from what is done"
        scontrol requeue "$SLURM_JOB_ID"
    fi
}
trap end EXIT
trap 'exit 143' TERM
# shellcheck disable=SC2329 # the trap calls it
leave() { # tells training that its machines go: it writes a checkpoint, and has RAYEMBED_LEAVE_S seconds for it
    local node drains=()
    again=$SECONDS
    [[ $driver ]] || exit 1
    for node in $(python -c "$alive print(*nodes)"); do
        ray drain-node "--address=$RAY_ADDRESS" "--node-id=$node" --reason=DRAIN_NODE_REASON_PREEMPTION \
            --reason-message="the Slurm job ends" "--deadline-remaining-seconds=$leave_s" >/dev/null &
        drains+=($!)
    done
    wait "${drains[@]}" || true
    again=$SECONDS
}
trap leave USR1 # see --signal above

until answers; do
    if ! kill -0 "$machines" 2>/dev/null; then
        echo "slurm.sh: Ray did not start; what it said is above" >&2
        exit 1
    fi
    sleep 1
done
deadline=$((SECONDS + 600))
until (($(python -c "$alive print(len(nodes))") == SLURM_JOB_NUM_NODES)); do
    ((SECONDS < deadline)) || exit 1
done

rayembed "$@" &
driver=$!
while kill -0 "$driver" 2>/dev/null; do
    if ! kill -0 "$machines" 2>/dev/null || { [[ $again ]] && ((SECONDS > again + leave_s)); }; then
        kill "$driver" 2>/dev/null || true
        break
    fi
    sleep 1
done
wait "$driver"
