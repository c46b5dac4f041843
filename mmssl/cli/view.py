"""a page about a run, or about several: mmssl view RUN [RUN ...]

mmssl view RUN writes report/index.html of a run folder again, whether its run is finished, killed or going on, and says where
it lies. mmssl view A B puts the curves of both on one page, out=FILE. A run writes its report by itself whenever it is probed.
"""

from __future__ import annotations

from pathlib import Path

from mmssl.cli.options import parse
from mmssl.errors import RecipeError

OPTIONS = {
    "pictures": (bool, False, "draw again what RUN/model makes of the data: feature maps, attention, neighbours, t-SNE, ..."),
    "open": (bool, False, "open it in the browser"),
    "out": (Path, None, "file of a page about several runs; runs.html if unset"),
}


def run(arguments: list[str]) -> int:
    """`mmssl view RUN`."""
    given = parse(arguments, ("RUN ...",), OPTIONS)
    runs = given["run"]
    if len(runs) == 1 and given["out"]:
        raise RecipeError("out: the report of one run is report/index.html in its folder; leave out=FILE away.")
    from mmssl import report

    if given["pictures"]:
        from mmssl.report import figures

        for each in runs:
            figures.draw(each)
    path = report.write(runs[0]) if len(runs) == 1 else report.compare(runs, given["out"] or Path("runs.html"))
    print(path)
    if given["open"]:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())
    return 0
