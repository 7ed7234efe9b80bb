"""Run README's Python blocks, each by itself; one that needs CuPy is skipped, saying so."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

for i, block in enumerate(re.findall(r"```python\n(.*?)```", Path(sys.argv[1]).read_text(), re.S)):
    if re.search("^import cupy", block, re.M) and find_spec("cupy") is None:
        print(f"block {i}: needs CuPy, skipped")
        continue
    print(f"block {i}")
    exec(compile(block, f"README block {i}", "exec"), {"__name__": "__main__"})
