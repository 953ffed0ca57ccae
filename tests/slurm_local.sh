#!/usr/bin/env bash
# A one-machine Slurm, controller and node, to test --slurm with: Debian, as root. tests/slurm_local.sh [stop]
set -euo pipefail

stop() {
    for daemon in slurmd slurmctld; do
        [ ! -e "/run/$daemon.pid" ] || pkill --pidfile "/run/$daemon.pid" "$daemon" || true
    done
}
if [ "${1:-}" = stop ]; then
    stop
    exit
fi

command -v slurmctld >/dev/null || {
    apt-get update
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends slurm-wlm munge
}
mkdir -p /run/munge /var/spool/slurmctld /var/spool/slurmd /etc/slurm
chown munge: /run/munge
[ -e /etc/munge/munge.key ] || mungekey --create
munge --no-input >/dev/null 2>&1 || runuser -u munge munged

cat >/etc/slurm/slurm.conf <<END
ClusterName=local
SlurmctldHost=$(hostname -s)
SlurmUser=root
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/var/log/slurmctld.log
SlurmdLogFile=/var/log/slurmd.log
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
# No cgroups, which a container may not have.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
NodeName=$(hostname -s) CPUs=$(nproc) State=UNKNOWN
PartitionName=local Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END

stop
sleep 1
slurmctld
slurmd
for _ in {1..30}; do
    if sinfo --noheader --format %t 2>/dev/null | grep -qE "idle|mix|alloc"; then
        sinfo
        exit
    fi
    sleep 1
done
echo "Slurm did not start; see /var/log/slurmctld.log and /var/log/slurmd.log" >&2
exit 1
