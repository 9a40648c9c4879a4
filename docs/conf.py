"""The documentation's build: `make docs`. Docstrings are the single source of the API's pages."""

import importlib.metadata
import pathlib
import re

from docutils import nodes
from jax.typing import ArrayLike
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging
from sphinx.util.nodes import make_refnode
from sphinx.util.typing import stringify_annotation

EXAMPLES = sorted((pathlib.Path(__file__).parents[1] / "examples").glob("*.py"))

project = "RingMoE"
author = copyright = "The RingMoE authors"
version = release = importlib.metadata.version("ringmoe")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"RingMoE {version}"
html_static_path = ["static"]
html_css_files = ["ringmoe.css"]
html_copy_source = html_show_sphinx = False
pygments_style, pygments_dark_style = "friendly", "monokai"
myst_heading_anchors = 3

# Every reference into this documentation must lead somewhere; those to other projects can't be followed without a network.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(jax|numpy|collections|typing)\..*|ArrayLike|[PR]")]
default_role = "literal"  # `names` of ours become links in `link`

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_param = napoleon_use_rtype = False
napoleon_attr_annotations = False  # the class's signature has them
maximum_signature_line_length = 100
python_use_unqualified_type_names = True


def docstring(app, what, name, obj, options, lines):
    """The docstrings' own habits in RST: an indented paragraph is a formula, [*batch, T] a shape, `Routing`s a plural."""
    for i in reversed(range(2, len(lines))):
        if lines[i].startswith("    ") and not lines[i - 1] and lines[i - 2][:1].strip():
            lines[i:i] = [".. code-block:: text", ""]
    lines[:] = [re.sub(r"(`[^`]+`)(?=\w)", r"\1\\ ", line).replace("[*", r"[\*") for line in lines]


def signature(app, what, name, obj, options, arguments, result):
    """Types by the names they were given; a default that is no Python, `<factory>`, as dots."""
    short = arguments and arguments.replace(stringify_annotation(ArrayLike, "smart"), "ArrayLike")
    return short and short.replace("<factory>", "..."), result


def link(app, doctree, docname):
    """Our names in backticks lead to the API's page, and must be there."""
    objects = app.env.domains["py"].objects
    for node in list(doctree.findall(nodes.literal)):
        text = node.astext()
        name = text if docname != "api" or text.startswith("ringmoe.") else f"ringmoe.{text}"
        if name in objects and not isinstance(node.parent, (nodes.reference, nodes.title)):
            entry = objects[name]
            node.replace_self(make_refnode(app.builder, docname, entry.docname, entry.node_id, node.deepcopy()))
        elif re.fullmatch(r"ringmoe(\.\w+)+", text) and name not in objects:
            logging.getLogger(__name__).warning("%s is not on the API's page", text, location=node)


def programs(app, docname, source):
    """The page `frameworks` shows the programs in examples/."""
    if docname == "frameworks":
        texts = {path: path.read_text() for path in EXAMPLES}
        source[0] += "".join(program(path, text) for path, text in texts.items() if "# [ringmoe]" in text)


def program(path: pathlib.Path, text: str) -> str:
    """What stands between the marks `# [ringmoe]` and `# [/ringmoe]`, as a diff with what was there, then the whole."""
    changed, number = [], 0  # lines of each marked region; how many lines of the file were read
    marked = set()
    inside = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() in ("# [ringmoe]", "# [/ringmoe]"):
            inside = not line.strip().startswith("# [/")
            changed += [[]] * inside
        elif inside and line.strip():
            old = re.fullmatch(r"(\s*)# was: (.*)", line)
            changed[-1] = [*changed[-1], f"-{old[1]}{old[2]}" if old else f"+{line}"]
            marked |= set() if old else {number}
    title = re.match(r'"""(.*?)[.:]', text)
    return "\n".join((
        f"\n## {title[1] if title else path.stem}\n",
        "```diff", "\n\n".join("\n".join(region) for region in changed), "```\n",
        f"<details><summary>The whole program: <code>examples/{path.name}</code></summary>\n",
        f"```{{literalinclude}} ../examples/{path.name}", ":language: python",
        f":emphasize-lines: {','.join(map(str, sorted(marked)))}", "```\n", "</details>\n",
    ))  # fmt: skip


def setup(app):
    attention = ModuleAnalyzer.for_module("ringmoe.attention")  # shown with its arguments, not with three overloads
    attention.analyze()
    attention.overloads.clear()
    app.connect("autodoc-process-docstring", docstring)
    app.connect("autodoc-process-signature", signature)
    app.connect("doctree-resolved", link)
    app.connect("source-read", programs)
