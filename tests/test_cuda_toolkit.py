"""What a Horovod for GPUs is built with, on machines of several kinds."""

import os

import pytest

from horovod_powersgd.environment import cuda_toolkit
from horovod_powersgd.environment.frameworks import TORCH
from horovod_powersgd.environment.logged_run import BuildError


@pytest.fixture
def site_packages(tmp_path, monkeypatch):
    """Has a PyTorch for CUDA 13.0 with its NCCL; there is no toolkit."""
    packages = tmp_path / "site-packages"
    (packages / "nvidia/nccl/lib").mkdir(parents=True)
    (packages / "nvidia/nccl/lib/libnccl.so.2").touch()
    (packages / "torch").mkdir()
    (packages / "torch/version.py").write_text("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n")
    monkeypatch.setattr(type(TORCH), "directory", lambda self: packages / "torch")
    monkeypatch.setattr(cuda_toolkit, "SYSTEM_COMPILER", tmp_path / "nvcc")
    monkeypatch.setattr(cuda_toolkit.shutil, "which", lambda name: None)
    return packages


def compiler(environment, folder):
    """The variables, and what was asked of pip."""
    asked = []

    def get(requirement, to):
        asked.append(requirement)
        (to / "nvidia/cu13/lib").mkdir(parents=True)

    return cuda_toolkit.compiler_environment(environment, folder, get), asked


def test_a_build_is_for_gpus_where_the_variables_say_so():
    assert cuda_toolkit.wants_gpu({"HOROVOD_GPU_OPERATIONS": "NCCL"})
    assert cuda_toolkit.wants_gpu({"HOROVOD_GPU_ALLREDUCE": "MPI"})
    assert not cuda_toolkit.wants_gpu({"HOROVOD_GPU_OPERATIONS": "", "HOROVOD_WITH_PYTORCH": "1"})


def test_the_cuda_of_pytorch_is_read_from_its_files(site_packages):
    assert cuda_toolkit.cuda_version() == "13.0"
    (site_packages / "torch/version.py").write_text("cuda: Optional[str] = None\n")
    assert cuda_toolkit.cuda_version() is None


def test_without_a_toolkit_pip_has_the_compiler(site_packages, tmp_path):
    found, asked = compiler({"PATH": "/bin"}, tmp_path / "cuda")
    home = tmp_path / "cuda/nvidia/cu13"
    assert asked == ["cuda-toolkit[nvcc,crt,nvvm,cccl,cudart]==13.0.*"]
    assert found == {"HOROVOD_CUDA_HOME": str(home), "CUDA_HOME": str(home), "PATH": f"{home}/bin:/bin"}
    assert (home / "lib64").resolve() == home / "lib"
    assert compiler({"PATH": "/bin"}, tmp_path / "cuda") == (found, [])  # an interrupted build goes on with it


def test_a_toolkit_that_is_there_is_used(site_packages, tmp_path):
    assert compiler({"HOROVOD_CUDA_HOME": "/opt/cuda"}, tmp_path / "cuda") == ({}, [])
    (tmp_path / "nvcc").touch()
    assert compiler({}, tmp_path / "cuda") == ({}, [])


def test_the_toolkit_of_a_script_in_path_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_toolkit, "cuda_version", lambda: "13.0")
    toolkit, beside = tmp_path / "cuda-13.0", tmp_path / "bin"
    of_toolkit = toolkit / "bin/nvcc"
    scripts = {of_toolkit: f"echo '#$ TOP={toolkit}/bin/..' >&2", beside / "nvcc": f'exec {of_toolkit} "$@"'}
    for script, does in scripts.items():
        script.parent.mkdir(parents=True)
        script.write_text(f"#!/bin/sh\n{does}\n")
        script.chmod(0o755)
    path = {"PATH": f"{beside}:{os.environ['PATH']}"}
    expected = {"HOROVOD_CUDA_HOME": str(toolkit), "CUDA_HOME": str(toolkit), "PATH": f"{toolkit}/bin:{path['PATH']}"}
    assert cuda_toolkit.toolkit_environment(path) == expected
    assert cuda_toolkit.toolkit_environment(expected) == {}
    assert cuda_toolkit.toolkit_environment({"PATH": expected["PATH"]}) == {}
    monkeypatch.setattr(cuda_toolkit, "cuda_version", lambda: None)
    assert cuda_toolkit.toolkit_environment(path) == {}
    path["HOROVOD_GPU_OPERATIONS"] = "NCCL"
    assert cuda_toolkit.toolkit_environment(path) == expected
    (beside / "nvcc").write_text("#!/bin/sh\nexit 1\n")  # which says nothing
    assert cuda_toolkit.toolkit_environment(path) == {}
    assert cuda_toolkit.toolkit_environment({"PATH": str(tmp_path)}) == {}


def test_where_pip_has_no_compiler_the_toolkit_is_named(site_packages, tmp_path):
    (site_packages / "torch/version.py").write_text("cuda: Optional[str] = '12.8'\n")
    with pytest.raises(BuildError, match="install the CUDA toolkit 12.8.*HOROVOD_CUDA_HOME"):
        compiler({}, tmp_path / "cuda")


def test_nccl_is_the_one_that_came_with_pytorch(site_packages, tmp_path):
    asks = {"HOROVOD_GPU_OPERATIONS": "NCCL"}
    for _ in range(2):
        found = cuda_toolkit.nccl_environment(asks, tmp_path / "nccl")
    assert found["HOROVOD_NCCL_INCLUDE"] == str(site_packages / "nvidia/nccl/include")
    assert (tmp_path / "nccl/libnccl.so").resolve() == site_packages / "nvidia/nccl/lib/libnccl.so.2"
    assert found["HOROVOD_NCCL_LIB"] == str(tmp_path / "nccl")
    assert cuda_toolkit.nccl_environment({**asks, "HOROVOD_NCCL_HOME": "/opt/nccl"}, tmp_path) == {}
    assert cuda_toolkit.nccl_environment({"HOROVOD_GPU_OPERATIONS": "MPI"}, tmp_path) == {}
