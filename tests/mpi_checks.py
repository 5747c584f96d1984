"""The reference over an mpi4py communicator."""

import numpy as np
from mpi4py import MPI

import cases
from horovod_powersgd import reference


class hvd:  # what worker.py needs of a framework
    init = staticmethod(lambda: None)
    rank = staticmethod(MPI.COMM_WORLD.Get_rank)
    allgather_object = staticmethod(MPI.COMM_WORLD.allgather)


def check_real_workers_and_simulated_ones_give_the_same_bits():
    workers, me = MPI.COMM_WORLD.Get_size(), MPI.COMM_WORLD.Get_rank()
    dtype = cases.DTYPES[workers % 2]
    for config in [*cases.CONFIGS, *cases.COMPRESSORS, *cases.ACCORDIONS]:
        state = reference.State()
        for step, (expected, memories, _) in enumerate(cases.simulated(config, dtype, workers, 4)):
            gradients, rate = cases.gradients(step, me, dtype), cases.learning_rate(step)
            updates = reference.communicate(MPI.COMM_WORLD, gradients, state, config, learning_rate=rate)
            assert all((updates[name] == expected[name]).all() for name in expected)
            assert state.memory.keys() == memories[me].keys()
            assert all((state.memory[name] == memories[me][name]).all() for name in state.memory)


def check_algorithm_2_gives_all_workers_the_same_bits():
    comm = MPI.COMM_WORLD
    parameters = {name: np.ones(shape) for name, shape in cases.SHAPES.items()}
    state = reference.OptimizerState()
    for step in range(5):
        gradients = cases.gradients(step, comm.Get_rank(), "float64")
        reference.over(
            comm, reference.algorithm_2(parameters, gradients, state, cases.CONFIGS[0], learning_rate=0.1, momentum=0.9)
        )
    for other in comm.allgather(parameters):
        assert all((parameters[name] == other[name]).all() and (other[name] != 1).any() for name in other)
