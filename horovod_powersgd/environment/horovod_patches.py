"""What of Horovod's released source must be changed, and whether the installed Horovod has all of it."""

import re
from pathlib import Path

from horovod_powersgd.environment.installed_horovod import PATCHES_KEY, horovod_patches, horovod_version
from horovod_powersgd.environment.logged_run import BuildError

# Part of the key of cached wheels: raise it whenever what patch_source makes changes, of what can be built already.
PATCH_VERSION = 7


def missing_patches() -> str | None:
    """What is wrong with the installed Horovod where it does not have all of patch_source's changes; else None."""
    if horovod_version() is None or (horovod_patches() or 0) >= PATCH_VERSION:
        return None
    return (
        "Horovod was built without the latest of what install-horovod mends: messages wait longer than they have to, "
        "and, unless an earlier install-horovod built it, with Gloo nobody is told of a worker that does not come, and "
        "an elastic job can wait for ever"
    )


def patch_source(source: Path) -> None:
    """Change Horovod's unpacked source so that it builds beside current frameworks and with current compilers, runs
    wherever it is installed, loses nothing that it is given while it shuts down, tells of workers that do not come,
    is not damaged by one that joins, and does not keep who waits waiting.

    Raises:
        BuildError: the source is not the one that these changes are for.
    """

    def replace(path: Path, pattern: str, replacement: str) -> None:
        text, count = re.subn(pattern, replacement, path.read_text(), flags=re.MULTILINE)
        if count == 0:
            raise BuildError(f"Horovod's source is not as expected: {path.relative_to(source)} lacks {pattern!r}")
        path.write_text(text)

    # Current frameworks' headers are C++17.
    for cmake_lists in (source / "CMakeLists.txt", source / "horovod/torch/CMakeLists.txt"):
        replace(cmake_lists, r"CMAKE_CXX_STANDARD 14\b", "CMAKE_CXX_STANDARD 17")
    # PyTorch's are C++20 from 2.14 on.
    replace(
        source / "horovod/torch/CMakeLists.txt",
        r"^    set\(CMAKE_CXX_STANDARD 17\)$",
        '\\g<0>\n    if(Pytorch_VERSION VERSION_GREATER_EQUAL "2.14")\n        set(CMAKE_CXX_STANDARD 20)\n    endif()',
    )
    # TensorFlow's wheel lacks a header that the optional XLA operations need.
    replace(source / "horovod/tensorflow/CMakeLists.txt", r"^.*xla_mpi_ops\.cc.*\n", "")
    # Python 3.12 has no distutils.
    replace(
        source / "horovod/torch/CMakeLists.txt",
        r"from distutils\.sysconfig import get_python_inc; print\(get_python_inc\(\)\)",
        "import sysconfig; print(sysconfig.get_path('include'))",
    )
    replace(
        source / "horovod/runner/js_run.py",
        r"^from distutils\.spawn import find_executable$",
        "from shutil import which as find_executable",
    )
    # horovodrun imports the first of these that is there, to ask what Horovod was built with: TensorFlow takes seconds.
    replace(
        source / "horovod/common/util.py",
        r"^EXTENSIONS = \['tensorflow', 'torch', 'mxnet'\]$",
        "EXTENSIONS = ['torch', 'tensorflow', 'mxnet']",
    )
    # So that an installed Horovod tells which of these changes it has.
    replace(source / "CMakeLists.txt", r'\\"dummy\\": \\"none\\"', rf'\\"{PATCHES_KEY}\\": {PATCH_VERSION}')
    # Clang 19 and later refuse to assign to constants in a template that nobody uses.
    replace(
        source / "third_party/flatbuffers/include/flatbuffers/stl_emulation.h",
        r"(span &operator=\(const span &other\))\s+FLATBUFFERS_NOEXCEPT \{[^}]*\}",
        r"\1 = delete;",
    )
    # A regular expression made of a folder's name fails where that has a plus sign.
    replace(
        source / "cmake/Utilities.cmake",
        r'string\(REGEX REPLACE "\$\{PROJECT_SOURCE_DIR\}\(/\)\?" "" SUB_FOLDER "\$\{CMAKE_CURRENT_SOURCE_DIR\}"\)',
        'file(RELATIVE_PATH SUB_FOLDER "${PROJECT_SOURCE_DIR}" "${CMAKE_CURRENT_SOURCE_DIR}")',
    )
    # Each GCC from 13 on has a standard library whose headers bring fewer of the others along.
    headers = " ".join(f"-include {header}" for header in ("algorithm", "cstdint", "stdexcept", "string"))
    includes = f'add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:SHELL:{headers}>")\n'
    # A wheel goes from the environment that built it to others: look for MPI (a pip-installed one is in lib) and the
    # frameworks relative to where the module is, in lib/pythonX.Y/site-packages/horovod/torch. Only then come the
    # places that were linked against, for an MPI or NCCL of the system.
    replace(
        source / "CMakeLists.txt",
        r"^project\(horovod CXX\)$",
        f"project(horovod CXX)\n{includes}"
        "set(CMAKE_BUILD_WITH_INSTALL_RPATH TRUE)\n"
        'set(CMAKE_INSTALL_RPATH "$ORIGIN/../../../..;$ORIGIN/../../torch/lib;$ORIGIN/../../tensorflow;'
        '$ORIGIN/../../nvidia/nccl/lib")\n'
        "set(CMAKE_INSTALL_RPATH_USE_LINK_PATH TRUE)",
    )
    # TensorFlow no longer has the function that gives a stream of the GPU; the stream itself tells.
    replace(
        source / "horovod/tensorflow/mpi_ops.cc",
        r"^// Forward declaration of AsGpuStreamValue\n(?:.*\n){5}(#if TENSORFLOW_VERSION(?:.*\n)+?#endif.*\n)",
        r"\1namespace stream_executor {\nnamespace gpu {\n"
        r"static inline GpuStreamHandle AsGpuStreamValue(Stream* stream) {\n"
        r"  return static_cast<GpuStreamHandle>(stream->platform_specific_handle().stream);\n}\n"
        r"} // namespace gpu\n} // namespace stream_executor\n",
    )
    # Tensors of a GPU are copied to the host for operations that Horovod was not built for, and the copy is waited for
    # by an event. A Horovod without CUDA has no events, and sent what was not there yet.
    replace(
        source / "horovod/torch/mpi_ops_v2.cc",
        r"^namespace horovod \{$",
        "#if HAVE_GPU\nstatic constexpr bool kHasEvents = true;\n#else\nstatic constexpr bool kHasEvents = false;\n"
        "#endif\n\n\\g<0>",
    )
    replace(source / "horovod/torch/mpi_ops_v2.cc", r"/\*non_blocking=\*/true", "/*non_blocking=*/kHasEvents")
    # After a worker's death the background thread ends every tensor in its queue with an error and stops. Whether it
    # has stopped is looked at before the queue is locked, and so a tensor could be added behind its back, and be waited
    # for till the end of days: the queue itself must refuse it.
    queue = source / "horovod/common/tensor_queue.cc"
    lock = r"\) {\n  std::lock_guard<std::mutex> guard\(mutex_\);\n"
    for last_argument in ("TensorTableEntry& e, Request& message", "std::vector<Request>& messages"):
        replace(queue, last_argument + lock, r"\g<0>  if (finalized_) {\n    return SHUT_DOWN_ERROR;\n  }\n")
    replace(queue, r"FinalizeTensorQueue\(const Status& status" + lock, r"\g<0>  finalized_ = true;\n")
    replace(
        source / "horovod/common/tensor_queue.h",
        r"^  void FinalizeTensorQueue\(.*\);$",
        r"\g<0>\n\n  void Reopen() {\n    std::lock_guard<std::mutex> guard(mutex_);\n    finalized_ = false;\n  }\n\n"
        r"  bool finalized_ = false;",
    )
    replace(
        source / "horovod/common/process_set.cc",
        r"^  initialization_done = true;$",
        r"  tensor_queue.Reopen();\n\g<0>",
    )
    # Gloo's controller writes the workers' ranks into a vector that stays empty, so that none of them ever counts as
    # missing: who waited for one was never warned, nor the job ended after HOROVOD_STALL_SHUTDOWN_TIME_SECONDS.
    replace(
        source / "horovod/common/gloo/gloo_controller.cc",
        r"global_ranks_\.reserve\(size_\);",
        "global_ranks_.resize(size_);",
    )
    # Where a worker has joined, the coordinator notes the others' sizes and devices by their ranks, in vectors that are
    # as long as there are others: with an even number of workers it writes over the heap beyond.
    controller = source / "horovod/common/controller.cc"
    replace(controller, r"tensor_sizes\.resize\(requests\.size\(\)\);", "tensor_sizes.resize(size_);")
    replace(
        controller,
        r"(std::vector<int32_t> devices\()requests\.size\(\)(\);\n  for .*\n.*\n  \}\n)",
        r"\1size_\2  devices.resize(requests.size());\n",
    )
    # PyTorch's thread waits for an answer in a loop that yields, and so keeps a core busy, which Horovod's own thread,
    # or another worker, may need.
    waiting = source / "horovod/torch/mpi_ops_v2.cc"
    replace(
        waiting,
        r"^  while \(true\) \{\n.*PollHandle\(handle\)\) break;\n    \{\n(.*)\n.*yield.*\n    \}\n  \}$",
        r"  if (!handle_manager.PollHandle(handle)) {\n\1\n"
        r"      horovod::common::HurryCycle();\n      handle_manager.Wait(handle);\n  }",
    )
    # Horovod's own thread holds locks while it ends what a lost worker leaves undone, and may need Python's lock to let
    # go of tensors. Who hands over a tensor meanwhile waits for those locks, and must not hold Python's.
    replace(
        waiting,
        r'(m\.def\("horovod_torch_(?:\w+_async_\w+|join|barrier)",\s*&\w+)\);',
        r"\1, py::call_guard<py::gil_scoped_release>());",
    )
    manager = source / "horovod/torch/handle_manager"
    replace(manager.with_suffix(".h"), r"^#include <atomic>$", r"\g<0>\n#include <condition_variable>")
    replace(manager.with_suffix(".h"), r"^  bool PollHandle\(.*$", r"\g<0>\n  void Wait(int handle);")
    replace(manager.with_suffix(".h"), r"^  std::mutex mutex_;$", r"\g<0>\n  std::condition_variable changed_;")
    for change in (r"std::make_shared<Status>\(status\);", r"results_\.clear\(\);"):
        replace(manager.with_suffix(".cc"), change, r"\g<0>\n  changed_.notify_all();")
    replace(
        manager.with_suffix(".cc"),
        r"^bool HandleManager::PollHandle",
        "void HandleManager::Wait(int handle) {\n  std::unique_lock<std::mutex> lock(mutex_);\n"
        "  changed_.wait(lock, [&] {\n    auto result = results_.find(handle);\n"
        "    return result == results_.end() || result->second != nullptr;\n  });\n}\n\n\\g<0>",
    )
    # Workers meet once in a cycle, which each counts from where it began the last one. Who begins first waits for the
    # others, in every cycle by as much, which with MPI is another loop. Each takes a part of the time until all have
    # met as its delay: that of the first is the longest, and so they come to begin at the same time.
    loop = source / "horovod/common/operations.cc"
    replace(
        loop,
        r"^    if \(process_set_id == 0\) \{\n(?=      state\.mark)",
        r"\g<0>      state.last_cycle_start += (std::chrono::steady_clock::now() - state.last_cycle_start) / 8;\n",
    )
    # A tensor waits for the next cycle, up to a millisecond, though its worker may have nothing else to do than to wait
    # for it. Who begins to wait, where a tensor was handed over since the last cycle began, lets the next one begin.
    for function in ("AddToTensorQueue", "AddToTensorQueueMulti"):
        pattern = rf"^(Status TensorQueue::{function}\((?:.*\n)+?)(  return Status::OK\(\);)"
        replace(queue, pattern, r"\1  handed_over_ = true;\n\2")
    replace(queue, r"^// Add a TensorTableEntry", r"std::atomic<bool> TensorQueue::handed_over_{false};\n\n\g<0>")
    header = queue.with_suffix(".h")
    replace(header, r"^  bool finalized_ = false;$", r"\g<0>\n  static std::atomic<bool> handed_over_;")
    replace(header, r"^#include <queue>$", r"#include <atomic>\n\g<0>")
    declaration = r"\g<0>\n\n// Lets a cycle begin, for a thread that waits.\nvoid HurryCycle();"
    replace(loop.with_suffix(".h"), r"^namespace common \{$", declaration)
    replace(loop, r"^#include <cassert>$", r"\g<0>\n#include <condition_variable>")
    replace(
        loop,
        r"^bool RunLoopOnce\(HorovodGlobalState& state\) \{$",
        "std::mutex hurry_mutex;\n"
        "// Never destroyed: a thread may still wait when static objects are.\n"
        "auto& hurry = *new std::condition_variable;\nbool is_hurried = false;\n\n\\g<0>",
    )
    replace(
        loop,
        r"^  if \(sleep_duration > .*\) \{\n.*sleep_for\(sleep_duration\);\n  \}$",
        "  {\n    std::unique_lock<std::mutex> lock(hurry_mutex);\n"
        "    hurry.wait_for(lock, sleep_duration, [] { return is_hurried; });\n    is_hurried = false;\n  }\n"
        "  TensorQueue::handed_over_ = false;",
    )
    replace(
        loop,
        r'^extern "C" \{$',
        "void HurryCycle() {\n  if (!TensorQueue::handed_over_) {\n    return;\n  }\n"
        "  std::lock_guard<std::mutex> guard(hurry_mutex);\n  is_hurried = true;\n  hurry.notify_one();\n}\n\n\\g<0>",
    )
