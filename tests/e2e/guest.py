"""A small real guest: Linux in QEMU, on an ext4 file system that an NBD export holds.

The kernel is Debian's cloud kernel, installed or unpacked below `.cache/kernel` (see `.ci/
packages`); the user land is busybox; the initramfs is made here. Software emulation, so that it
runs on any machine.

The guest appends numbered records to `/records`, fsyncs each, and says `acked N` on its serial
console afterwards; between them it overwrites and deletes files, so that file system metadata
moves as well. A line on the console's input makes it unmount and power off.

Invariants that the tests rely on: N was said only after its fsync returned; an error of any
write is said as `failed N`; the kernel's own complaints appear on the same console.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from tests.helpers import eventually, require_program

RECORD_BYTES = 64
BOOT_S = 60  # 4 s alone on a core; the suite runs two workers on two
REPOSITORY = Path(__file__).resolve().parents[2]
ACKED = re.compile(r"acked (\d+)")
COMPLAINT = re.compile(r"failed|I/O error|EXT4-fs (error|warning)|aborted|timeout|hung", re.I)

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs devtmpfs /dev
mount -t proc proc /proc
mount -t sysfs sysfs /sys
stty -echo < /dev/ttyS0  # an echo of the input would mix with what is said
while read -r module; do insmod "/modules/$module"; done < /modules/order
until [ -b /dev/vda ]; do usleep 20000; done
if ! mount -t ext4 /dev/vda /mnt; then echo "mount failed"; reboot -f; fi
mkdir -p /mnt/churn
echo "mounted"
( read -r _ < /dev/ttyS0; : > /stop ) &
n=0
while [ ! -e /stop ]; do
  n=$((n + 1))
  if printf '%-63s\\n' "record $n" |
    dd of=/mnt/records oflag=append conv=notrunc,fsync bs=64 status=none
  then echo "acked $n"
  else echo "failed $n"
  fi
  case $((n % 8)) in
    2) dd if=/dev/urandom of=/mnt/churn/$((n % 48)) bs=64k count=4 status=none ;;
    5) dd if=/dev/urandom of=/mnt/churn/one bs=4k seek=$((n % 64)) count=1 conv=notrunc \\
         status=none ;;
    7) rm -f /mnt/churn/$(((n - 29) % 48)) ;;
  esac
done
umount /mnt && echo "unmounted"
reboot -f
"""


def find_kernel() -> tuple[Path, Path]:
    """Return the cloud kernel and its modules' folder, or skip."""
    for root in (REPOSITORY / ".cache" / "kernel", Path("/")):
        for kernel in sorted((root / "boot").glob("vmlinuz-*-cloud-amd64"), reverse=True):
            modules = root / "lib" / "modules" / kernel.name.removeprefix("vmlinuz-")
            if modules.is_dir():
                return kernel, modules
    pytest.skip("needs Debian's cloud kernel (.ci/packages unpacks it)")


def module_order(modules: Path, wanted: list[str]) -> list[Path]:
    """Return the module files that `wanted` needs, each after those that it depends on.

    A package that was only unpacked has no modules.dep, so the order is read from the modules
    themselves (`depends=` in their .modinfo). A name without a file is built into the kernel.
    """
    files = {path.stem.replace("-", "_"): path for path in modules.rglob("*.ko")}
    order: list[Path] = []

    def add(name: str) -> None:
        path = files.get(name)
        if path is None or path in order:
            return
        found = re.search(rb"\0depends=([\w,-]*)\0", path.read_bytes())
        for needed in (found.group(1).decode() if found else "").split(","):
            add(needed.replace("-", "_"))
        order.append(path)

    for name in wanted:
        add(name)
    return order


