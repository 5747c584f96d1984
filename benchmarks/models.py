"""The tensors of well-known models: (name, shape) of each parameter, in PyTorch's order and layout.

    python benchmarks/models.py     # prints how many there are, and checks their number
"""

from math import prod


def _normalization(name, width):
    return [(f"{name}.weight", (width,)), (f"{name}.bias", (width,))]


def _linear(name, inputs, outputs):
    return [(f"{name}.weight", (outputs, inputs)), (f"{name}.bias", (outputs,))]


def _convolution(name, inputs, outputs, size):
    """A convolution without bias and the normalization after it."""
    return [(f"{name}.conv.weight", (outputs, inputs, size, size)), *_normalization(f"{name}.norm", outputs)]


def _resnet(blocks, kernels, expansion, first_kernel, classes):
    """Residual networks (He et al., 2016).

    Args:
        blocks: how many in each stage.
        kernels: the sizes of the convolutions in a block.
        expansion: how many times wider a block's output is than its inner convolutions.
        first_kernel: the size of the first convolution.
    """
    tensors = _convolution("stem", 3, 64, first_kernel)
    inputs = 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        for block in range(count):
            name, outputs, channels = f"stage{stage}.block{block}", width * expansion, inputs
            for number, kernel in enumerate(kernels):
                following = outputs if number == len(kernels) - 1 else width
                tensors += _convolution(f"{name}.{number}", channels, following, kernel)
                channels = following
            if inputs != outputs:
                tensors += _convolution(f"{name}.shortcut", inputs, outputs, 1)
            inputs = outputs
    return tensors + _linear("classifier", inputs, classes)


def resnet18():
    """For 32 x 32 images and 10 classes, as in the PowerSGD paper."""
    return _resnet([2, 2, 2, 2], kernels=[3, 3], expansion=1, first_kernel=3, classes=10)


def resnet50():
    """For ImageNet."""
    return _resnet([3, 4, 6, 3], kernels=[1, 3, 1], expansion=4, first_kernel=7, classes=1000)


def lstm(words=28869, units=650, layers=3):
    """The PowerSGD paper's language model: what scores words shares the embedding's matrix."""
    tensors = [("embedding.weight", (words, units))]
    for layer in range(layers):
        for part in ("ih", "hh"):
            tensors.append((f"lstm.weight_{part}_l{layer}", (4 * units, units)))
        for part in ("ih", "hh"):
            tensors.append((f"lstm.bias_{part}_l{layer}", (4 * units,)))
    return [*tensors, ("scores.bias", (words,))]


def _attention_layer(name, width, joined):
    """Attention and feed-forward; BERT has a matrix each for query, key and value, GPT-2 has them joined to one."""
    parts = [("query_key_value", 3)] if joined else [("query", 1), ("key", 1), ("value", 1)]
    tensors = []
    for part, count in parts:
        tensors += _linear(f"{name}.{part}", width, count * width)
    tensors += _linear(f"{name}.output", width, width) + _normalization(f"{name}.norm1", width)
    tensors += _linear(f"{name}.up", width, 4 * width) + _linear(f"{name}.down", 4 * width, width)
    return tensors + _normalization(f"{name}.norm2", width)


def bert_base(width=768):
    """BERT-base (Devlin et al., 2019), uncased, with the pooler and without a task's own layers."""
    tables = [("word_embedding", 30522), ("position_embedding", 512), ("type_embedding", 2)]
    tensors = [(f"{name}.weight", (rows, width)) for name, rows in tables] + _normalization("norm", width)
    for layer in range(12):
        tensors += _attention_layer(f"layer{layer}", width, joined=False)
    return tensors + _linear("pooler", width, width)


def gpt2_small(width=768):
    """GPT-2 small (Radford et al., 2019): what scores words shares the embedding's matrix."""
    tensors = [("word_embedding.weight", (50257, width)), ("position_embedding.weight", (1024, width))]
    for layer in range(12):
        tensors += _attention_layer(f"layer{layer}", width, joined=True)
    return tensors + _normalization("norm", width)


MODELS = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "lstm": lstm,
    "bert-base": bert_base,
    "gpt2-small": gpt2_small,
}
TITLES = {
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "lstm": "LSTM",
    "bert-base": "BERT-base",
    "gpt2-small": "GPT-2 small",
}
# As published for these architectures.
PARAMETERS = {
    "resnet18": 11_173_962,
    "resnet50": 25_557_032,
    "lstm": 28_949_319,
    "bert-base": 109_482_240,
    "gpt2-small": 124_439_808,
}


def parameters(model):
    return sum(prod(shape) for _, shape in MODELS[model]())


def main():
    print(f"{'model':<14}{'tensors':>10}{'matrices':>10}{'parameters':>14}")
    for model, tensors in MODELS.items():
        names = [name for name, _ in tensors()]
        assert len(set(names)) == len(names), f"{model}: a name is there twice"
        assert parameters(model) == PARAMETERS[model], f"{model}: {parameters(model)} is not {PARAMETERS[model]}"
        matrices = sum(len(shape) > 1 for _, shape in tensors())
        print(f"{TITLES[model]:<14}{len(names):>10}{matrices:>10}{parameters(model):>14,}")


if __name__ == "__main__":
    main()
