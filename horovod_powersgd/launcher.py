"""Launchers: which one started this process, and how to start a job under each of them.

Horovod's own init() has traps on the stack that this package installs. A plain `python train.py` aborts inside
Open MPI when that was installed by pip, and a job that mpirun or srun started can come up as many jobs of one worker,
each of which trains alone; or MPI aborts, where it and the launcher do not know each other. The first is prevented
here, the others are turned into errors.
"""

import functools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from horovod_powersgd.environment.packages import find_program
from horovod_powersgd.environment.problem import INSTALL_COMMAND
from horovod_powersgd.mpi import LoadedMpi, loaded_mpi

LAUNCHERS = ("horovodrun --gloo", "horovodrun --mpi", "mpirun")

# The variables by which a user can keep Horovod from using MPI.
GLOO_CHOICES = ("HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS")

# Where each launcher says how many workers it started. mpirun comes before srun, which may have started mpirun's own
# daemons; a Slurm batch script, which is one process of a larger allocation, has no SLURM_STEP_NUM_TASKS.
_WORLD_SIZES = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun", "SLURM_STEP_NUM_TASKS": "srun"}
# What a process has that MPI or Horovod can ask for its place in the job.
_PLACES = ("OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE", "PMIX_RANK", "HOROVOD_RANK", "HOROVOD_SIZE")


def prepare_worker() -> None:
    """Call before Horovod's init(): let MPI leave the processor to the training and find its files, make one worker
    without a launcher work, and refuse what would abort.

    Raises:
        RuntimeError: mpirun started several workers and HOROVOD_CONTROLLER or HOROVOD_CPU_OPERATIONS says gloo; or
            mpirun is another MPI's than Horovod's, or srun's --mpi is not for it. Horovod would come up as separate
            jobs, or be killed by MPI or by a segmentation fault without a Python error.
    """
    # Horovod's thread waits in MPI most of the time. By default MPI waits by asking again and again, and takes half a
    # core from the training; so it asks only when nobody else wants the core.
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    if not any(name in os.environ for name in _PLACES):
        # Open MPI starts a daemon for a process without a launcher, from the folder in which it was compiled: with a
        # pip-installed one that folder does not exist. A worker that is alone needs no daemon.
        os.environ.setdefault("OMPI_MCA_ess_singleton_isolated", "1")
    mpi = loaded_mpi()
    if mpi is not None and mpi.here:
        # mpirun tells its workers where Open MPI's files are, srun does not.
        os.environ.setdefault("OPAL_PREFIX", sys.prefix)
        # Slurm names munge first, which pip's Open MPI lacks: it takes the next, after screens of complaints.
        security = os.environ.get("PMIX_SECURITY_MODE", "").split(",")
        if "native" in security:
            os.environ["PMIX_SECURITY_MODE"] = "native"
    launcher, workers = _started_by(os.environ)
    if launcher is not None:
        if workers > 1:
            _refuse_gloo(launcher, workers)
        if mpi is not None:
            _refuse_strangers(mpi, launcher, workers)


def check_world(size: int) -> None:
    """Call after Horovod's init() for the whole job, with its size(): notice workers that would train alone.

    Raises:
        RuntimeError: the launcher started several workers, and each of them came up as a job of one.
    """
    launcher, workers = _started_by(os.environ)
    if size > 1 or launcher is None or workers == 1:
        return
    _refuse_gloo(launcher, workers)
    if launcher == "mpirun":
        cause = "Probably Horovod was built without MPI, or for another MPI than this mpirun's"
        remedy = f"python -m horovod_powersgd doctor says which; {INSTALL_COMMAND} --force builds for this MPI"
    else:
        cause = "Probably srun and Horovod's MPI do not know each other"
        remedy = "try srun --mpi=pmix (Open MPI) or --mpi=pmi2 (MPICH, Intel MPI), or start mpirun in the allocation"
    raise RuntimeError(
        f"{launcher} started {workers} workers, but each of them came up as a job of size 1: they would train "
        f"separately. {cause}. What to do: {remedy}; or start the job with horovodrun --gloo -np {workers} python ..."
    )


