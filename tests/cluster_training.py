"""A training by two workers on this machine, which this starts with a framework for clusters, or which mpirun starts.

    python cluster_training.py ray        or spark
    mpirun -np 2 python cluster_training.py mpirun
"""

import sys


def train():
    """Called in each worker. Returns (its rank, how many there are)."""
    import horovod_powersgd.torch as hvd

    hvd.activate(compression=hvd.PowerSGD(rank=2))
    import torch_activated_checks as checks

    checks.check_a_training_that_imports_horovod_equals_one_that_imports_this_package()
    return hvd.rank(), hvd.size()


def with_ray():
    import ray
    from horovod.ray import RayExecutor

    ray.init(num_cpus=2, include_dashboard=False)
    executor = RayExecutor(RayExecutor.create_settings(), num_workers=2)
    executor.start()
    results = executor.run(train)
    executor.shutdown()
    ray.shutdown()
    return results


def with_spark():
    import horovod.spark
    from pyspark.sql import SparkSession

    session = SparkSession.builder.master("local[2]").config("spark.ui.enabled", False).getOrCreate()
    results = horovod.spark.run(train, num_proc=2, use_gloo=True)
    session.stop()
    return results


if __name__ == "__main__":
    results = {"ray": with_ray, "spark": with_spark, "mpirun": train}[sys.argv[1]]()
    sys.stdout.write(f"results: {results}\n")  # in one piece, which another worker's cannot tear
