"""What workers show wherever they were started: a short training, compared with the reference."""

from horovod_powersgd import PowerSGD
from torch_checks import equivalence, hvd


def check_a_few_steps_equal_the_reference():
    assert hvd.size() == 2
    equivalence.a_run_of_compressors([(PowerSGD(rank=2), "float32")], steps=4)
