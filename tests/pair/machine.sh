#!/bin/sh
# What a machine of tests/pair/machines.py does before it is systemd: `machine.sh DIRECTORY NAME`, as the first process of new
# namespaces. It makes a root of its own: that of this machine, what is written kept in DIRECTORY/written; with devices, /run,
# /tmp and cgroups that are nobody else's. DIRECTORY/disk is its disk for data, at /data.
set -eu
directory=$1 name=$2
root=$directory/root
mkdir -p "$directory/written" "$directory/work" "$directory/disk" "$root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$directory/written,workdir=$directory/work" "$root"

mount -t proc proc "$root/proc"
# What holds for the whole kernel is not to be changed from here.
for path in /proc/sys /proc/sysrq-trigger; do
    [ -e "$root$path" ] || continue
    mount --bind "$root$path" "$root$path"
    mount -o remount,bind,ro "$root$path"
done
# A machine that was booted again has another boot id.
cat /proc/sys/kernel/random/uuid >"$directory/boot-id"
mount --bind "$directory/boot-id" "$root/proc/sys/kernel/random/boot_id"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=0755 tmpfs "$root/dev"
for device in null zero full random urandom tty fuse; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
mount -t tmpfs -o mode=0755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"

if [ ! -e "$directory/made" ]; then
    # The first time: nothing of what this machine starts or mounts, and nothing of its mirrorfs.
    rm -rf "$root"/etc/systemd/system/*.wants "$root"/etc/systemd/system/*.requires "$root"/etc/systemd/system/*.d
    rm -rf "$root/etc/mirrorfs" "$root/var/lib/mirrorfs" "$root/var/log/journal"
    : >"$root/etc/fstab"
    echo "$name" >"$root/etc/hostname"
    tr -d - </proc/sys/kernel/random/uuid >"$root/etc/machine-id"
    mkdir -p "$root/data" "$root/var/log/journal"
    # No second login manager and bus, no module is loaded, no file system of the whole kernel is shown.
    for unit in dbus.service dbus.socket systemd-logind.service getty.target modprobe@.service sys-kernel-debug.mount \
        sys-kernel-tracing.mount sys-kernel-config.mount dev-hugepages.mount systemd-udevd.service timers.target \
        systemd-random-seed.service systemd-sysctl.service systemd-modules-load.service systemd-udev-trigger.service; do
        ln -sf /dev/null "$root/etc/systemd/system/$unit"
    done
    touch "$directory/made"
fi
mount --bind "$directory/disk" "$root/data"
hostname "$name"

cd "$root"
mkdir -p before
pivot_root . before
umount -l /before
# Without what could change the clock, the modules or the devices of this machine.
exec env -i container=tests PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
    setpriv --bounding-set=-sys_module,-sys_time,-sys_rawio,-syslog,-mac_admin \
    /lib/systemd/systemd --unit=multi-user.target --show-status=no
