"""What a Horovod for NVIDIA's GPUs is built with: CUDA's compiler, and NCCL."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from horovod_powersgd.environment.frameworks import TENSORFLOW, TORCH
from horovod_powersgd.environment.logged_run import BuildError

# What Horovod's build looks at, to know whether it is for GPUs.
_CHOICES = re.compile(r"HOROVOD_GPU(_(OPERATIONS|ALLREDUCE|ALLGATHER|BROADCAST|ALLTOALL|REDUCESCATTER))?")
# Where CMake looks for a compiler that is not in PATH.
SYSTEM_COMPILER = Path("/usr/local/cuda/bin/nvcc")
# From this version of CUDA on, pip has its compiler.
_FIRST_OF_PIP = 13


def wants_gpu(environment: Mapping[str, str]) -> bool:
    """Whether Horovod's variables ask for operations on GPUs."""
    return any(_CHOICES.fullmatch(name) and value for name, value in environment.items())


def cuda_version() -> str | None:
    """The CUDA that the installed PyTorch is for, as in 13.0; None where there is no PyTorch, or it is for none."""
    directory = TORCH.directory()
    stated = None if directory is None else directory / "version.py"
    if stated is None or not stated.is_file():
        return None
    match = re.search(r"^cuda\b.*=\s*['\"](\d+\.\d+).*['\"]$", stated.read_text(), re.MULTILINE)
    return match and match.group(1)


def has_gpu() -> bool:
    """Whether this machine has a driver for NVIDIA's GPUs."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


def toolkit_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables by which Horovod's build finds the toolkit of an nvcc in PATH that is a link or a script outside of
    it: CMake looks beside that. None where it finds the toolkit by itself, there is no nvcc, the user says which, or
    neither PyTorch nor the build is for CUDA.

    Args:
        environment: of the build.
    """
    compiler = shutil.which("nvcc", path=environment.get("PATH"))
    if compiler is None or _says_which(environment) or not (wants_gpu(environment) or cuda_version()):
        return {}
    told = subprocess.run([compiler, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    match = re.search(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
    home = None if match is None else Path(match[1]).resolve()
    if home is None or not (home / "bin/nvcc").exists() or Path(compiler).parent.resolve() == home / "bin":
        return {}
    return _variables(home, environment)


def _says_which(environment: Mapping[str, str]) -> bool:
    return any(environment.get(name) for name in ("HOROVOD_CUDA_HOME", "CUDA_HOME", "CUDA_PATH"))


def _variables(home: Path, environment: Mapping[str, str]) -> dict[str, str]:
    path = os.pathsep.join([str(home / "bin"), environment.get("PATH", os.defpath)])
    return {"HOROVOD_CUDA_HOME": str(home), "CUDA_HOME": str(home), "PATH": path}


def compiler_environment(
    environment: Mapping[str, str], folder: Path, get: Callable[[str, Path], None]
) -> dict[str, str]:
    """The variables by which Horovod's build finds CUDA's compiler; none where it finds the system's by itself.

    Args:
        environment: of the build.
        folder: for a compiler of pip's.
        get: (requirement, folder) installs what pip has.

    Raises:
        BuildError: there is none, and pip has none for this version.
    """
    if _says_which(environment) or shutil.which("nvcc") or SYSTEM_COMPILER.exists():
        return {}
    version = cuda_version()
    major = 0 if version is None else int(version.split(".")[0])
    if major < _FIRST_OF_PIP:
        raise BuildError(
            f"Horovod is to be built for GPUs, and there is no CUDA compiler (nvcc): install the CUDA toolkit"
            f"{'' if version is None else f' {version}'}, and say where with HOROVOD_CUDA_HOME."
        )
    home = folder / f"nvidia/cu{major}"
    if not home.exists():
        get(f"cuda-toolkit[nvcc,crt,nvvm,cccl,cudart]=={version}.*", folder)
    # nvcc looks for libraries where an installed toolkit has them, and CMake for names without a version.
    for link, target in ((home / "lib64", "lib"), (home / "lib/libcudart.so", f"libcudart.so.{major}")):
        if not link.is_symlink():
            link.symlink_to(target)
    return _variables(home, environment)


def nccl_environment(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The variables by which Horovod's build finds the NCCL that came with PyTorch or TensorFlow, since a process
    should have one only; none where NCCL is not asked for, or the user says which.

    Args:
        environment: of the build.
        folder: for a link that the linker needs.
    """
    directories = filter(None, (framework.directory() for framework in (TORCH, TENSORFLOW)))
    nccl = next(filter(Path.is_dir, (directory.parent / "nvidia/nccl" for directory in directories)), None)
    asked = any(value.startswith("NCCL") for name, value in environment.items() if _CHOICES.fullmatch(name))
    said = any(name.startswith("HOROVOD_NCCL") for name in environment)
    if not asked or said or nccl is None:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "libnccl.so"
    link.unlink(missing_ok=True)
    link.symlink_to(nccl / "lib/libnccl.so.2")
    return {
        "HOROVOD_NCCL_INCLUDE": str(nccl / "include"),
        "HOROVOD_NCCL_LIB": str(folder),
        "HOROVOD_NCCL_LINK": "SHARED",
    }
