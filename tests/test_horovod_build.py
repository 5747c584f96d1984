"""Horovod's source is changed as it must be, and a cached wheel is used for exactly what it was built for."""

import dataclasses
import re
import sys

import pytest

from horovod_powersgd.environment import horovod_build
from horovod_powersgd.environment.horovod_build import HorovodBuild
from horovod_powersgd.environment.horovod_patches import patch_source
from horovod_powersgd.environment.logged_run import BuildError
from horovod_powersgd.launcher import launch_command
from job import run

BUILD = HorovodBuild(torch="2.13.0+cpu", tensorflow="2.21.0", mpi="Open MPI 4.1.8: c++ -IPREFIX/include")

SOURCE = {
    "CMakeLists.txt": (
        "project(horovod CXX)\n\nset(CMAKE_CXX_STANDARD 14)\n"
        'file(APPEND "metadata.json" "\\"dummy\\": \\"none\\"\\n}")\n'
    ),
    "cmake/Utilities.cmake": (
        'string(REGEX REPLACE "${PROJECT_SOURCE_DIR}(/)?" "" SUB_FOLDER "${CMAKE_CURRENT_SOURCE_DIR}")\n'
    ),
    "horovod/tensorflow/CMakeLists.txt": "list(A mpi_ops.cc)\nlist(A xla_mpi_ops.cc)\nadd_library(x)\n",
    "horovod/torch/CMakeLists.txt": (
        'execute(-c "from distutils.sysconfig import get_python_inc; print(get_python_inc())")\n'
        "    set(CMAKE_CXX_STANDARD 14)\n"
    ),
    "horovod/runner/js_run.py": "import os\nfrom distutils.spawn import find_executable\n",
    "horovod/common/util.py": "import os\n\nEXTENSIONS = ['tensorflow', 'torch', 'mxnet']\n",
    "horovod/common/tensor_queue.h": "#include <queue>\n  void FinalizeTensorQueue(const Status& status);\n",
    "horovod/common/tensor_queue.cc": "// Add a TensorTableEntry as well as its message to the queue.\n"
    + "\n".join(
        f"{signature}) {{\n  std::lock_guard<std::mutex> guard(mutex_);\n  REST\n  return Status::OK();\n}}\n"
        for signature in (
            "Status TensorQueue::AddToTensorQueue(TensorTableEntry& e, Request& message",
            "Status TensorQueue::AddToTensorQueueMulti(std::vector<TensorTableEntry>& entries,\n"
            "                                          std::vector<Request>& messages",
            "void TensorQueue::FinalizeTensorQueue(const Status& status",
            "void TensorQueue::PushMessageToQueue(Request& message",
        )
    ),
    "horovod/common/process_set.cc": "  initialization_done = true;\n" * 2,
    "horovod/common/controller.cc": (
        "    tensor_sizes.resize(requests.size());\n"
        "  std::vector<int32_t> devices(requests.size());\n  for (auto& request : requests) {\n"
        "    devices[request.request_rank()] = request.device();\n  }\n"
    ),
    "horovod/common/gloo/gloo_controller.cc": (
        "  global_ranks_.reserve(size_);\n  opts.setOutput(global_ranks_.data(), size_);\n"
    ),
    "horovod/common/operations.h": "namespace horovod {\nnamespace common {\n",
    "horovod/common/operations.cc": (
        "#include <cassert>\nbool RunLoopOnce(HorovodGlobalState& state);\n"
        "bool RunLoopOnce(HorovodGlobalState& state) {\n"
        "  if (sleep_duration > std::chrono::steady_clock::duration::zero()) {\n"
        "    std::this_thread::sleep_for(sleep_duration);\n  }\n"
        "  state.last_cycle_start = std::chrono::steady_clock::now();\n\n"
        "  if (state.mark_cycles_in_timeline) {\n  }\n    auto response_list = ComputeResponseList();\n\n"
        "    if (process_set_id == 0) {\n      state.mark_cycles_in_timeline = x;\n    }\n}\n"
        'extern "C" {\n'
    ),
    "horovod/tensorflow/mpi_ops.cc": (
        "// Forward declaration of AsGpuStreamValue\nnamespace stream_executor {\nnamespace gpu {\n"
        "GpuStreamHandle AsGpuStreamValue(Stream* stream);\n} // namespace stream_executor\n} // namespace gpu\n"
        "#if TENSORFLOW_VERSION >= 2011000000\n#include NEW\n#else\n#include OLD\n"
        "#endif // TENSORFLOW_VERSION >= 2011000000\n#endif // HAVE_GPU\n"
    ),
    "horovod/torch/mpi_ops_v2.cc": (
        "namespace horovod {\n"
        + "tensor.to(kCPU, /*non_blocking=*/true);\n" * 2
        + "void WaitAndClear(int handle) {\n  while (true) {\n    if (manager.PollHandle(handle)) break;\n    {\n"
        + "      py::gil_scoped_release release;\n      std::this_thread::yield();\n    }\n  }\n}\n"
        + '  m.def("horovod_torch_allreduce_async_torch_IntTensor", &DoAllreduce);\n'
        + '  m.def("horovod_torch_allgather_async_torch_cuda_IntTensor",\n        &DoAllgatherCudaOnCPU);\n'
        + '  m.def("horovod_torch_join", &DoJoin);\n  m.def("horovod_torch_poll", &PollHandle);\n'
    ),
    "horovod/torch/handle_manager.h": (
        "#include <atomic>\n  bool PollHandle(int handle);\n  std::mutex mutex_;\n"
    ),
    "horovod/torch/handle_manager.cc": (
        "void HandleManager::MarkDone() {\n  results_[handle] = std::make_shared<Status>(status);\n}\n\n"
        "bool HandleManager::PollHandle(int handle) {}\n\nvoid HandleManager::Reset() {\n  results_.clear();\n}\n"
    ),
    "third_party/flatbuffers/include/flatbuffers/stl_emulation.h": (
        "  constexpr span &operator=(const span &other)\n      FLATBUFFERS_NOEXCEPT {\n"
        "    data_ = other.data_;\n    count_ = other.count_;\n  }\n\n  span(int size) { count_ = size; }\n"
    ),
}


