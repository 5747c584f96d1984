"""horovod.keras with compressors: horovod_powersgd.tensorflow.keras, by the other name under which Horovod has it.

    import horovod_powersgd.keras as hvd                # was: import horovod.keras as hvd
"""

from horovod.tensorflow import Adasum  # noqa: F401

from horovod_powersgd.tensorflow.keras import *  # noqa: F401, F403

# isort: split
# Not "from ... import callbacks": that would find the other module's, which the line above has brought.
import horovod_powersgd.keras.callbacks
import horovod_powersgd.keras.elastic  # noqa: F401
