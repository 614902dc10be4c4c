"""A machine to install things on: systemd on an overlay of this one's files, in namespaces.

Nothing of it is this machine's: its files are in memory and gone at the end, it sees no process
but its own, no network but a loopback, no device but null and its kind, and lies in control
groups of its own. Everything that would change the kernel (sysctl, modules, clocks) is masked.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.helpers import eventually

BOOT_S = 60  # two seconds alone
COMMAND_S = 60

MASKED = (
    "systemd-sysctl.service systemd-modules-load.service systemd-remount-fs.service "
    "systemd-binfmt.service proc-sys-fs-binfmt_misc.automount proc-sys-fs-binfmt_misc.mount "
    "systemd-update-utmp.service systemd-tmpfiles-setup-dev.service systemd-random-seed.service "
    "systemd-udevd.service systemd-udev-trigger.service systemd-udevd-kernel.socket "
    "systemd-udevd-control.socket systemd-udev-settle.service systemd-hwdb-update.service "
    "dev-hugepages.mount dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount "
    "sys-kernel-config.mount sys-fs-fuse-connections.mount systemd-journal-flush.service "
    "systemd-machine-id-commit.service systemd-firstboot.service systemd-sysusers.service "
    "systemd-timesyncd.service systemd-logind.service ldconfig.service"
)

# Joins control groups of its own, then makes the namespaces; $1 the folder, $2 the group's name.
OUTSIDE = r"""
set -eu
for hierarchy in /sys/fs/cgroup/{,systemd,unified,devices}; do
    if [ -e "$hierarchy/cgroup.procs" ]; then
        mkdir -p "$hierarchy/$2"
        echo $$ >"$hierarchy/$2/cgroup.procs"
    fi
done
exec unshare --mount --pid --fork --kill-child --ipc --uts --net --cgroup --propagation slave \
    bash -c "$3" bash "$1"
"""

INSIDE = r"""
set -eu
memory=$1/memory
mount -t tmpfs tmpfs "$memory"
mkdir "$memory"/{upper,work,root}
root=$memory/root
mount -t overlay overlay -o "lowerdir=/,upperdir=$memory/upper,workdir=$memory/work" "$root"
mount --make-rshared "$root" # as systemd wants it where it isn't the container's affair
mkdir -p "$root/mnt/shared"
mount --bind "$1/shared" "$root/mnt/shared"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
if [ -e /sys/fs/cgroup/cgroup.procs ]; then
    mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
else
    mount -t tmpfs tmpfs "$root/sys/fs/cgroup"
    mkdir "$root"/sys/fs/cgroup/{systemd,unified,devices}
    mount -t cgroup -o none,name=systemd cgroup "$root/sys/fs/cgroup/systemd"
    mount -t cgroup -o devices cgroup "$root/sys/fs/cgroup/devices"
    mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup/unified"
fi
mount -t tmpfs tmpfs "$root/dev"
for device in null zero full random urandom tty; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root"/dev/{shm,pts}
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
for folder in run tmp var/tmp; do mount -t tmpfs -o mode=1777 tmpfs "$root/$folder"; done
mount -t tmpfs tmpfs "$root/var/log"
mkdir -p "$root/var/log/journal"
ip link set lo up
tr -d - </proc/sys/kernel/random/uuid >"$root/etc/machine-id"
: >"$root/etc/fstab"
rm -rf "$root"/etc/systemd/system/*.wants "$root"/usr/sbin/policy-rc.d
rm -f "$root/var/lib/man-db/auto-update" # seconds for an index that nobody reads
for unit in MASKED; do ln -sf /dev/null "$root/etc/systemd/system/$unit"; done
exec chroot "$root" /usr/bin/env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --system --unit=basic.target --show-status=no
""".replace("MASKED", MASKED)


class Machine:
    """One that runs. What is done in it is done as its root."""

    def __init__(self, folder: Path) -> None:
        self._group = f"mirrord-test-{os.getpid()}-{folder.name}"
        self.shared = folder / "shared"  # which it has as /mnt/shared
        for each in (self.shared, folder / "memory"):
            each.mkdir()
        self._process = subprocess.Popen(
            ["bash", "-c", OUTSIDE, "bash", str(folder), self._group, INSIDE],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._pid = 0

    def boot(self) -> None:
        """Wait until it runs."""
        self._pid = eventually(self._find, BOOT_S, "systemd starts")
        eventually(
            lambda: self.run("systemctl is-active basic.target", check=False).returncode == 0,
            BOOT_S, "the machine is up",
        )  # fmt: skip

    def _find(self) -> int | None:
        """Return systemd's process: the child of what made its namespaces."""
        if self._process.poll() is not None:
            assert self._process.stderr is not None
            raise AssertionError(self._process.stderr.read().decode())
        path = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        for pid in path.read_text().split():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text() == "systemd\n":
                    return int(pid)
        return None

    def run(
        self, command: str, *, check: bool = True, timeout_s: float = COMMAND_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell's command in it."""
        done = subprocess.run(
            ["nsenter", "--target", str(self._pid), "--all", "--root", "--wd", "bash", "-c",
             f"export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root\n{command}"],
            capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL,
            env={"LC_ALL": "C.UTF-8", "TERM": "dumb", "DEBIAN_FRONTEND": "noninteractive"},
        )  # fmt: skip
        if check and done.returncode:
            journal = self.run("journalctl --no-pager --lines=60", check=False).stdout
            raise AssertionError(
                f"{command}: {done.returncode}\n{done.stdout}{done.stderr}\n{journal}"
            )
        return done

    def ask(self, command: str) -> str:
        """Run a command that succeeds, and return what it prints."""
        return self.run(command).stdout.strip()

    def put(self, path: str, content: str) -> None:
        """Write a file."""
        self.run(f"mkdir -p {shlex.quote(os.path.dirname(path))}")
        self.run(f"cat >{shlex.quote(path)} <<'END'\n{content}\nEND")

    def open(self, path: str) -> str:
        """Return where a file of the machine's is to be found from outside."""
        return f"/proc/{self._pid}/root{path}"

    def shut_down(self) -> None:
        """Have it end in good order, and wait for that."""
        self.run("systemctl poweroff", check=False)
        self._process.wait(COMMAND_S)

    def close(self) -> None:
        """End it, whatever it does, and remove what it was."""
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()
        for hierarchy in ("", "systemd", "unified", "devices"):
            group = Path("/sys/fs/cgroup", hierarchy, self._group)
            eventually(lambda group=group: _removed(group), what=f"{group} is empty")


def _removed(group: Path) -> bool:
    for folder, _, _ in os.walk(group, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(folder)
    return not group.exists()


@contextlib.contextmanager
def machine() -> Iterator[Machine]:
    """Boot a machine, and end it."""
    with tempfile.TemporaryDirectory(prefix="mirrord-machine-") as folder:
        made = Machine(Path(folder))
        try:
            made.boot()
            yield made
        finally:
            made.close()