def make_initramfs(folder: Path) -> tuple[Path, Path]:
    """Pack the initramfs into `folder`; return kernel and initramfs."""
    kernel, modules = find_kernel()
    cpio, busybox = require_program("cpio"), require_program("busybox")
    root = folder / "initramfs"
    for name in ("bin", "dev", "proc", "sys", "mnt", "modules"):
        (root / name).mkdir(parents=True)
    shutil.copy(busybox, root / "bin" / "busybox")
    order = module_order(modules, ["virtio_pci", "virtio_blk", "ext4"])
    for path in order:
        shutil.copy(path, root / "modules" / path.name)
    (root / "modules" / "order").write_text("".join(f"{path.name}\n" for path in order))
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    packed = folder / "initramfs.cpio"
    with packed.open("wb") as out:
        subprocess.run(
            [cpio, "--create", "--format=newc", "--quiet"],
            input=names.encode(), stdout=out, cwd=root, check=True, timeout=60,
        )  # fmt: skip
    return kernel, packed


class Guest:
    """One running guest. `acked` is the last record it knows to be on its disk."""

    def __init__(
        self, kernel: Path, initramfs: Path, socket: str, export: str, reconnect_delay_s: int = 60
    ) -> None:
        qemu = require_program("qemu-system-x86_64")
        self.console: list[str] = []
        self.acked = 0
        self._process = subprocess.Popen(
            [
                qemu, "-machine", "pc", "-accel", "tcg", "-cpu", "qemu64", "-m", "192",
                "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
                "-serial", "stdio", "-kernel", str(kernel), "-initrd", str(initramfs),
                "-append", "console=ttyS0 quiet panic=-1 nokaslr tsc=reliable mitigations=off",
                "-blockdev",
                "driver=nbd,node-name=disk,discard=unmap,server.type=unix,"
                f"server.path={socket},export={export},reconnect-delay={reconnect_delay_s}",
                "-device", "virtio-blk-pci,drive=disk",
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read_console, daemon=True)
        self._reader.start()

    def _read_console(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            line = raw.decode(errors="replace").strip()
            self.console.append(line)
            if said := ACKED.match(line):
                self.acked = int(said[1])

    def wait_mounted(self) -> None:
        """Wait until the guest has its file system and writes."""
        eventually(
            lambda: "mounted" in self.console or self._process.poll() is not None,
            BOOT_S, "guest mounts its disk",
        )  # fmt: skip
        assert "mounted" in self.console, "\n".join(self.console)

    def wait_acked(self, more: int, deadline_s: float = 30) -> None:
        """Wait until `more` further records are on the guest's disk."""
        wanted = self.acked + more
        eventually(lambda: self.acked >= wanted, deadline_s, f"guest acks record {wanted}")

    def power_off(self) -> None:
        """Let the guest unmount and end; wait for both."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"stop\n")
        self._process.stdin.flush()
        self._process.wait(timeout=BOOT_S)
        self._close()
        assert "unmounted" in self.console, "\n".join(self.console[-20:])

    def kill(self) -> None:
        """Cut the guest's power. Idempotent."""
        self._process.kill()
        self._process.wait(timeout=10)
        self._close()

    def _close(self) -> None:
        self._reader.join(timeout=10)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # of a guest that died with input unread
                    pipe.close()

    def complaints(self) -> list[str]:
        """Return what guest or QEMU said about errors: none, if the disk never failed them."""
        return [line for line in self.console if COMPLAINT.search(line)]


def make_file_system(disk: Path, size_bytes: int) -> None:
    """Make `disk` a sparse file with an empty ext4 file system.

    The inode tables are written now (no lazy initialisation), so that the guest's load is its own.
    """
    mkfs = require_program("mkfs.ext4")
    with disk.open("wb") as file:
        file.truncate(size_bytes)
    options = ["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"]
    subprocess.run([mkfs, *options, str(disk)], check=True, timeout=60)


def check_file_system(disk: Path) -> None:
    """Assert that the unmounted file system is clean."""
    done = subprocess.run(
        [require_program("e2fsck"), "-fn", str(disk)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def replay_journal(disk: Path) -> None:
    """Do what the next mount would after a power cut."""
    done = subprocess.run(
        [require_program("e2fsck"), "-fp", str(disk)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr


def read_records(disk: Path) -> list[int]:
    """Return the numbers of the records in the file system, in order."""
    done = subprocess.run(
        [require_program("debugfs"), "-R", "cat /records", str(disk)],
        capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    data = done.stdout
    records = [data[at : at + RECORD_BYTES] for at in range(0, len(data), RECORD_BYTES)]
    return [int(record.removeprefix(b"record ").strip()) for record in records]
