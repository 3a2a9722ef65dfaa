"""The page's style sheet: light and dark, narrow and printed. Series and roles have one colour each, everywhere."""

# name -> (light, dark)
_COLOURS = {
    "bg": ("#ffffff", "#14171c"), "panel": ("#f6f7f9", "#1d2229"), "ink": ("#1c2128", "#e3e7ec"),
    "muted": ("#5b6570", "#9aa5b1"), "line": ("#d9dee4", "#323a44"), "grid": ("#e8ebef", "#272e37"),
    "link": ("#0b5cad", "#6cb0f5"),
    "dense": ("#59626d", "#a3adb8"), "s1": ("#0b62b8", "#58a6f2"), "s2": ("#c25400", "#f0883e"),
    "s3": ("#1a7f4b", "#4cc38a"), "s4": ("#7a4fd0", "#b392f0"), "s5": ("#c4262e", "#ff7b7b"),
    "s6": ("#0b7f8c", "#3fc1cf"), "s7": ("#b8348b", "#f283c6"), "s8": ("#7d5f22", "#cfa95b"),
    "role-dense": ("#c25400", "#e0772e"), "role-anchor": ("#0b62b8", "#3d8fdb"), "role-reuse": ("#cfdff0", "#2b4057"),
    "role-none": ("#e6e8eb", "#2a3037"), "moved": ("#ffd9a8", "#6b4a1e"), "same": ("#eef2f6", "#232a33"),
}  # fmt: skip
_SERIES = ("dense", "s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8")


def _variables(which: int) -> str:
    return "".join(f"--{name}:{pair[which]};" for name, pair in _COLOURS.items())


def style_sheet() -> str:
    series = "".join(f".{name}{{--c:var(--{name})}}" for name in _SERIES)
    return (
        f":root{{color-scheme:light dark;{_variables(0)}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{_variables(1)}}}}}"
        f"@media print{{:root{{color-scheme:light;{_variables(0)}}}}}{series}{_REST}"
    )


