"""A libvirtd of its own, as a user's session has one: nothing of the system's libvirt is touched.

It runs as nobody, since one that root starts is the system's. Its domains are QEMU's, by software
emulation; they end with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import libvirt

from tests.helpers import eventually, require_program, require_root

READY_S = 30  # it asks each QEMU what it can, 3 s alone on a core
USER, GROUP = "nobody", "nogroup"


class Libvirtd:
    """A session daemon in a folder that everybody may look into."""

    def __init__(self) -> None:
        require_root()
        self.root = Path(tempfile.mkdtemp(prefix="libvirt-"))
        self.root.chmod(0o755)
        socket = self.root / "run" / "libvirt" / "libvirt-sock"
        self.uri = f"qemu+unix:///session?socket={socket}"
        for name in ("run", "cache", "config/libvirt"):
            (self.root / name).mkdir(parents=True)
        # without virtlogd, which would outlive it
        (self.root / "config" / "libvirt" / "qemu.conf").write_text('stdio_handler = "file"\n')
        subprocess.run(["chown", "-R", f"{USER}:{GROUP}", self.root], check=True, timeout=10)
        self._log = (self.root / "libvirtd.log").open("wb")
        self._process = subprocess.Popen(
            [
                require_program("setpriv"), f"--reuid={USER}", f"--regid={GROUP}",
                "--clear-groups", require_program("libvirtd"),
            ],
            env={
                "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin",
                "HOME": str(self.root),
                "XDG_RUNTIME_DIR": str(self.root / "run"),
                "XDG_CONFIG_HOME": str(self.root / "config"),
                "XDG_CACHE_HOME": str(self.root / "cache"),
            },
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
        )  # fmt: skip
        self.connection: Any = None
        try:
            self.connection = eventually(self._connect, READY_S, "libvirtd listens")
        except BaseException:
            self.close()
            raise

    def _connect(self) -> Any:
        try:
            return libvirt.open(self.uri)
        except libvirt.libvirtError:
            return None

    def close(self) -> None:
        """End its domains and itself, and remove the folder."""
        if self.connection is not None:
            active = libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE
            for domain in self.connection.listAllDomains(active):
                domain.destroy()
            self.connection.close()
        self._process.terminate()
        self._process.wait(timeout=30)
        self._log.close()
        shutil.rmtree(self.root)
