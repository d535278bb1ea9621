"""Statistics as one HTML file: tables, and plots inside it."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

from jint8.analysis._plots import plot_features, plot_magnitudes
from jint8.analysis._statistics import SUMMARY, Statistics

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em }
table { border-collapse: collapse } td, th { border-bottom: 1px solid #ddd; padding: .2em .8em; text-align: right }
td:first-child, th:first-child { text-align: left } svg { height: auto; max-width: 100% }
"""


def html_report(
    statistics: Statistics, *, title: str = "Outlier features", layer_share: float = 0.25, position_share: float = 0.06
) -> str:
    """A page with the features, counts by projection, and both plots, that needs no other file.

    Args:
      statistics: of a model.
      title: of the page.
      layer_share: as in `Statistics.features`.
      position_share: likewise.

    Returns:
      HTML, to be written as UTF-8.

    Raises:
      ImportError: matplotlib isn't there.
    """
    found = statistics.to_dict(layer_share=layer_share, position_share=position_share)
    unit = "mean magnitudes of the token" if statistics.relative else "magnitude"
    features = [
        (
            f["projection"],
            f["dimension"],
            f"{f['layer_share']:.0%}",
            f"{f['position_share']:.1%}",
            f"{f['mean']:.1f}",
            f"{f['largest']:.1f}",
        )
        for f in found["features"]
    ]
    projections = [(name, *p.summary()) for name, p in statistics.projections.items()]
    title = html.escape(title)
    return "\n".join(
        (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>',
            f"<h1>{title}</h1>",
            f"<p>Outliers are values of {statistics.threshold:g} {unit} or more. A feature dimension is listed where "
            f"it has any in {layer_share:.0%} of the layers and, there, at {position_share:.0%} of the positions.</p>",
            "<h2>Features</h2>",
            _table(("projection", "dimension", "layers", "positions", "mean", "largest"), features),
            "<h2>Projections</h2>",
            "<p>Outlier columns: in how many layers there are any, their median over layers, and most in which.</p>",
            _table(("projection", *SUMMARY), projections),
            "<h2>Layers and dimensions</h2>",
            _svg(plot_features(statistics)),
            "<h2>Magnitudes</h2>",
            _svg(plot_magnitudes(statistics)),
            "</html>\n",
        )
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["<table>", f"<tr>{''.join(f'<th>{cell}</th>' for cell in header)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows]
    return "\n".join((*lines, "</table>"))


def _svg(figure: Any) -> str:
    """The figure as an element of the page, without the declarations of a file."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
