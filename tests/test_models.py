"""What the command plan reads: models of PyTorch and Keras, and their checkpoints."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from horovod_powersgd import __main__, planning
from horovod_powersgd.layout import leading_rows, trailing_columns
from horovod_powersgd.shapes import Tensors, Unreadable, of_file, of_function


class TiedModel(torch.nn.Module):
    """Its head has its embedding's weights; one of its layers is frozen."""

    def __init__(self):
        super().__init__()
        self.embedding, self.hidden = torch.nn.Embedding(30, 8), torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 30, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = torch.nn.Linear(8, 8, bias=False).requires_grad_(False)
        self.register_buffer("positions", torch.arange(8))


TRAINED = {"embedding.weight": (30, 8), "hidden.weight": (8, 8), "hidden.bias": (8,)}


def test_a_function_makes_a_model_of_pytorch(monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(TiedModel=TiedModel))
    assert of_function("mine:TiedModel") == Tensors(TRAINED, leading_rows)


@pytest.mark.parametrize("is_zip", [True, False])
def test_checkpoints_of_pytorch(tmp_path, is_zip):
    model, path = TiedModel(), tmp_path / "model.pt"
    expected = {**TRAINED, "frozen.weight": (8, 8)}  # of which a checkpoint does not tell
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=is_zip)
    assert of_file(path) == Tensors(expected, leading_rows)
    optimizer = torch.optim.Adam(model.parameters())
    model.hidden(model.embedding.weight).sum().backward()
    optimizer.step()
    saved = {"model": model.state_dict(), "adam": optimizer.state_dict(), "epoch": 3, "best": 0.9}
    saved["model_ema"] = saved["best_model"] = {name: 2 * tensor for name, tensor in saved["model"].items()}
    saved["compression"] = {"config": {}, "workers": 1, "tensors": {"hidden.weight": {"memory": torch.ones(8, 8)}}}
    torch.save(saved, path, _use_new_zipfile_serialization=is_zip)
    assert of_file(path).shapes == {f"model.{name}": shape for name, shape in expected.items()}
    torch.save([{"schema.best": torch.ones(2, 3)}], path, _use_new_zipfile_serialization=is_zip)
    assert of_file(path).shapes == {"0.schema.best": (2, 3)}


def test_what_a_checkpoint_lacks_is_said(tmp_path):
    path = tmp_path / "model.pt"
    for saved, word in (({"epoch": 3}, "no tensors"), (torch.nn.Linear(2, 2), "save model.state_dict.. alone")):
        torch.save(saved, path)
        with pytest.raises(Unreadable, match=word):
            of_file(path)


def test_a_plan_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(planning, "_calibration", lambda tensors: None)
    (tmp_path / "shapes.json").write_text("[[300, 400]]")
    arguments = ["plan", "--shapes", str(tmp_path / "shapes.json"), "--link", "1gbit", "--workers", "8", "--plot"]
    for name, begin in (("steps.png", b"\x89PNG"), ("steps.svg", b"<?xml"), ("steps.pdf", b"%PDF")):
        assert __main__.main([*arguments, str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_bytes().startswith(begin)
    assert __main__.main([*arguments, str(tmp_path / "nowhere" / "steps.png")]) == 1
    assert "nowhere" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert __main__.main([*arguments, str(tmp_path / "steps.png")]) == 1
    assert "--plot needs matplotlib" in capsys.readouterr().err


@pytest.fixture(scope="module")
def keras_model():
    from tensorflow import keras

    layers = [keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization(), keras.layers.Flatten()]
    frozen = keras.layers.Dense(5, name="frozen", trainable=False)
    model = keras.Sequential([keras.Input((6, 6, 2)), *layers, frozen, keras.layers.Dense(3)])
    model.compile("adam", "mse")
    model.train_on_batch(np.zeros((1, 6, 6, 2)), np.zeros((1, 3)))  # so that the optimizer has variables, too
    return model


CONVOLUTION, NORMALIZATION, DENSE = [(3, 3, 2, 4), (4,)], [(4,), (4,)], [(5, 3), (3,)]


def test_a_function_makes_a_model_of_keras(monkeypatch, keras_model):
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(make=lambda: keras_model))
    found = of_function("mine:make")
    assert list(found.shapes.values()) == CONVOLUTION + NORMALIZATION + DENSE
    assert found.matrix_shape is trailing_columns


def test_variables_of_one_path_are_several(monkeypatch):
    from tensorflow import keras

    towers = [keras.Sequential([keras.Input((5,)), keras.layers.Dense(3, name="one")], name="tower") for _ in range(2)]
    model = keras.Sequential([keras.Input((5,)), towers[0], keras.layers.Dense(5)])
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(make=lambda: SimpleNamespace(
        trainable_variables=model.trainable_variables + towers[1].trainable_variables
    )))  # fmt: skip
    assert list(of_function("mine:make").shapes.values()) == [(5, 3), (3,), (3, 5), (5,), (5, 3), (3,)]


def test_a_model_that_is_not_built_yet_is_told_of(monkeypatch):
    from tensorflow import keras

    not_built = keras.Sequential([keras.layers.Dense(3)])
    monkeypatch.setitem(
        sys.modules, "mine", SimpleNamespace(keras=lambda: not_built, lazy=lambda: torch.nn.LazyLinear(3))
    )
    for name, word in (("mine:keras", "no variables yet"), ("mine:lazy", "no shape yet")):
        with pytest.raises(Unreadable, match=word):
            of_function(name)


def test_checkpoints_of_keras(tmp_path, keras_model):
    keras_model.save(tmp_path / "model.keras")
    found = of_file(tmp_path / "model.keras")
    of_all = CONVOLUTION + 2 * NORMALIZATION + [(64, 5), (5,)] + DENSE
    assert sorted(found.shapes.values()) == sorted(of_all)
    assert found.matrix_shape is trailing_columns
