"""The README as the description of a distribution, which is shown apart from its files."""

import re

from setuptools.command.egg_info import egg_info

SITE = "https://github.com/vicinal/vicinal/blob/main/"
IMAGES = "https://raw.githubusercontent.com/vicinal/vicinal/main/"


class DescribeByReadme(egg_info):  # type: ignore[misc]
    """Writes the metadata of a distribution, whose description has links to the repository."""

    def run(self) -> None:
        metadata = self.distribution.metadata
        metadata.long_description = with_absolute_links(metadata.long_description)
        super().run()


def with_absolute_links(text: str) -> str:
    """``text`` with links and images that do not depend on where it is shown."""
    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)", _absolute, text)


def _absolute(link: re.Match[str]) -> str:
    base = IMAGES if link[1] else SITE
    return f"{link[1]}[{link[2]}]({base}{link[3]})"