@pytest.fixture
def source(tmp_path):
    for name, text in SOURCE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_source_is_compiled_as_cpp17(source):
    patch_source(source)
    for name in ("CMakeLists.txt", "horovod/torch/CMakeLists.txt"):
        assert "CMAKE_CXX_STANDARD 17" in (source / name).read_text()
        assert "CMAKE_CXX_STANDARD 14" not in (source / name).read_text()


def test_what_includes_a_newer_pytorch_is_compiled_as_cpp20(source):
    patch_source(source)
    chosen = 'if(Pytorch_VERSION VERSION_GREATER_EQUAL "2.14")\n        set(CMAKE_CXX_STANDARD 20)\n    endif()\n'
    written = (source / "horovod/torch/CMakeLists.txt").read_text()
    assert written.endswith(f"    set(CMAKE_CXX_STANDARD 17)\n    {chosen}")


def test_only_the_xla_operations_are_left_out(source):
    patch_source(source)
    assert (source / "horovod/tensorflow/CMakeLists.txt").read_text() == "list(A mpi_ops.cc)\nadd_library(x)\n"


def test_tensorflows_stream_is_asked_once_its_header_is_there(source):
    patch_source(source)
    written = (source / "horovod/tensorflow/mpi_ops.cc").read_text()
    assert written.startswith("#if") and written.endswith("} // namespace stream_executor\n#endif // HAVE_GPU\n")
    assert written.index("#include OLD") < written.index("platform_specific_handle().stream")
    assert written.count("AsGpuStreamValue") == 1


def test_a_wheel_finds_mpi_in_the_environment_where_it_is_installed(source):
    patch_source(source)
    assert 'set(CMAKE_INSTALL_RPATH "$ORIGIN/../../../..;' in (source / "CMakeLists.txt").read_text()


def test_the_source_may_be_in_a_folder_with_any_name(source):
    patch_source(source)
    assert "REGEX" not in (source / "cmake/Utilities.cmake").read_text()


def test_nothing_needs_distutils(source):
    patch_source(source)
    assert not any("distutils" in (source / name).read_text() for name in SOURCE)


def test_a_queue_that_was_ended_refuses_tensors_until_horovod_starts_again(source):
    patch_source(source)
    functions = (source / "horovod/common/tensor_queue.cc").read_text().split("\n}\n")
    refusal = "guard(mutex_);\n  if (finalized_) {\n    return SHUT_DOWN_ERROR;\n  }\n  REST"
    assert [refusal in function for function in functions[:4]] == [True, True, False, False]
    assert [name for name in functions if "guard(mutex_);\n  finalized_ = true;\n  REST" in name] == [functions[2]]
    assert (source / "horovod/common/process_set.cc").read_text().count("Reopen();\n  initialization_done = true;") == 2
    assert "finalized_ = false;\n  }" in (source / "horovod/common/tensor_queue.h").read_text()


