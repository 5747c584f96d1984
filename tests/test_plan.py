"""The command plan: models from files and functions, the table, the recommendation, and what it refuses."""

import json
import struct
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from horovod_powersgd import __main__, planning
from horovod_powersgd.cost import Work
from horovod_powersgd.layout import leading_rows, trailing_columns
from horovod_powersgd.network import Network
from horovod_powersgd.plan import (
    CAREFUL,
    IN_TWO_LEVELS,
    PLAIN,
    SETTINGS,
    TYPICAL_WORK,
    Plan,
    bytes_per_second,
    seconds,
)
from horovod_powersgd.shapes import Tensors, Unreadable, of_file, of_function

SHAPES = {"embedding": (20_000, 500), "weight": (500, 500), "bias": (500,)}


def plan(link="1gbit", workers=8, backward=0.0, shapes=SHAPES):
    return Plan.of(Tensors(shapes), Network.of_links(workers, bytes_per_second(link), 5e-5), TYPICAL_WORK, backward)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps(SHAPES))
    return path


@pytest.fixture
def without_horovod(monkeypatch):
    monkeypatch.setattr(planning, "_calibration", lambda tensors: None)


def test_a_slow_link_is_recommended_the_most_careful_of_the_fast_ones():
    recommended = []
    for link in ("10mbit", "1gbit", "10gbit"):
        found = plan(link)
        careful = [found.option(setting) for setting in CAREFUL]
        least = min(option.step for option in careful)
        recommended.append(careful.index(found.recommended))
        assert found.recommended.step <= 1.1 * least
        assert all(option.step > 1.1 * least for option in careful[: recommended[-1]])
        assert "less" in found.reason()
    assert recommended == [4, 4, 3]
    assert plan("10mbit").option(PLAIN).step > 50 * plan("10mbit").recommended.step


def test_a_large_model_is_recommended_a_higher_rank():
    large = {"embedding": (40_000, 500), "weight": (500, 500)}
    for link in ("10mbit", "100mbit"):
        assert plan(link, shapes=large).recommended.setting == 'hvd.PowerSGD(rank=32, wire_dtype="int8")'
        assert plan(link).recommended.setting in CAREFUL


def test_a_fast_link_is_recommended_none():
    assert plan("4000gbit").recommended.setting == PLAIN
    assert plan(backward=60.0).recommended.setting == PLAIN
    assert plan(workers=1).recommended.setting == PLAIN and "one worker" in plan(workers=1).reason()


def test_what_loses_quality_is_listed_and_not_recommended():
    found = plan("100mbit")
    assert found.option("hvd.PowerSGD(rank=1)").step < found.recommended.step
    assert found.recommended.setting in CAREFUL and "hvd.PowerSGD(rank=1)" not in CAREFUL


def test_the_table_and_the_json_say_the_same():
    found = plan()
    whole = json.loads(found.as_json())
    assert whole["recommended"] == found.recommended.setting and whole["parameters"] == 10_250_500
    by_setting = {option["setting"]: option for option in whole["options"]}
    assert list(by_setting) == list(SETTINGS)
    rank4 = by_setting["hvd.PowerSGD(rank=4)"]
    assert rank4["compressed_tensors"] == ["embedding", "weight"]
    assert rank4["bytes_sent"] == 4 * (4 * (20_500 + 1_000) + 500) and rank4["memory"] == 4 * 10_250_000
    assert rank4["times_faster_than_horovod"] == pytest.approx(found.option(PLAIN).step / rank4["step_seconds"])
    table = found.as_table()
    assert all(setting in table for setting in SETTINGS) and "Averaged as they are: bias" in table


