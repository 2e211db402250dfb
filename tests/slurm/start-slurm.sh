#!/usr/bin/env bash
# Start a private, emulated Slurm cluster of N nodes on this machine: no systemd, no files outside DIR, loopback
# (or private network namespaces) only. Prints the variables to set. Needs Debian's slurmctld, slurmd, slurm-client, munge.
#
#   variables=$(./start-slurm.sh [-n NODES] [-c CPUS_PER_NODE] [-g GPUS_PER_NODE] [-m plain|uts|netns] [-d DIR]) || exit 1
#   eval "$variables"; sinfo; sbatch job.sbatch; ./stop-slurm.sh "$SLURM_CI_DIR" --rm
#
# plain: nodes share the machine's host name; node names do not resolve (needs no rights)
# uts:   each node has its own host name and a private /etc/hosts (needs CAP_SYS_ADMIN) [default where it is allowed]
# netns: as uts, and each node has its own network namespace and address (needs CAP_NET_ADMIN and iproute2 too)
set -euo pipefail
NODES=2 CPUS=4 GPUS=0 DIR=
if unshare --mount --uts true 2>/dev/null; then MODE=uts; else MODE=plain; fi
while getopts n:c:g:m:d: o; do case $o in
  n) NODES=$OPTARG;; c) CPUS=$OPTARG;; g) GPUS=$OPTARG;; m) MODE=$OPTARG;; d) DIR=$OPTARG;; *) exit 2;;
esac; done
export PATH=$PATH:/usr/sbin:/sbin
unset SLURM_CONF || true
log() { echo "start-slurm: $*" >&2; }
here=$(cd "$(dirname "$0")" && pwd)

[ -n "$DIR" ] || DIR=$(mktemp -d /tmp/slurm-ci.XXXXXX)
mkdir -p "$DIR"; DIR=$(cd "$DIR" && pwd)
chmod 0755 "$DIR"                       # munged: clients must be able to reach the socket
mkdir -p "$DIR"/{munge,state,spool,log,dev}; chmod 0755 "$DIR/munge"
: > "$DIR/pids"
trap '"$here/stop-slurm.sh" "$DIR" >&2 || true; log "failed; logs in $DIR/log"' ERR

freeport() { python3 - "$1" <<'P'
import socket,sys
s=[socket.socket() for _ in range(int(sys.argv[1]))]
[x.bind(("0.0.0.0",0)) for x in s]; print(*[x.getsockname()[1] for x in s])
P
}
spawn() { # name cmd... : own session, pid recorded; keeps no inherited stdout (or $(...) would hang)
  local name=$1; shift
  setsid "$@" </dev/null >"$DIR/log/$name.out" 2>&1 &
  echo "$! $name" >> "$DIR/pids"
}
H=$(hostname -s); ME=$(id -un)
read -r -a PORTS <<<"$(freeport $((NODES + 1)))"

# ---- addresses ---------------------------------------------------------------
CTLADDR=127.0.0.1; TAG=fd$$
if [ "$MODE" = netns ]; then
  NET=10.213.$(( $$ % 250 + 1 )); CTLADDR=$NET.254; BR=br$TAG
  ip link add "$BR" type bridge; echo "link $BR" >> "$DIR/net"
  ip addr add "$CTLADDR/24" dev "$BR"; ip link set "$BR" up
fi
addr() { case $MODE in netns) echo "$NET.$((10 + $1))";; uts) echo "127.0.1.$((10 + $1))";; plain) echo 127.0.0.1;; esac; }
{ echo "127.0.0.1 localhost"; echo "$CTLADDR $H"
  for i in $(seq "$NODES"); do echo "$(addr "$i") node$i"; done; } > "$DIR/hosts"
chmod 644 "$DIR/hosts"

# ---- munge -------------------------------------------------------------------
mungekey -c -k "$DIR/munge/munge.key"     # 0600, owned by the uid munged runs as
spawn munged munged -F -S "$DIR/munge/munge.socket" --key-file="$DIR/munge/munge.key" \
  --log-file="$DIR/log/munged.log" --pid-file="$DIR/munge/munged.pid" \
  --seed-file="$DIR/munge/munged.seed" --num-threads=2
for _ in $(seq 100); do [ -S "$DIR/munge/munge.socket" ] && break; sleep 0.05; done
munge -n -S "$DIR/munge/munge.socket" | unmunge -S "$DIR/munge/munge.socket" >/dev/null

