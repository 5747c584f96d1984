"""A cluster on one machine: hosts are network namespaces on a bridge, and their links are as slow as you say.

    python benchmarks/cluster.py up --hosts 4 --rate 1gbit
    python benchmarks/cluster.py run --hosts 2 -- python train.py
    python benchmarks/cluster.py run --launcher horovodrun -- python train.py
    python benchmarks/cluster.py up --rate 100mbit         # changes the links of the cluster that is there
    python benchmarks/cluster.py down

It needs root and iproute2's ip and tc. Where it is not up, `run` starts as many workers on the loopback interface.
"""

import argparse
import contextlib
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from horovod_powersgd.launcher import launch_command, launch_environment

LAUNCHERS = {"mpirun": "mpirun", "horovodrun": "horovodrun --gloo"}


@dataclass(frozen=True)
class Rate:
    """What a link lets through: bits per second, and at once after a pause."""

    bits: float
    burst: str = ""


# The bursts are about a millisecond's worth, or they would carry a whole compressed gradient for nothing; but fast
# links need room for two of the kernel's 64 KiB packets.
RATES = {
    "100mbit": Rate(1e8, "32kb"),
    "1gbit": Rate(1e9, "128kb"),
    "10gbit": Rate(1e10, "128kb"),
    "unshaped": Rate(math.inf),
}
LATENCY = "20ms"  # the longest that a packet waits at a link before it is dropped

NETWORK, BRIDGE = "10.55.0", "powersgd"
INTERFACE = "eth0"  # of every host
SSH = Path(__file__).parent / "ssh"


def host(number):
    """The name of a host, counted from 1, which is its address and its namespace's name as well."""
    return f"{NETWORK}.{number}"


def hosts():
    """How many hosts are up."""
    return len(_namespaces())


def missing():
    """What keeps this machine from having a cluster; None if nothing does."""
    if os.geteuid() != 0:
        return "it needs root"
    for program in ("ip", "tc", "unshare"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    # What up() does, in namespaces that nobody else sees, and that are gone at its end.
    attempt = (
        "ip link add name bridge type bridge && ip link add name link master bridge type veth && "
        f"tc qdisc add dev link root {_discipline('1gbit')}"
    )
    alone = ["unshare", "--net", "--mount", "--uts", "sh", "-c", attempt]
    probe = subprocess.run(alone, capture_output=True, text=True)
    return None if probe.returncode == 0 else probe.stderr.strip()


def tell_missing():
    """missing(), which is also printed, with what follows from it."""
    obstacle = missing()
    if obstacle is not None:
        print(f"All workers share the loopback interface, since there can be no cluster: {obstacle}\n")
    return obstacle


def up(count, rate):
    """Brings up at least `count` hosts, whose links all have this rate; those that are there are kept."""
    try:
        if not _exists(BRIDGE):
            _call(f"ip link add {BRIDGE} type bridge")
            _call(f"ip link set {BRIDGE} up")
        for number in range(1, count + 1):
            if host(number) not in _namespaces():
                _add(number)
        for number in range(1, hosts() + 1):
            _shape(rate, INTERFACE, ["ip", "netns", "exec", host(number)])
            _shape(rate, f"{BRIDGE}{number}")
    except BaseException:
        down()  # a part of a cluster would be taken for one
        raise


def down():
    """Ends what runs on the hosts, and removes them."""
    kill()
    for number in range(1, hosts() + 1):
        # A namespace stays until its processes are really gone; its link must not.
        if _exists(f"{BRIDGE}{number}"):
            _call(f"ip link delete {BRIDGE}{number}")
        _call(f"ip netns delete {host(number)}")
    if _exists(BRIDGE):
        _call(f"ip link delete {BRIDGE}")


def kill():
    """Ends all processes on the hosts."""
    for _ in range(50):  # it takes a while, and some may just be starting others
        processes = [int(process) for name in _namespaces() for process in _call(f"ip netns pids {name}").split()]
        if not processes:
            break
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)


