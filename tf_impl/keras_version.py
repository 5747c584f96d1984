"""Which Keras tf.keras is."""

import tensorflow as tf

# Otherwise it is Keras 2, the package tf_keras, which TF_USE_LEGACY_KERAS=1 chooses.
KERAS_3 = hasattr(tf.keras.optimizers, "LossScaleOptimizer")
