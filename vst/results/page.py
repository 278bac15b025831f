"""What the HTML pages of results share: a style, pictures inside the file, tables."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1c2430;background:#fafbfc;margin:0 auto;max-width:1040px;
padding:2rem 1.2rem}
h1{font-size:1.7rem;margin:0 0 .3rem} h2{font-size:1.15rem;margin:2.2rem 0 .6rem} p{max-width:46rem}
table{border-collapse:collapse;font-size:.92rem}
th,td{padding:.34rem .8rem;text-align:right;border-bottom:1px solid #e2e6ea}
th:first-child,td:first-child{text-align:left} thead th{border-bottom:2px solid #c4ccd4;font-weight:600}
tr.split td:first-child{color:#2457a6;font-weight:600} .plot{width:100%;max-width:760px}
.maps{overflow-x:auto} .maps td{padding:.2rem;border:0;text-align:center}
.maps th{padding:.2rem;font-weight:500;font-size:.8rem;border:0;text-align:center}
.maps img{width:104px;height:104px;image-rendering:pixelated;border-radius:6px;display:block}
.name{font-size:.74rem;color:#5a6675;max-width:104px}
small,.note{color:#5a6675} .wide{overflow-x:auto} .wide td{white-space:nowrap} td.text,th.text{text-align:left}
"""


def png(image: Image.Image) -> str:
    """A picture as a data URL, for a page that is one file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return _url("image/png", buffer.getvalue())


def data_url(path: Path) -> str:
    """A picture's file as a data URL.

    Raises:
        ValueError: neither a PNG nor an SVG.
    """
    if path.suffix not in _TYPES:
        raise ValueError(f"The plot {path} is of type {path.suffix!r}, but must be one of {', '.join(_TYPES)}.")
    return _url(_TYPES[path.suffix], path.read_bytes())


def _url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64," + base64.b64encode(data).decode()


def html_table(heads: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int] = ()) -> str:
    """A table that scrolls by itself; numbers stand right, the first column and those in ``text`` left."""
    marks = [' class="text"' if i in text else "" for i in range(len(heads))]
    head = "".join(f"<th{mark}>{html.escape(h)}</th>" for mark, h in zip(marks, heads, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{mark}>{html.escape(c)}</td>" for mark, c in zip(marks, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