def test_a_wheel_tells_which_patches_it_has(source):
    patch_source(source)
    line = (source / "CMakeLists.txt").read_text().splitlines()[-1]
    assert line == rf'file(APPEND "metadata.json" "\"horovod-powersgd\": {horovod_build.PATCH_VERSION}\n}}")'


def test_newer_compilers_are_given_what_they_want(source):
    patch_source(source)
    assert ":SHELL:-include algorithm -include cstdint -include" in (source / "CMakeLists.txt").read_text()
    span = (source / "third_party/flatbuffers/include/flatbuffers/stl_emulation.h").read_text()
    assert span == "  constexpr span &operator=(const span &other) = delete;\n\n  span(int size) { count_ = size; }\n"


def test_without_events_a_copy_to_the_host_is_waited_for(source):
    patch_source(source)
    operations = (source / "horovod/torch/mpi_ops_v2.cc").read_text()
    assert operations.count("/*non_blocking=*/kHasEvents);") == 2
    assert operations.index("kHasEvents = false;\n#endif\n") < operations.index("namespace horovod {")


def test_the_workers_that_gloo_waits_for_are_known(source):
    patch_source(source)
    controller = (source / "horovod/common/gloo/gloo_controller.cc").read_text()
    assert controller.startswith("  global_ranks_.resize(size_);\n")


def test_what_is_noted_by_a_workers_rank_has_room_for_all_ranks(source):
    patch_source(source)
    sizes, *devices = (source / "horovod/common/controller.cc").read_text().splitlines()
    assert sizes.strip() == "tensor_sizes.resize(size_);"
    # As many as before, once they are noted: a response of fewer workers is not remembered.
    assert devices[0].endswith("devices(size_);") and devices[-1] == "  devices.resize(requests.size());"


def test_pytorch_sleeps_while_it_waits_for_an_answer(source):
    patch_source(source)
    operations = (source / "horovod/torch/mpi_ops_v2.cc").read_text()
    waiting = "      horovod::common::HurryCycle();\n      handle_manager.Wait(handle);\n  }\n}\n"
    polling = "{\n  if (!handle_manager.PollHandle(handle)) {\n      py::gil_scoped_release release;\n"
    assert polling + waiting in operations
    manager = (source / "horovod/torch/handle_manager.cc").read_text()
    assert "(status);\n  changed_.notify_all();\n}" in manager and "clear();\n  changed_.notify_all();\n}" in manager
    assert manager.count("void HandleManager::Wait(int handle) {\n") == 1
    assert "void Wait(int handle);\n" in (source / "horovod/torch/handle_manager.h").read_text()


def test_who_hands_over_a_tensor_does_not_keep_python_from_others(source):
    patch_source(source)
    calls = (source / "horovod/torch/mpi_ops_v2.cc").read_text().split("m.def(")[1:]
    assert [call.rstrip().endswith(", py::call_guard<py::gil_scoped_release>());") for call in calls] == [1, 1, 1, 0]


def test_horovodrun_does_not_begin_with_tensorflow(source):
    patch_source(source)
    assert "EXTENSIONS = ['torch', 'tensorflow', 'mxnet']\n" in (source / "horovod/common/util.py").read_text()


def test_who_begins_a_cycle_first_begins_the_next_one_later(source):
    patch_source(source)
    loop = (source / "horovod/common/operations.cc").read_text()
    assert loop.count("state.last_cycle_start += ") == 1
    assert "ComputeResponseList();\n\n    if (process_set_id == 0) {\n      state.last_cycle_start += " in loop


def test_who_waits_lets_a_cycle_begin_where_something_was_handed_over_for_it(source):
    patch_source(source)
    queue = (source / "horovod/common/tensor_queue.cc").read_text()
    handed_over = ["  handed_over_ = true;\n  return Status::OK();" in function for function in queue.split("\n}\n")]
    assert handed_over[:4] == [True, True, False, False]
    loop = (source / "horovod/common/operations.cc").read_text()
    assert "sleep_for" not in loop and "wait_for(lock, sleep_duration, [] { return is_hurried; });\n" in loop
    # What is handed over from here on, this cycle may miss.
    assert "is_hurried = false;\n  }\n  TensorQueue::handed_over_ = false;\n  state.last_cycle_start = " in loop
    assert "if (!TensorQueue::handed_over_) {\n    return;" in loop
    assert "void HurryCycle();\n" in (source / "horovod/common/operations.h").read_text()


# With cycles of half a second, eight rounds would take four.
WORKER = """
import time, torch, horovod.torch as hvd
hvd.init()
hvd.allreduce(torch.ones(1), name="first")
begin = time.monotonic()
for _ in range(8):
    hvd.allreduce(torch.ones(1), name="round")
print(f"8 rounds in {time.monotonic() - begin:.3f} seconds")
if hvd.rank() == 1:
    time.sleep(20)
    raise SystemExit("the job was not ended")
hvd.allreduce(torch.ones(1), name="lonely")
"""


