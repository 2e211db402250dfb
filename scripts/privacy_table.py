#!/usr/bin/env python3
"""Write the table of docs/privacy.md: which features go together with `privacy`, and why others do not.

    .venv/bin/python scripts/privacy_table.py

With `--check` nothing is written; exit code 1 means that the table is not current.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from fedddp.config.privacy_table import table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "privacy.md"
BLOCK = re.compile(r"(<!-- scripts/privacy_table.py -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Write or check the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it is not current")
    check = parser.parse_args().check
    text = PAGE.read_text(encoding="utf-8")
    current = BLOCK.sub(lambda block: f"{block[1]}{table()}{block[2]}", text)
    if not check:
        PAGE.write_text(current, encoding="utf-8")
    elif current != text:
        sys.exit(f"error: the table of {PAGE} is not current; run scripts/privacy_table.py")


if __name__ == "__main__":
    main()