# ---- slurm.conf ----------------------------------------------------------------
MEM=$(( $(awk '/MemTotal/{print $2}' /proc/meminfo) / 1024 / (NODES + 1) ))
GRES=; [ "$GPUS" -gt 0 ] && GRES=" Gres=gpu:$GPUS"
{ cat <<E
ClusterName=fedddp
SlurmctldHost=$H($CTLADDR)
SlurmctldPort=${PORTS[0]}
# A job takes the port that its id names: clusters side by side have other ids.
FirstJobId=$((1 + $$ % 300 * 30))
SlurmUser=$ME
SlurmdUser=$ME
AuthType=auth/munge
# A requeued job starts again cred_expire + 1 s later, 120 s by default and for less than 5.
AuthInfo=socket=$DIR/munge/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.log
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1,sched_interval=1
MinJobAge=3600
KillWait=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
E
  [ "$GPUS" -gt 0 ] && echo "GresTypes=gpu"
  for i in $(seq "$NODES"); do
    case $MODE in plain) nh=$H;; *) nh=node$i;; esac
    echo "NodeName=node$i NodeHostname=$nh NodeAddr=$(addr "$i") Port=${PORTS[$i]} CPUs=$CPUS RealMemory=$MEM$GRES State=UNKNOWN"
  done
  cat <<E
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10
PartitionName=low   Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1  PreemptMode=REQUEUE GraceTime=20
E
} > "$DIR/slurm.conf"
if [ "$GPUS" -gt 0 ]; then                # fake GPUs: only Slurm's bookkeeping is real
  # File= must be a character device (1:3 is /dev/null); with it CUDA_VISIBLE_DEVICES is set.
  if seq -f "$DIR/dev/gpu%g" 0 $((GPUS - 1)) | xargs -I{} mknod {} c 1 3 2>/dev/null; then
    echo "NodeName=node[1-$NODES] Name=gpu Flags=nvidia_gpu_env File=$DIR/dev/gpu[0-$((GPUS - 1))]"
  else
    echo "NodeName=node[1-$NODES] Name=gpu Count=$GPUS"
  fi > "$DIR/gres.conf"
fi

# ---- daemons -------------------------------------------------------------------
export SLURM_CONF=$DIR/slurm.conf
spawn slurmctld slurmctld -D -f "$SLURM_CONF"
for i in $(seq "$NODES"); do
  n=node$i; mkdir -p "$DIR/spool/$n"
  case $MODE in
    plain) spawn "$n" slurmd -D -N "$n" -f "$SLURM_CONF";;
    uts)   spawn "$n" unshare --mount --uts --propagation private sh -c \
             'mount --bind "$1" /etc/hosts && hostname "$2" && exec slurmd -D -N "$2" -f "$3"' sh "$DIR/hosts" "$n" "$SLURM_CONF";;
    netns) ns=$TAG-$n
           ip netns add "$ns"; echo "netns $ns" >> "$DIR/net"
           ip link add "v$TAG$i" type veth peer name eth0 netns "$ns"
           ip link set "v$TAG$i" master "$BR" up
           ip -n "$ns" addr add "$(addr "$i")/24" dev eth0
           ip -n "$ns" link set eth0 up; ip -n "$ns" link set lo up
           spawn "$n" nsenter --net="/run/netns/$ns" unshare --mount --uts --propagation private sh -c \
             'mount --bind "$1" /etc/hosts && hostname "$2" && exec slurmd -D -N "$2" -f "$3"' sh "$DIR/hosts" "$n" "$SLURM_CONF";;
  esac
done

# ---- wait until every node is idle ------------------------------------------------
for _ in $(seq 150); do
  idle=$(sinfo -h -p debug -t idle -o %D 2>/dev/null || true)
  [ "${idle:-0}" = "$NODES" ] && break
  while read -r pid name; do kill -0 "$pid" 2>/dev/null || { log "$name died"; break 2; }; done < "$DIR/pids"
  sleep 0.1
done
if [ "${idle:-0}" != "$NODES" ]; then log "nodes not idle"; sinfo >&2 || true; tail -n 5 "$DIR"/log/*.out >&2 || true; false; fi
trap - ERR
cat > "$DIR/env.sh" <<E
export SLURM_CONF=$DIR/slurm.conf
export SLURM_CI_DIR=$DIR
E
[ "$MODE" != plain ] || echo "export FEDDDP_MASTER_ADDR=127.0.0.1" >> "$DIR/env.sh"
log "$NODES nodes idle ($MODE), state in $DIR"
cat "$DIR/env.sh"
