#!/bin/bash
# Trains on two "hosts": two network namespaces of this machine with addresses of their own, which meet over a bridge.
#
#     sudo benchmarks/two_hosts.sh gspo.py --max-steps 3 --eval-size 16
#
# It needs the right to make network namespaces, and the command ip. PYTHON is the interpreter, .venv/bin/python if not set.
# Each host runs torchrun with one process. The output of both stands in the folder that is printed first.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=$(mktemp -d)
echo "$out"
clean() {
    for host in one two; do ip netns delete "host-$host" 2>/dev/null || true; done
    ip link delete hosts 2>/dev/null || true
}
clean
trap clean EXIT
ip link add hosts type bridge
ip link set hosts up
number=1
for host in one two; do
    ip netns add "host-$host"
    ip link add "to-$host" type veth peer name eth0 netns "host-$host"
    ip link set "to-$host" master hosts up
    ip -n "host-$host" link set lo up
    ip -n "host-$host" addr add "10.77.0.$number/24" dev eth0
    ip -n "host-$host" link set eth0 up
    number=$((number + 1))
done
node=0
for host in one two; do
    ip netns exec "host-$host" env GLOO_SOCKET_IFNAME=eth0 OMP_NUM_THREADS=1 "$python" -m torch.distributed.run --nnodes 2 \
        --nproc-per-node 1 --node-rank $node --master-addr 10.77.0.1 --master-port 29511 "$@" > "$out/$host" 2>&1 &
    pids[node]=$!
    node=$((node + 1))
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
cat "$out/one"
exit $code
