"""Write README.md from nbs/index.ipynb (or, with --check, fail if it is not what that notebook says)."""
import json
import re
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]


def from_root(link):
    "A link of nbs/index.ipynb as a link of README.md."
    return f"]({link[1][3:] if link[1].startswith('../') else 'nbs/' + link[1]})"


def markdown(nb):
    "The notebook as Markdown: prose as it is, code fenced, hidden cells and directives left out, links relative to the root."
    parts = []
    for cell in nb["cells"]:
        text = "".join(cell["source"])
        if text.startswith("#| hide"): continue
        if cell["cell_type"] == "markdown": parts.append(re.sub(r"\]\((?!https?:|#)([^)]+)\)", from_root, text))
        else: parts.append("```python\n" + re.sub(r"^#\|.*\n", "", text, flags=re.M).strip() + "\n```")
    return "<!-- Made from nbs/index.ipynb by `make readme`; edit that. -->\n" + "\n\n".join(parts) + "\n"


text = markdown(json.loads((root / "nbs/index.ipynb").read_text(encoding="utf8")))
readme = root / "README.md"
if "--check" in sys.argv:
    if not readme.exists() or readme.read_text(encoding="utf8") != text: sys.exit("README.md is not what nbs/index.ipynb says: run `make readme`")
else: readme.write_text(text, encoding="utf8")
