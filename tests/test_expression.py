"""Compressors on a command line."""

import pytest

from horovod_powersgd import Accordion, Auto, Float16, PowerSGD, TopK
from horovod_powersgd.expression import COMPRESSORS, compressor_from


@pytest.mark.parametrize(
    "expression, compressor",
    [
        ("PowerSGD(rank=8)", PowerSGD(rank=8)),
        ("PowerSGD(4, wire_dtype='int8', warm_start=False)", PowerSGD(4, wire_dtype="int8", warm_start=False)),
        (" Float16( )", Float16()),
        ("Accordion(PowerSGD(4), high=PowerSGD(1), interval=100)", Accordion(PowerSGD(4), PowerSGD(1), interval=100)),
        ("TopK(1e-2)", TopK(0.01)),
        ("hvd.PowerSGD(rank=8)", PowerSGD(rank=8)),
        ("hvd.Auto(hvd.Compression.fp16, PowerSGD(8))", Auto(Float16(error_feedback=False), PowerSGD(8))),
    ],
)
def test_it_is_what_python_makes_of_it(expression, compressor):
    assert compressor_from(expression) == compressor


@pytest.mark.parametrize(
    "expression, error",
    [
        ("PowerSGD", "PowerSGD is none with its arguments, as PowerSGD.rank=8. is. There are Accordion, Atomo"),
        ("Custom(1)", "is none with its arguments"),
        ("4", "4 is none with its arguments"),
        ("", "invalid syntax"),
        ("PowerSGD(", "was never closed"),
        ("hvd.PowerSGD", "hvd.PowerSGD is none with its arguments"),
        ("other.PowerSGD(rank=8)", "other.PowerSGD.rank=8. is none with its arguments"),
        ("PowerSGD(rank=0)", "rank must be 1 or more, not 0"),
        ("PowerSGD(rnk=1)", "unexpected keyword argument 'rnk'"),
        ("PowerSGD(rank=2 ** 3)", "2 .. 3 is no literal"),
        ("PowerSGD(*[1])", "is no literal"),
        ("PowerSGD(**{'rank': 1})", "keywords must be strings"),
        ("PowerSGD(rank=open('x', 'w'))", "open.* is none with its arguments"),
        ("PowerSGD.traffic([(4, 4)], 2)", "is none with its arguments"),
        ("Accordion(PowerSGD(4), PowerSGD(1))", "interval is required"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_called(expression, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=error) as raised:
        compressor_from(expression)
    assert str(raised.value).startswith(f"{expression!r} makes no compressor: ")
    assert not list(tmp_path.iterdir())


def test_all_compressors_are_known_but_the_one_that_takes_a_function():
    assert {"PowerSGD", "Accordion", "Int8", "GradiVeq"} < COMPRESSORS.keys()
    assert not {"Custom", "Compressor", "Traffic", "CompressionStats", "Allgather"} & COMPRESSORS.keys()
