#!/bin/bash
# Trains on two "hosts": two network namespaces of this machine with addresses of their own, which meet over a bridge.
#
#     sudo benchmarks/two_hosts.sh gspo.py --max-steps 3 --eval-size 16
#
# It needs the command ip and the right to make network namespaces; without these it ends with code 77. PYTHON is the
# interpreter, .venv/bin/python if it is not set. Each host runs torchrun with one process. No name leads to these
# addresses, so torchrun is told which one is the first host's. What both print stands in the folder that is named first.
set -u
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-.venv/bin/python}
out=$(mktemp -d)
echo "$out"

clean() {
    ip netns delete host-1
    ip netns delete host-2
    ip link delete hosts
} 2>/dev/null

set_up() {
    ip link add hosts type bridge && ip link set hosts up || return
    for number in 1 2; do
        ip netns add "host-$number" &&
            ip link add "to-$number" type veth peer name eth0 netns "host-$number" &&
            ip link set "to-$number" master hosts up &&
            ip -n "host-$number" link set lo up &&
            ip -n "host-$number" addr add "10.77.0.$number/24" dev eth0 &&
            ip -n "host-$number" link set eth0 up || return
    done
}

clean
trap clean EXIT
set_up || exit 77
for number in 1 2; do
    ip netns exec "host-$number" env GLOO_SOCKET_IFNAME=eth0 OMP_NUM_THREADS=1 "$python" -m torch.distributed.run \
        --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint 10.77.0.1:29511 --local-addr "10.77.0.$number" \
        --rdzv-conf is_host=$((2 - number)) "$@" \
        > "$out/host-$number" 2>&1 &
    pids[number]=$!
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
cat "$out/host-1"
exit $code