def careful_init(horovod) -> Callable[..., None]:
    """Horovod's init(), between prepare_worker and check_world.

    Args:
        horovod: mpi_ops of one of Horovod's modules. In the modules themselves this function can take init's place.
    """

    @functools.wraps(horovod.init)
    def init(*args, **kwargs):
        prepare_worker()
        horovod.init(*args, **kwargs)
        if not (args or kwargs.get("comm")):  # a communicator of one worker is no mistake
            check_world(horovod.size())

    return init


def launch_command(launcher: str, workers: int, program: list[str]) -> list[str] | None:
    """The command line of a job on this machine, or None where the launcher is not installed.

    Args:
        launcher: one of LAUNCHERS.
        workers: how many processes to start.
        program: the command line of one worker.
    """
    name, *options = launcher.split()
    path = find_program(name)
    return None if path is None else [str(path), *options, "-np", str(workers), *program]


def launch_environment() -> dict[str, str]:
    """The environment in which launch_command's jobs run: this process's, and what lets them start on any machine."""
    environment = dict(os.environ)
    folders = [str(Path(sys.executable).parent)]
    mpirun = find_program("mpirun")  # horovodrun --mpi looks for it in PATH
    if mpirun is not None and str(mpirun.parent) not in folders:
        folders.append(str(mpirun.parent))
    environment["PATH"] = os.pathsep.join([*folders, environment.get("PATH", os.defpath)])
    # More workers than cores is fine for a test or a demonstration.
    environment.setdefault("OMPI_MCA_rmaps_base_oversubscribe", "1")
    environment.setdefault("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")  # Open MPI 5
    if os.geteuid() == 0:
        environment.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
        environment.setdefault("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    return environment


def _refuse_gloo(launcher: str, workers: int) -> None:
    for name in GLOO_CHOICES:
        if os.environ.get(name, "").lower() == "gloo":
            raise RuntimeError(
                f"{launcher} started {workers} workers, but {name}={os.environ[name]} keeps Horovod from using MPI: "
                f"they would be {workers} jobs of size 1, or crash. Unset {name}, or start the job with: "
                f"horovodrun --gloo -np {workers} python ..."
            )


def _refuse_strangers(mpi: LoadedMpi, launcher: str, workers: int) -> None:
    """MPI aborts, without a word on what to do, where the launcher does not answer it."""
    offered = "PMIx" if "PMIX_RANK" in os.environ else "PMI" if "PMI_RANK" in os.environ else None
    # One worker needs no answer, but for pip's Open MPI in a step of Slurm.
    answered = offered == mpi.interface or (workers == 1 and not (launcher == "srun" and mpi.here))
    if mpi.interface is None or answered:
        return
    what = f"{launcher} started {workers} worker{'s' * (workers > 1)}"
    if launcher == "mpirun":
        other = "Open MPI" if offered == "PMIx" else "MPICH or Intel MPI"
        raise RuntimeError(
            f"{what}, but it is {other}'s, and Horovod was built for {mpi.title}: they would not find each other. What "
            f"to do: start them with the mpirun of {mpi.title}, or build Horovod for this one ({INSTALL_COMMAND} "
            f"--force, with its mpicxx in PATH; python -m horovod_powersgd doctor shows which are found); or start the "
            f"job with horovodrun --gloo -np {workers} python ..."
        )
    plugin = {"PMIx": "pmix", "PMI": "pmi2"}[mpi.interface]
    raise RuntimeError(
        f"{what} {f'with {offered}' if offered else 'without PMI'}, but {mpi.title}, for which Horovod was built, "
        f"knows only {mpi.interface}, and would abort or stay alone. What to do: srun --mpi={plugin} python ... "
        f"(srun --mpi=list shows what this Slurm has); or salloc --ntasks={workers} mpirun python ...; or "
        f"horovodrun --gloo in the allocation"
    )


def _started_by(environment: Mapping[str, str]) -> tuple[str | None, int]:
    """The launcher that MPI would ask, and how many workers it started; (None, 1) where Horovod knows by itself."""
    if "HOROVOD_SIZE" in environment or "HOROVOD_ELASTIC" in environment:
        return None, 1
    for name, launcher in _WORLD_SIZES.items():
        if environment.get(name, "").isdigit():
            # srun --mpi=pmi2 says so by the same name as the mpirun of MPICH and Intel MPI, which sets one more.
            if name == "PMI_SIZE" and "SLURM_STEP_NUM_TASKS" in environment and "MPI_LOCALNRANKS" not in environment:
                launcher = "srun"
            return launcher, int(environment[name])
    return None, 1
