"""The frame of a page that is one file: no request leaves it, the pictures are inside, and there is no script."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from llm.observe.summary import printable

_STYLE = """
:root { color-scheme: light; }
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; background: #fff; color: #1f2933;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid #d9e0e6; }
p.status { margin: .2rem 0 1.2rem; color: #52606d; }
.failed { color: #b42318; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #eef1f4;
         overflow-wrap: anywhere; }
th { width: 14rem; font-weight: 500; color: #52606d; }
td { font-variant-numeric: tabular-nums; }
img { width: 100%; height: auto; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: 1rem; background: #f6f8fa; border-radius: 6px; }
pre b { color: #1a5fb4; }
details summary { cursor: pointer; color: #1a5fb4; margin-top: .6rem; }
""".strip()

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page; `parts` are pieces of HTML whose text is escaped already."""
    head = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # the browser itself refuses whatever is not in this file, also if text got through unescaped
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f"<title>{escaped(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escaped(title)}</h1>",
    ]
    return "\n".join([*head, *parts, "</body></html>"]) + "\n"


def section(heading: str, body: str) -> str:
    return f"<h2>{escaped(heading)}</h2>\n{body}"


def table(lines: Sequence[tuple[str, str]]) -> str:
    rows = "\n".join(f"<tr><th>{escaped(label)}</th><td>{escaped(value)}</td></tr>" for label, value in lines)
    return f"<table>\n{rows}\n</table>"


def picture(png: bytes, alt: str) -> str:
    return f'<img alt="{escaped(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def escaped(text: str) -> str:
    return html.escape(printable(text))
