"""Names of this machine's loopback addresses as hosts that are reached by ssh, through an sshd of one's own."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")

SERVER = """\
Port {port}
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
"""
# As a user's ~/.ssh/config, whose place cannot be moved.
CLIENT = """\
Port {port}
IdentityFile {folder}/key
UserKnownHostsFile {folder}/known_hosts
StrictHostKeyChecking no
LogLevel ERROR
"""


def missing():
    """What keeps such hosts from being here, or None."""
    return None if SSHD and shutil.which("ssh") else "no sshd: apt-get install openssh-server"


@contextlib.contextmanager
def ssh_hosts():
    """While sshd runs, the folder of an `ssh` that comes to this machine's 127.0.0.0/8 without a password."""
    with tempfile.TemporaryDirectory(prefix="ssh") as name:
        folder = Path(name)
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
        for file, text in (("sshd_config", SERVER), ("config", CLIENT)):
            (folder / file).write_text(text.format(port=port, folder=folder))
        program = folder / "ssh"
        program.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config "$@"\n')
        program.chmod(0o755)
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists
        with open(folder / "log", "w") as log:
            server = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
            try:
                while subprocess.run([program, "127.0.0.2", "true"], capture_output=True).returncode:
                    assert server.poll() is None, (folder / "log").read_text()
                    time.sleep(0.1)
                yield folder
            finally:
                server.terminate()
                server.wait()
