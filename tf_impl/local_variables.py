"""The variables whose gradients each worker keeps to itself."""

import tensorflow as tf

from horovod_powersgd.tensorflow.variable import native


class LocalVariables:
    """Some variables, and all of some layers, built or not: those are asked when gradients are averaged."""

    def __init__(self):
        self._added: set = set()
        self._layers: list[tf.keras.layers.Layer] = []

    def add(self, variable) -> None:
        """A variable of TensorFlow or of Keras 3, or a tensor."""
        self._added.add(native(variable).ref())

    def add_layers(self, layers) -> None:
        """A Keras layer, or some, or none.

        Raises:
            ValueError: one of them is no layer.
        """
        layers = [layers] if isinstance(layers, tf.keras.layers.Layer) else list(layers or ())
        if not all(isinstance(layer, tf.keras.layers.Layer) for layer in layers):
            raise ValueError("All local layers must be of tf.keras.layers.Layer type.")
        self._layers += layers

    def update(self, other: "LocalVariables") -> None:
        """Adds what another has."""
        self._added |= other._added
        self._layers += other._layers

    def references(self) -> set:
        """References (ref()) of all variables that there are now."""
        return self._added | {native(variable).ref() for layer in self._layers for variable in layer.weights}
