"""The README as the description of a distribution, which is shown apart from its files."""

import re

SITE = "https://github.com/vicinal/vicinal/blob/main/"
IMAGES = "https://raw.githubusercontent.com/vicinal/vicinal/main/"


def with_absolute_links(text: str) -> str:
    """``text`` with links and images that do not depend on where it is shown."""
    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)", _absolute, text)


def _absolute(link: re.Match[str]) -> str:
    base = IMAGES if link[1] else SITE
    return f"{link[1]}[{link[2]}]({base}{link[3]})"
