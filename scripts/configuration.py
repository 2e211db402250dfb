#!/usr/bin/env python3
"""Write docs/configuration.md, the page of all settings, from the classes that define them.

    .venv/bin/python scripts/configuration.py

With `--check` nothing is written; exit code 1 means that the page is not current.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedddp.config.reference import page

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"


def main() -> None:
    """Write or check the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it is not current")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"error: {PAGE} is not current; run scripts/configuration.py")


if __name__ == "__main__":
    main()
