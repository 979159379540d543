"""What a wheel must do where it is installed: load its kernel and train as README.md does."""

import re
from pathlib import Path

import vicinal
from vicinal.backends import cpu

README = Path(__file__).parents[1] / "README.md"

vicinal.show_config()
assert cpu.install_error() is None, cpu.install_error()
(example,) = re.findall(r"^```python\n(.*?)^```$", README.read_text("utf-8"), re.S | re.M)
exec(compile(example, str(README), "exec"))
