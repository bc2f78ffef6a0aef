"""Hand-written notes: Markdown without HTML, its pictures inside the page."""

from __future__ import annotations

import base64
import mimetypes
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markupsafe import Markup

from reports.runs import ReportError


def render_notes(text: str, folder: Path) -> Markup:
    """HTML of the notes; pictures by relative paths, which count from the report's folder, become part of the page.

    Raises:
        ReportError: there is no such picture.
    """
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    # data: links that people write are refused, as is javascript:; ours are made after that check.
    tokens = markdown.parse(text)
    for token in (child for block in tokens for child in block.children or [] if child.type == "image"):
        source = str(token.attrs.get("src", ""))
        kind = mimetypes.guess_type(source)[0] or ""
        if "://" in source or source.startswith("data:") or not kind.startswith("image/"):
            continue
        path = folder / unquote(source)
        if not path.is_file():
            raise ReportError(f"The notes show {source}, but there is no {path}: paths count from the report's folder.")
        token.attrs["src"] = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return Markup(markdown.renderer.render(tokens, markdown.options, {}))