def test_two_levels_are_beside_one_where_workers_share_hosts():
    network = Network.of_links(8, bytes_per_second("100mbit"), 5e-5, per_host=2)
    found = Plan.of(Tensors(SHAPES), network, TYPICAL_WORK)
    order = [option.setting for option in found.options]
    assert len(order) == len(SETTINGS) + len(IN_TWO_LEVELS)
    for setting in IN_TWO_LEVELS:
        two, one = found.option(order[order.index(setting) + 1]), found.option(setting)
        assert two.setting == f"{setting[:-1]}, hierarchical=True)" and two.compressor.hierarchical
        assert two.prediction.memory == one.prediction.memory / 2
        assert found.compressed(two.setting) == ["embedding", "weight"]
    assert found.recommended == plan("100mbit").recommended
    table = found.as_table()
    assert "8 workers on hosts of 2" in table and "share one memory" in table
    assert json.loads(found.as_json())["workers_per_host"] == 2
    assert "hierarchical" not in plan().as_table() and json.loads(plan().as_json())["workers_per_host"] is None


def test_rates_and_durations():
    assert bytes_per_second("100mbit") == 12.5e6 and bytes_per_second("25Gbit/s") == 25e9 / 8
    assert seconds("50us") == pytest.approx(5e-5) and seconds("1.5ms") == 1.5e-3 and seconds("2s") == 2.0
    for wrong in ("fast", "0gbit", "10", "10gbyte"):
        with pytest.raises(ValueError, match="rate"):
            bytes_per_second(wrong)
    with pytest.raises(ValueError, match="duration"):
        seconds("50")


def write_safetensors(path):
    header = json.dumps({
        "__metadata__": {"format": "pt"},
        "weight": {"dtype": "F16", "shape": [30, 40], "data_offsets": [0, 2400]},
        "scale": {"dtype": "BF16", "shape": [40], "data_offsets": [2400, 2480]},
        "position": {"dtype": "I64", "shape": [1], "data_offsets": [2480, 2488]},
    }).encode()  # fmt: skip
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(2488))


def test_shapes_of_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path)
    assert of_file(path).shapes == {"weight": (30, 40), "scale": (40,)}


def test_shapes_of_a_checkpoint_in_parts(tmp_path):
    write_safetensors(tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "model-00002-of-00002.json").write_text('{"head": [40, 9]}')
    path = tmp_path / "model.safetensors.index.json"
    names = {"weight": 1, "scale": 1, "head": 2}
    parts = [None, "model-00001-of-00002.safetensors", "model-00002-of-00002.json"]
    path.write_text(json.dumps({"metadata": {}, "weight_map": {name: parts[i] for name, i in names.items()}}))
    assert of_file(path).shapes == {"weight": (30, 40), "scale": (40,), "head": (40, 9)}
    (tmp_path / parts[1]).unlink()
    with pytest.raises(Unreadable, match=f"{parts[1]}: there is no such file"):
        of_file(path)


def test_shapes_of_a_list(tmp_path):
    path = tmp_path / "shapes.json"
    path.write_text("[[3, 4], [5]]")
    assert of_file(path) == Tensors({"0": (3, 4), "1": (5,)}, leading_rows)


@pytest.mark.parametrize(
    "name, content, word",
    [
        ("missing.json", None, "no such file"),
        ("model.onnx", b"", "ends in none of"),
        ("broken.json", b"{", "cannot be read"),
        ("words.json", b'{"a": "b"}', "list of integers"),
        ("number.json", b'{"a": 5}', "the shape of a must be a list of integers, not 5"),
        ("short.safetensors", b"abc", "cannot be read"),
        ("wrong.safetensors", b"\xff" * 20, "no .safetensors file"),
        ("broken.keras", b"no zip", "cannot be read"),
    ],
)
def test_what_is_no_model_is_named(tmp_path, name, content, word):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(Unreadable, match=word):
        of_file(tmp_path / name)


@pytest.mark.parametrize(
    "name, word",
    [("json", "package.module:function"), ("nowhere:make", "nowhere"), ("json:nothing", "nothing"),
     ("json:dumps.x", "x"), ("sys:version", "no function"), ("time:time", "float")],
)  # fmt: skip
def test_a_function_that_makes_no_model_is_named(name, word):
    with pytest.raises(Unreadable, match=word):
        of_function(name)


