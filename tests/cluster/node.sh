#!/bin/bash
# The first process of a node, already in namespaces of its own: makes the node's view of the machine, then starts
# containerd, kubelet and kube-proxy, and collects whatever ends.
#
# node.sh NAME DIRECTORY PROGRAMS: the node's name, its state directory, the directory of the Kubernetes programs.
set -u
name=$1 state=$2 programs=$3

fail() {
  echo "node $name: $*" >&2
  exit 1
}

mount --make-rprivate / || fail "make mounts private"
hostname "$name" || fail "set the host name"
mount -t proc proc /proc || fail "mount /proc"
mount -t sysfs sysfs /sys || fail "mount /sys"
mount -t bpf bpf /sys/fs/bpf || fail "mount /sys/fs/bpf"

# Every cgroup hierarchy once more, as the cgroup namespace shows it: the node's own cgroup is its root.
mount -t tmpfs tmpfs /sys/fs/cgroup || fail "mount /sys/fs/cgroup"
while IFS=: read -r _ controllers _; do
  case $controllers in
    '') at=unified kind=cgroup2 options=rw ;;
    name=*) at=${controllers#name=} kind=cgroup options=none,$controllers ;;
    *) at=$controllers kind=cgroup options=$controllers ;;
  esac
  mkdir "/sys/fs/cgroup/$at"
  mount -t $kind -o "$options" $kind "/sys/fs/cgroup/$at" || fail "mount cgroup hierarchy $at"
done </proc/self/cgroup

# What the node writes goes to its state directory, not to the machine.
mount -t tmpfs tmpfs /run || fail "mount /run"
for top in etc opt var; do
  mkdir -p "$state/$top" "$state/work/$top"
  mount -t overlay -o "lowerdir=/$top,upperdir=$state/$top,workdir=$state/work/$top" overlay "/$top" ||
    fail "lay $state/$top over /$top"
done
# These hold overlays and mounts themselves, so they must be plain directories.
for plain in kubelet containerd; do
  mkdir -p "$state/$plain" "/var/lib/$plain"
  mount --bind "$state/$plain" "/var/lib/$plain" || fail "mount /var/lib/$plain"
done
# kubelet would set these for the whole machine: it finds them set.
for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1; do
  file=/run/sysctl-$(basename "${setting%=*}")
  echo "${setting#*=}" >"$file"
  mount --bind "$file" "/proc/sys/${setting%=*}" || fail "cover /proc/sys/${setting%=*}"
done
mount --make-rshared / || fail "share mounts"

mkdir -p /etc/cni/net.d /opt/cni/bin
[ -e /etc/cni/net.d/10-pods.conflist ] || cp "$state/pods.conflist" /etc/cni/net.d/10-pods.conflist
for plugin in /usr/lib/cni/*; do
  [ -e "/opt/cni/bin/${plugin##*/}" ] || ln -s "$plugin" /opt/cni/bin/
done

until [ -e /sys/class/net/eth0 ]; do sleep 0.02; done
ip link set lo up
ip -batch "$state/network" || fail "set addresses and routes of $state/network"
echo 1 >/proc/sys/net/ipv4/ip_forward
echo 1 >/proc/sys/net/ipv6/conf/all/forwarding

export PATH=$programs:$PATH
containerd -c "$state/containerd.toml" >>"$state/containerd.log" 2>&1 &
until ctr version >/dev/null 2>&1; do sleep 0.05; done
for image in "$state"/../images/*.tar; do
  ctr -n k8s.io images import "$image" >/dev/null || fail "import $image"
done
kubelet --config="$state/kubelet.yaml" --kubeconfig="$state/kubelet.conf" --hostname-override="$name" \
  --node-ip="$(cat "$state/addresses")" >>"$state/kubelet.log" 2>&1 &
kube-proxy --config="$state/kube-proxy.yaml" --hostname-override="$name" >>"$state/kube-proxy.log" 2>&1 &
# As the first process it is the parent of all whose own parent is gone.
while :; do
  sleep infinity &
  wait $!
done
