"""The long description for PyPI: the README, whose relative links lead to the repository."""

import re
from pathlib import Path

from setuptools import setup

FILES = "https://github.com/fedddp/fedddp/blob/main/"
IMAGES = "https://raw.githubusercontent.com/fedddp/fedddp/main/"

readme = Path("README.md").read_text(encoding="utf-8")
readme = re.sub(r'(!\[[^]]*\]\(|src(?:set)?=")(?!https?:)', rf"\1{IMAGES}", readme)
readme = re.sub(r"((?<!!)\[[^]]*\]\()(?!https?:|#)", rf"\1{FILES}", readme)
setup(long_description=readme, long_description_content_type="text/markdown")
