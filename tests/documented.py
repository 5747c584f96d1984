"""The code that docs/compressors.md shows, as users copy it."""

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "compressors.md"

[_code] = re.findall(r"```python\n(from horovod_powersgd.*?)```", PAGE.read_text(), re.DOTALL)
LINES = len(_code.splitlines())
_names = {"__name__": __name__}
exec(_code, _names)
random_rows = _names["random_rows"]