def test_the_command_prints_a_table_or_json(file, without_horovod, capsys):
    arguments = ["plan", "--shapes", str(file), "--link", "1gbit", "--workers", "8"]
    assert __main__.main(arguments) == 0
    assert 'compression=hvd.PowerSGD(rank=8, wire_dtype="int8"): a step takes' in capsys.readouterr().out
    assert __main__.main([*arguments, "--json", "--backward", "10ms", "--latency", "1ms"]) == 0
    assert json.loads(capsys.readouterr().out)["backward_seconds"] == 0.01
    assert __main__.main([*arguments, "--json", str(file.with_name("plan.json"))]) == 0
    assert capsys.readouterr().out == ""
    assert json.loads(file.with_name("plan.json").read_text())["workers"] == 8
    assert __main__.main([*arguments, "--workers-per-host", "4"]) == 0
    assert "hvd.PowerSGD(rank=8, hierarchical=True)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, word",
    [
        ([], "--link and --workers"),
        (["--link", "1gbit"], "--workers"),
        (["--link", "1gbit", "--workers", "0"], "--workers"),
        (["--link", "quick", "--workers", "2"], "quick"),
        (["--link", "1gbit", "--workers", "8", "--workers-per-host", "3"], "does not divide"),
        (["--workers-per-host", "2"], "go with --link"),
        (["--link", "1gbit", "--workers", "8", "--plot", "steps.doc"], "steps.doc: its name ends in none of .png"),
        (["--link", "1gbit", "--workers", "8", "--json", "nowhere/plan.json"], "nowhere/plan.json"),
        (["--link", "1.2.3gbit", "--workers", "8"], "no rate"),
    ],
)
def test_what_is_missing_is_said(file, without_horovod, capsys, more, word):
    assert __main__.main(["plan", "--shapes", str(file), *more]) == 1
    assert word in capsys.readouterr().err


def test_a_model_without_matrices_has_nothing_to_compress(tmp_path, without_horovod, capsys):
    path = tmp_path / "shapes.json"
    path.write_text('{"bias": [3]}')
    assert __main__.main(["plan", "--shapes", str(path), "--link", "1gbit", "--workers", "8"]) == 1
    assert "two axes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "there, model, chosen",
    [
        ("torch tensorflow", leading_rows, "torch"),
        ("torch tensorflow", trailing_columns, "tensorflow"),
        ("tensorflow", leading_rows, "tensorflow"),
        ("torch", trailing_columns, "torch"),
        ("", leading_rows, None),
    ],
)
def test_which_framework_measures(monkeypatch, there, model, chosen):
    imported = []

    def import_module(name):
        imported.append(name)
        return Mock(Calibration=lambda process_set, *model: SimpleNamespace(module=name, model=model))

    monkeypatch.setattr(planning.importlib, "import_module", import_module)
    monkeypatch.setattr(planning, "horovod_problem", lambda f: None if f.name in there.split() else "it is missing")
    module = f"horovod_powersgd.{chosen}"
    found = planning._calibration(Tensors(SHAPES, model))
    if chosen:
        assert (found.module, found.model) == (f"{module}.calibration", (list(SHAPES.values()), model))
        assert not found.hurries
    else:
        assert found is None
    assert imported == ([module, f"{module}.calibration"] if chosen else [])


def test_a_framework_that_does_not_load_is_told(file, monkeypatch, capsys):
    def import_module(name):
        raise ImportError("Keras cannot be imported")

    monkeypatch.setattr(planning.importlib, "import_module", import_module)
    monkeypatch.setattr(planning, "horovod_problem", lambda framework: None)
    assert __main__.main(["plan", "--shapes", str(file)]) == 1
    assert capsys.readouterr().err == "error: Keras cannot be imported\n"


def test_one_worker_alone_has_no_network(file, monkeypatch, capsys):
    class Alone:
        is_first, count = True, 1

        def works(self, settings, workers):
            assert workers == 2  # as the link's, not those that measure
            return dict.fromkeys(settings, Work(0.0, 0.0))

    monkeypatch.setattr(planning, "_calibration", lambda tensors: Alone())
    assert __main__.main(["plan", "--shapes", str(file)]) == 1
    assert "horovodrun" in capsys.readouterr().err
    assert __main__.main(["plan", "--shapes", str(file), "--link", "1gbit", "--workers", "2"]) == 0
