"""horovod.keras with compressors: horovod_powersgd.tensorflow.keras, by the other name under which Horovod has it.

    import horovod_powersgd.keras as hvd                # was: import horovod.keras as hvd
"""

from typing import TYPE_CHECKING, Any

from horovod.tensorflow import Adasum as Adasum

from horovod_powersgd.tensorflow.keras import *

# isort: split
# Not "from ... import callbacks": that would find the other module's, which the line above has brought.
import horovod_powersgd.keras.callbacks
import horovod_powersgd.keras.elastic
from horovod_powersgd import activation

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """What Horovod exports, which comes without types."""


activation.TENSORFLOW.ready(__name__)
