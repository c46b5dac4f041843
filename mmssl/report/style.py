"""How the page looks: light and dark, from a phone's width upwards."""

LIGHT = {
    "back": "#fff",
    "text": "#1b1f24",
    "soft": "#59636e",
    "line": "#d6dbe1",
    "box": "#f5f7f9",
    "good": "#1a7f37",
    "bad": "#b3261e",
    **{f"c{n}": colour for n, colour in enumerate(("#0b63c5", "#b04a00", "#2f8132", "#8a3ffc", "#b5176c", "#5d6b79"))},
}
DARK = {
    "back": "#14181d",
    "text": "#e4e8ed",
    "soft": "#9aa5b1",
    "line": "#343c46",
    "box": "#1c2229",
    "good": "#56c271",
    "bad": "#ff8a80",
    **{f"c{n}": colour for n, colour in enumerate(("#6cb0ff", "#ffa657", "#6fcf73", "#c29bff", "#ff80bf", "#a3b0bd"))},
}
CURVES = "".join(
    f"path.c{n}{{stroke:var(--c{n})}}circle.c{n}{{fill:var(--c{n})}}li.c{n} i{{background:var(--c{n})}}\n" for n in range(6)
)


def _variables(colours: dict[str, str]) -> str:
    return ":root{color-scheme:light dark;" + ";".join(f"--{name}:{colour}" for name, colour in colours.items()) + "}\n"


STYLE = (
    _variables(LIGHT)
    + f"@media(prefers-color-scheme:dark){{{_variables(DARK)}}}\n"
    + """*{box-sizing:border-box}
body{margin:0 auto;max-width:1100px;padding:16px;background:var(--back);color:var(--text);font:15px/1.5 system-ui,sans-serif;
overflow-wrap:anywhere}
h1{font-size:1.5rem;margin:0 0 4px}
h2{font-size:1.2rem;margin:32px 0 8px;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:16px 0 4px}
p{margin:6px 0}
.note,figcaption{color:var(--soft);font-size:.88rem}
.good{color:var(--good)}
.bad{color:var(--bad)}
.two,.three{display:grid;gap:16px;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}
.three{grid-template-columns:repeat(auto-fill,minmax(min(100%,240px),1fr))}
.wide{display:grid;gap:20px;grid-template-columns:repeat(auto-fill,minmax(min(100%,520px),1fr))}
figure{margin:0;min-width:0}
.scroll{overflow-x:auto}
.scroll img{display:block;max-width:max(100%,500px);height:auto;background:#fff;border:1px solid var(--line)}
svg{width:100%;height:auto;display:block}
svg text{fill:var(--soft);font:10px system-ui,sans-serif}
.grid{stroke:var(--line);fill:none}
.line{fill:none;stroke-width:1.6;stroke-linejoin:round}
.missing{stroke:var(--bad);fill:none}
.legend{list-style:none;margin:2px 0 0;padding:0;display:flex;flex-wrap:wrap;gap:2px 14px;font-size:.85rem}
.legend i{display:inline-block;width:12px;height:3px;margin-right:5px;vertical-align:middle}
td:first-child{white-space:nowrap}
pre{white-space:pre-wrap;background:var(--box);border:1px solid var(--line);border-radius:6px;padding:10px;overflow-x:auto;
font-size:.85rem;margin:6px 0}
table{border-collapse:collapse;font-size:.9rem;width:100%}
td,th{text-align:left;padding:3px 10px 3px 0;border-bottom:1px solid var(--line);vertical-align:top}
details{margin:8px 0}
summary{cursor:pointer;color:var(--c0)}
"""
    + CURVES
)
