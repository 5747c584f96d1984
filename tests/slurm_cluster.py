"""A Slurm cluster of two nodes on this machine, from Debian's packages; it needs root.

It lives in a temporary folder, on ports that are free, beside any other Slurm, and is gone when it is left.
"""

import contextlib
import glob
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

NODES = ("127.0.0.1", "127.0.0.2")  # names that every machine knows as hosts
PACKAGES = "slurm-wlm munge libpmix-dev"
PROGRAMS = ("munged", "slurmctld", "slurmd")

# %n is a node's name: TmpFS keeps apart what the nodes' PMIx servers write.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n/slurmd.pid
SlurmdLogFile={folder}/%n/slurmd.log
TmpFS={folder}/%n/tmp
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=sched_interval=1
SelectType=select/cons_tres
ReturnToService=2
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=all Nodes=ALL Default=YES
"""


def missing():
    """What keeps a cluster from being here, or None."""
    absent = [program for program in PROGRAMS if find(program) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install {PACKAGES}"
    if not glob.glob("/usr/lib/*/pmix*/lib/libpmix.so"):
        return f"no libpmix.so, which Slurm loads by this name: apt-get install {PACKAGES}"
    return None if os.geteuid() == 0 else "Slurm's daemons need root"


def find(program):
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")


@contextlib.contextmanager
def cluster():
    """Brings it up, gives the variables with which Slurm's commands find it, and takes it down.

    Raises:
        RuntimeError: it does not come up, or down; with what its daemons say.
    """
    with tempfile.TemporaryDirectory(prefix="slurm") as name, contextlib.ExitStack() as daemons:
        folder = Path(name)
        folder.chmod(0o755)  # munged's clients are to reach its socket
        for node in NODES:
            (folder / node / "tmp").mkdir(parents=True)
        host = socket.gethostname().partition(".")[0]
        settings = CONFIGURATION.format(folder=folder, host=host, nodes=NODES, ports=free_ports(3))
        (folder / "slurm.conf").write_text(settings)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        variables = {"SLURM_CONF": str(folder / "slurm.conf")}
        environment = {**os.environ, **variables}

        def start(program, *arguments):
            with open(folder / "daemons.log", "a") as log:
                daemon = subprocess.Popen([find(program), *arguments], env=environment, stdout=log, stderr=log)
            daemons.callback(end, daemon)

        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        start("munged", "--foreground", *(f"--{option}={folder / file}" for option, file in files.items()))
        wait_for(lambda: (folder / "munge.socket").exists(), folder)
        start("slurmctld", "-D")
        for node in NODES:
            start("slurmd", "-D", "-N", node)
        states = ["sinfo", "--noheader", "--Node", "--format=%T"]
        wait_for(lambda: output_of(states, environment).split() == ["idle"] * len(NODES), folder)

        def end_jobs():  # which outlive slurmd
            subprocess.run(["scancel", f"--nodelist={','.join(NODES)}"], env=environment)
            wait_for(lambda: output_of(["squeue", "--noheader"], environment) == "", folder)

        daemons.callback(end_jobs)
        yield variables


def free_ports(count):
    """Ports of this machine that nobody listens on."""
    with contextlib.ExitStack() as sockets:
        opened = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for each in opened:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in opened]


def output_of(command, environment):
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


def wait_for(condition, folder, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            logs = "\n".join(log.read_text() for log in folder.rglob("*.log"))
            raise RuntimeError(f"Slurm does not come up, or down, in {seconds} seconds\n{logs}")
        time.sleep(0.1)


def end(daemon):
    daemon.terminate()
    try:
        daemon.wait(10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
