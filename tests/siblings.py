"""What sibling scripts share, held identical: `make sync` copies it out of gspo.py, tests/test_siblings.py checks it.

The docstring, Constants and Algorithm are each script's own. The imports and all other sections are gspo.py's, but for
the algorithm's name.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIBLINGS = ("grpo",)
OWN = ("docstring", "Constants", "Algorithm")


def sections(text):
    """The script in order: {"docstring": ..., "imports": ..., "Constants": ..., ...}; together they are the text."""
    end = text.index('"""\n', 3) + 4
    parts = {"docstring": text[:end]}
    banners = list(re.finditer(r"^# ---- (.+?) -+$", text, re.MULTILINE))
    parts["imports"] = text[end : banners[0].start()]
    for banner, following in zip(banners, [*banners[1:], None], strict=True):
        parts[banner[1]] = text[banner.start() : following.start() if following else len(text)]
    return parts


def shared_for(name):
    """The sections that script `name` has to share, as gspo.py has them, under its own name."""
    parts = sections((ROOT / "gspo.py").read_text(encoding="utf-8"))
    renamed = {title: text.replace("gspo", name).replace("GSPO", name.upper()) for title, text in parts.items()}
    return {title: text for title, text in renamed.items() if title not in OWN}


def main():
    if sys.argv[1:] != ["sync"]:
        sys.exit("usage: python tests/siblings.py sync")
    for name in SIBLINGS:
        path = ROOT / f"{name}.py"
        text = path.read_text(encoding="utf-8")
        synced = "".join((sections(text) | shared_for(name)).values())
        print(f"{path.name}: {'unchanged' if synced == text else 'synced from gspo.py'}")
        path.write_text(synced, encoding="utf-8")


if __name__ == "__main__":
    main()
