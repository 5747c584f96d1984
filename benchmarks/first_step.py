"""What TensorFlow takes to build an exchange, and then for a step: one worker, square matrices and as many vectors.

    python benchmarks/first_step.py                      # 54 of 32 x 32, and 20 of 1024 x 1024, in a minute
    python benchmarks/first_step.py --matrices 161 --width 64
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time

METHODS = ["none", "rank-4", "rank-8-int8", "topk"]


def measure(method, matrices, width, steps):
    """Seconds of the first step, the median of the others, and the bytes that the process has had at most."""
    import tensorflow as tf

    import horovod_powersgd.tensorflow as hvd

    hvd.init()
    compression = {
        "none": hvd.Compression.none,
        "rank-4": hvd.PowerSGD(rank=4, min_compression_rate=1),
        "rank-8-int8": hvd.PowerSGD(rank=8, wire_dtype="int8", min_compression_rate=1),
        "topk": hvd.TopK(0.01),
    }[method]
    variables = [tf.Variable(tf.zeros(shape)) for shape in [(width, width), (width,)] * matrices]
    gradients = [tf.random.normal(variable.shape) for variable in variables]

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.add_n([tf.reduce_sum(variable * gradient) for variable, gradient in zip(variables, gradients)])
        tape = hvd.DistributedGradientTape(tape, compression=compression)
        for variable, update in zip(variables, tape.gradient(loss, variables)):
            variable.assign_sub(update)

    times = []
    for _ in range(1 + steps):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return times[0], statistics.median(times[1:]), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", type=int, nargs="+", default=[54, 20])
    parser.add_argument("--width", type=int, nargs="+", default=[32, 1024], help="of each of these models' matrices")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:  # in a process of its own: graph functions are built once
        first, others, nbytes = measure(args.methods[0], args.matrices[0], args.width[0], args.steps)
        print(f"{args.methods[0]:<14}{first:>10.2f} s{1e3 * others:>12.2f} ms{nbytes / 2**20:>11.0f} MiB")
        return
    threads = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "2"}
    for matrices, width in zip(args.matrices, args.width, strict=True):
        print(f"\n{matrices} matrices of {width} x {width}: first step, each of the others, memory", flush=True)
        for method in args.methods:
            command = [sys.executable, __file__, "--one", "--methods", method, "--matrices", str(matrices)]
            command += ["--width", str(width), "--steps", str(args.steps)]
            quiet = {**os.environ, **threads, "TF_CPP_MIN_LOG_LEVEL": "3"}
            subprocess.run(command, env=quiet, stderr=subprocess.DEVNULL, check=True)


if __name__ == "__main__":
    main()