_REST = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,"DejaVu Sans",sans-serif;-webkit-print-color-adjust:exact;print-color-adjust:exact}
main,header,footer{max-width:1020px;margin:0 auto;padding:0 24px}
header{padding-top:36px}
h1{font-size:27px;line-height:1.25;margin:0 0 4px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:20px;line-height:1.3;margin:0 0 6px;letter-spacing:-.005em}
h3{font-size:15px;margin:26px 0 6px;overflow-wrap:anywhere}
.kicker{color:var(--muted);font-size:13px;margin:0 0 4px}
p{margin:8px 0;max-width:78ch}
.lead{color:var(--muted);margin-bottom:14px}
section{border-top:1px solid var(--line);margin-top:36px;padding-top:24px}
a{color:var(--link)}
code{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;background:var(--panel);
padding:1px 4px;border-radius:4px;overflow-wrap:anywhere}
code span{display:inline-block;max-width:100%}
nav ol{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;margin:18px 0 0;padding:0;font-size:14px}
nav a{text-decoration:none}nav a:hover{text-decoration:underline}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(148px,1fr));gap:12px;margin:20px 0 4px;padding:0}
.tiles div{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:11px 14px}
.tiles dt{color:var(--muted);font-size:12.5px;line-height:1.35}
.tiles dd{margin:2px 0 0;font-size:21px;font-weight:650;line-height:1.3;font-variant-numeric:tabular-nums}
.tiles dd small{display:block;font-size:12.5px;font-weight:400;color:var(--muted);line-height:1.35}
figure{margin:18px 0 28px}
figcaption{color:var(--muted);font-size:13.5px;line-height:1.5;margin-top:8px;max-width:88ch}
figcaption b{color:var(--ink);font-weight:600}
.from{display:block;margin-top:3px}
.panels{display:flex;flex-wrap:wrap;gap:18px 26px;align-items:flex-start}
.panels>.legend{flex-basis:100%}
.panels svg.plot{flex:1 1 340px;min-width:0;width:100%;height:auto}
.wide{width:100%;overflow-x:auto}
.wide svg.plot{width:100%;height:auto;display:block}
.legend{display:flex;flex-wrap:wrap;gap:2px 18px;list-style:none;margin:0;padding:0;font-size:13px;line-height:1.7}
.swatch{height:12px;vertical-align:-1px;margin-right:6px}
.box{display:inline-block;width:14px;height:12px;border-radius:2px;vertical-align:-1px;margin-right:6px}
.scroll{overflow-x:auto;margin:10px 0;outline-offset:2px}
table{border-collapse:collapse;font-size:13.5px;line-height:1.4;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--muted);padding:0 0 6px;font-size:13px}
th,td{padding:5px 12px 5px 0;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}
thead th{color:var(--muted);font-weight:600;border-bottom:1px solid var(--line);vertical-align:bottom;
white-space:normal;min-width:3.2em}
th.name,td.name{text-align:left}
tbody th{font-weight:500}
tr.chosen th,tr.chosen td{font-weight:650}
tr.paper th,tr.paper td{color:var(--muted)}
.facts th{color:var(--muted);font-weight:500;vertical-align:top}
.facts td{white-space:normal;text-align:left;overflow-wrap:anywhere}
.files td{white-space:normal}.files th.name,.files td:nth-child(2){white-space:nowrap}
.files th,.files td{vertical-align:top}
.files td:nth-child(3),.files td:nth-child(4){min-width:13em}.files td:nth-child(5){min-width:22em}
.small{color:var(--muted);font-size:12.5px}
details{margin-top:8px;font-size:13.5px}
summary{cursor:pointer;color:var(--link)}
footer{border-top:1px solid var(--line);margin-top:44px;padding-top:16px;padding-bottom:44px;color:var(--muted);
font-size:13px}
svg text{font-family:inherit;fill:var(--ink);font-size:12px}
svg .tick{fill:var(--muted);font-size:11.5px}
svg .label{fill:var(--muted);font-size:12px}
svg .heading{font-size:13px;font-weight:600}
svg .note{font-size:11.5px}
svg .end{text-anchor:end}svg .middle{text-anchor:middle}svg .start{text-anchor:start}
svg .grid{stroke:var(--grid);stroke-width:1}
svg .axis{fill:none;stroke:var(--line);stroke-width:1}
svg .line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
svg .dashed{stroke-width:1.5;stroke-dasharray:5 4}
.ink{--c:var(--ink)}
svg .reach{fill:none;stroke:var(--c);stroke-width:1.2;opacity:.75}
svg .mark{fill:var(--c);stroke:var(--bg);stroke-width:1}
svg .bar{fill:var(--c)}
svg .band{fill:var(--c);opacity:.13}
svg .ring{fill:none;stroke:var(--ink);stroke-width:1.6}
svg .cell{shape-rendering:crispEdges}
svg .frame{fill:none;stroke:#ff8a3c;stroke-width:2}
svg .role-dense{fill:var(--role-dense)}svg .role-anchor{fill:var(--role-anchor)}
svg .role-reuse{fill:var(--role-reuse)}svg .role-none{fill:var(--role-none)}
svg .moved{fill:var(--moved)}svg .same{fill:var(--same)}
svg .arc{fill:none;stroke:var(--role-anchor);stroke-width:1.5;opacity:.7}
svg .on-role{fill:#fff;font-weight:600;font-size:11.5px}
.box.role-dense{background:var(--role-dense)}.box.role-anchor{background:var(--role-anchor)}
.box.role-reuse{background:var(--role-reuse)}.box.role-none{background:var(--role-none)}
.box.moved{background:var(--moved)}.box.same{background:var(--same)}
@media (max-width:640px){main,header,footer{padding-left:14px;padding-right:14px}h1{font-size:22px}
.tiles{grid-template-columns:repeat(2,1fr)}
.wide svg.plot{min-width:500px}.wide svg.broad{min-width:700px}.panels svg.plot{flex-basis:100%}}
@media print{body{font-size:11pt}section,figure,table,svg{break-inside:avoid}section{margin-top:22px}nav{display:none}
details::details-content{content-visibility:visible;block-size:auto}main,header,footer{max-width:none;padding:0}
.scroll,.wide{overflow:visible}h2,h3{break-after:avoid}}
"""
