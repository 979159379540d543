"""Reads the data in the file of an explorer page."""

import base64
import json
import re
import struct
from pathlib import Path
from typing import Any

CODES = {"Uint8": "B", "Uint16": "H", "Uint32": "I", "Float32": "f", "Float64": "d"}


def read(path: Path) -> Any:
    """The data in the file."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())
    assert found is not None
    return json.loads(found[1])


def unpack(encoded: list[str]) -> list[Any]:
    """The numbers of an array of the page: a pair of its type and base64."""
    code, packed = CODES[encoded[0]], base64.b64decode(encoded[1])
    return list(struct.unpack(f"<{len(packed) // struct.calcsize(code)}{code}", packed))