@pytest.mark.job
def test_who_waits_does_not_wait_for_a_cycle_and_is_told_of_a_worker_that_does_not_come_under_gloo():
    command = launch_command("horovodrun --gloo", 2, [sys.executable, "-c", WORKER])
    times = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "1", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "3"}
    output = run(command, 120, {**times, "HOROVOD_CYCLE_TIME": "500"})
    rounds = re.findall(r"8 rounds in (\d\.\d+) seconds", output)
    assert len(rounds) == 2 and max(map(float, rounds)) < 2, output
    assert "waiting for remainder of ranks for more than 1 seconds" in output
    assert "1: [allreduce.lonely]" in output and "1!: [allreduce.lonely]" in output
    assert "HorovodInternalError" in output and "the job was not ended" not in output


@pytest.mark.parametrize("name", SOURCE)
def test_a_source_that_is_not_as_expected_is_refused(source, name):
    (source / name).write_text("something else\n")
    with pytest.raises(BuildError, match=f"not as expected: {name}"):
        patch_source(source)


@pytest.mark.parametrize(
    "change",
    [
        {"torch": "2.13.0+cu130"},
        {"torch": None},
        {"tensorflow": "2.20.0"},
        {"tensorflow": None},
        {"mpi": "Open MPI 5.0.8: c++ -IPREFIX/include"},
        {"mpi": None},
        {"settings": (("HOROVOD_GPU_OPERATIONS", "NCCL"),)},
        {"python": "cpython-312"},
        {"platform": "linux-aarch64"},
        {"patch": horovod_build.PATCH_VERSION + 1},
    ],
    ids=str,
)
def test_a_wheel_is_not_used_for_anything_else(change):
    assert dataclasses.replace(BUILD, **change).key != BUILD.key


@pytest.mark.framework
def test_only_variables_that_the_build_reads_ask_for_another_wheel(monkeypatch):
    key = HorovodBuild.for_environment().key
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "5")
    assert HorovodBuild.for_environment().key == key
    monkeypatch.setenv("HOROVOD_GPU_OPERATIONS", "NCCL")
    assert HorovodBuild.for_environment().key != key


def test_wheels_are_kept_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert BUILD.folder == tmp_path / "cache/horovod-powersgd" / BUILD.key
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert BUILD.folder == tmp_path / ".cache/horovod-powersgd" / BUILD.key


def test_an_unfinished_build_is_no_wheel(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    unfinished = BUILD.folder / "work-1/dist"
    unfinished.mkdir(parents=True)
    (unfinished / "horovod-0.28.1-cp311-cp311-linux_x86_64.whl").touch()
    assert BUILD.cached_wheel() is None
    finished = BUILD.folder / "horovod-0.28.1-cp311-cp311-linux_x86_64.whl"
    finished.touch()
    assert BUILD.cached_wheel() == finished


def test_cmake_looks_again_and_keeps_what_is_compiled(tmp_path):
    folder = tmp_path / "build/temp.linux-x86_64-cpython-311/RelWithDebInfo"
    found = [folder / "CMakeCache.txt", folder / "CMakeFiles/3.31.10/CMakeCUDACompiler.cmake"]
    compiled = folder / "CMakeFiles/horovod.dir/operations.cc.o"
    for path in (*found, compiled):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    horovod_build._forget_what_was_found(tmp_path)
    assert compiled.exists() and not any(path.exists() for path in found)


@pytest.mark.framework
def test_frameworks_and_mpi_can_be_left_out(monkeypatch):
    assert HorovodBuild.for_environment(torch_only=True).tensorflow is None
    assert HorovodBuild.for_environment(no_mpi=True).mpi is None
    monkeypatch.setenv("HOROVOD_WITHOUT_PYTORCH", "1")
    assert HorovodBuild.for_environment().torch is None
    monkeypatch.setenv("HOROVOD_WITHOUT_TENSORFLOW", "1")
    with pytest.raises(BuildError, match="Neither PyTorch nor TensorFlow"):
        HorovodBuild.for_environment()


def test_what_the_user_asks_for_must_be_there(monkeypatch):
    monkeypatch.setenv("HOROVOD_WITH_MPI", "1")
    with pytest.raises(BuildError, match="HOROVOD_WITH_MPI=1 is set, but none is found"):
        HorovodBuild.for_environment(no_mpi=True)
