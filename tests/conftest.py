"""Which tier each test belongs to, which checks a launch has to run, and where the time went.

    core        needs only numpy, pytest and hypothesis
    framework   needs PyTorch or TensorFlow, and what pip or Horovod built; in this process, or in one that it starts
    job         launches workers
"""

import importlib.util

import hypothesis
import pytest

import job

# How long an example takes depends on who else uses the machine.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

# A file's tests; where some need more than the others, a mark at the function says so.
TIERS = {
    "core": """
        accordion agreement calibration choosing clipping command_line compressors cost cuda_toolkit expression factors
        horovod_build hosts installation launcher memory neighbours plan powersgd powersgd_exchange quantization
        reference renewal rounding setup
    """,
    "framework": """
        arrays kernels models orthogonalization packaging tensorflow tensorflow_arrays torch torch_device
        torch_quantization torch_streams
    """,
    "job": "examples integrations mpi mpich slurm tensorflow_elastic torch_elastic torch_resume",
}
FILES = {f"test_{name}": tier for tier, names in TIERS.items() for name in names.split()}


def pytest_configure(config):
    some = config.option.file_or_dir or config.option.markexpr == "core"
    if not some and importlib.util.find_spec("tensorflow") is None:
        raise pytest.UsageError("TensorFlow is not installed: the tests need Python 3.10 to 3.13. Try make test-core.")


def pytest_ignore_collect(collection_path, config):
    # What the core tier does not need may be missing where it is run.
    if config.option.markexpr == "core" and FILES.get(collection_path.stem, "core") != "core":
        return True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if not any(item.get_closest_marker(tier) for tier in TIERS):
            if item.path.stem not in FILES:
                raise pytest.UsageError(f"{item.path.name} has no tier: say in {__file__} which it is")
            item.add_marker("job" if "launch" in item.fixturenames else FILES[item.path.stem])
    # Launches and elastic jobs run beside the other tests; only then are they waited for.
    items.sort(key=lambda item: "launch" in item.fixturenames or "elastic_job" in item.fixturenames)


def pytest_collection_finish(session):
    for item in session.items:
        if "launch" in item.fixturenames:
            job.selected.setdefault(item.callspec.params["launch"], set()).add(item.callspec.params["check"])
    if not session.config.option.collectonly:
        # MPI's workers wait by asking again and again: they come when there is less to wait for. Those of many checks
        # take longest: none of them is to be the last, with nothing left to run beside it.
        for launch in sorted(job.selected, key=lambda it: (it.launcher == "mpirun", -len(job.selected[it]))):
            job.begin(launch)
        for item in session.items:
            if "elastic_job" in item.fixturenames:
                job.begin_elastic(item.callspec.params["elastic_job"])


def pytest_sessionfinish():
    job.stop()


def pytest_terminal_summary(terminalreporter, config):
    """With --durations, where the launches' time went: by launch, and by check."""
    count = config.option.durations
    if count is None:
        return
    launches, checks = [], []
    for launch, outcome in job.finished():
        done = [(check, reports.values()) for check, reports in outcome.reports.items() if reports]
        checks += [(*took(reports), f"{launch}  {check}") for check, reports in done]
        starting = took(outcome.starts)[1]
        cpu_seconds = starting + sum(took(reports)[1] for _, reports in done)
        what = f"{launch}  {' '.join(launch.modules + launch.partly)}, {starting:.1f} until Horovod had started"
        launches.append((outcome.seconds, cpu_seconds, what))
    for title, lines in (("launches", launches), ("checks", checks)):
        terminalreporter.section(f"slowest {title}: seconds, CPU seconds of all workers")
        for seconds, cpu_seconds, what in sorted(lines, reverse=True)[: count or None]:
            terminalreporter.write_line(f"{seconds:8.1f} {cpu_seconds:8.1f}  {what}")


def took(reports):
    """The seconds that the last worker took, and the CPU seconds of all."""
    return max((report.seconds for report in reports), default=0), sum(report.cpu_seconds for report in reports)