def run(program, workers, launcher="mpirun", timeout=None, per_host=1, **options):
    """Runs a program with workers on each of the first hosts; on the loopback interface where no hosts are up.

    Args:
        program: the command line of a worker.
        workers: how many; on at most as many hosts as there are, if there are any.
        per_host: how many share a host.
        launcher: one of LAUNCHERS.
        timeout: seconds after which everything on the hosts is killed.
        options: of subprocess.Popen.

    Returns:
        The launcher's (exit status, output); the output is None unless the options ask for it.

    Raises:
        subprocess.TimeoutExpired: the time is over.
    """
    command = launch_command(LAUNCHERS[launcher], workers, program)
    if command is None:
        raise FileNotFoundError(f"{launcher} is not installed")
    there = hosts()
    if there:
        if workers > there * per_host:
            raise ValueError(f"{workers} workers need {-(-workers // per_host)} hosts, and {there} are up")
        # The launcher runs on the first host, as a user's would.
        arguments = shlex.join([command[0], *_launcher_options(launcher, workers // per_host, per_host), *command[1:]])
        command = [str(SSH), host(1), arguments]
    environment = launch_environment() | {
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        # For torch.distributed, which has no launcher of its own here.
        "GLOO_SOCKET_IFNAME": INTERFACE if there else "lo",
        "MASTER_ADDR": host(1) if there else "127.0.0.1",
        "MASTER_PORT": "29555",
    }
    environment["PATH"] = os.pathsep.join([str(SSH.parent), environment["PATH"]])
    # Whoever ends this process by kill or timeout wants the workers to end, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    job = subprocess.Popen(command, env=environment, start_new_session=True, **options)
    try:
        output, _ = job.communicate(timeout=timeout)
        return job.returncode, output
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
        if there:
            kill()


def _launcher_options(launcher, count, per_host):
    places = ",".join(f"{host(number)}:{per_host}" for number in range(1, count + 1))
    if launcher == "horovodrun":
        return ["--disable-cache", "--network-interface", INTERFACE, "-H", places]
    # Each host believes that it has the machine's cores for itself: bound to cores, all workers would share the first.
    options = ["--bind-to", "none", "-H", places]
    for name, value in {
        "plm_rsh_agent": SSH,
        "btl": "tcp,self",
        "btl_tcp_if_include": INTERFACE,
        "oob_tcp_if_include": INTERFACE,
    }.items():
        options += ["--mca", name, str(value)]
    return options


def _add(number):
    name, link = host(number), f"{BRIDGE}{number}"
    _call(f"ip netns add {name}")
    _call(f"ip link add {link} master {BRIDGE} type veth peer name {INTERFACE} netns {name}")
    _call(f"ip link set {link} up")
    _call(f"ip -n {name} address add {name}/24 dev {INTERFACE}")
    _call(f"ip -n {name} link set {INTERFACE} up")
    _call(f"ip -n {name} link set lo up")


def _shape(rate, interface, where=()):
    """Limits what leaves an interface: at the host's end what it sends, at the bridge's end what it receives."""
    _call(f"tc qdisc replace dev {interface} root {_discipline(rate)}", where)


def _discipline(rate):
    return "noqueue" if rate == "unshaped" else f"tbf rate {rate} burst {RATES[rate].burst} latency {LATENCY}"


def _exists(interface):
    return Path("/sys/class/net", interface).exists()


def _namespaces():
    folder = Path("/run/netns")
    return sorted(path.name for path in folder.glob(f"{NETWORK}.*")) if folder.exists() else []


def _call(command, prefix=()):
    return subprocess.run([*prefix, *command.split()], check=True, stdout=subprocess.PIPE, text=True).stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    starting = commands.add_parser("up", help="bring hosts up, or change their links")
    starting.add_argument("--hosts", type=int, default=2)
    starting.add_argument("--rate", choices=RATES, default="1gbit", help="of each link, in each direction")
    commands.add_parser("down", help="end what runs on the hosts, and remove them")
    running = commands.add_parser("run", help="run a program with a worker on each host")
    running.add_argument("--hosts", type=int, help="how many of them; all by default")
    running.add_argument("--launcher", choices=LAUNCHERS, default="mpirun")
    running.add_argument("program", nargs="+")
    args = parser.parse_args()

    if args.command == "run":
        status, _ = run(args.program, args.hosts or hosts() or 2, args.launcher)
        sys.exit(status)
    if args.command == "down":
        down()
    else:
        obstacle = missing()
        if obstacle is not None:
            sys.exit(f"There can be no cluster on this machine: {obstacle}")
        up(args.hosts, args.rate)


if __name__ == "__main__":
    main()
