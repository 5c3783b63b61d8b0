"""Style sheet of a study's page, on top of `tokenmdp.report.page.STYLE`."""

STUDY_STYLE = """
:root { --no: #a63c00; }
@media (prefers-color-scheme: dark) { :root:not([data-theme=light]) { --no: #ff9a66; } }
:root[data-theme=dark] { --no: #ff9a66; }
html { scroll-behavior: smooth; }
body { line-height: 1.6; }
main { display: block; }
section { display: block; margin: 0 0 2.8rem; }
p { max-width: 46rem; }
.notice { border: 2px solid var(--no); border-radius: .4rem; padding: .2rem 1rem; margin: 0 0 1.5rem; }
.note { max-width: none; }
h2 { font-size: 1.25rem; margin: 2rem 0 .3rem; } h3 { font-size: 1rem; margin: .4rem 0 0; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .9rem; margin: .8rem 0; }
a { color: inherit; text-underline-offset: .2em; text-decoration-color: var(--faint); }
.scroll { overflow-x: auto; }
figure { margin: .8rem 0 1.2rem; }
figure svg { display: block; width: 100%; min-width: 44rem; height: auto; }
figure svg text { font-family: system-ui, sans-serif !important; }
figcaption { color: var(--faint); font-size: .85rem; max-width: 56rem; }
table { border-collapse: collapse; font-size: .85rem; line-height: 1.4; width: 100%;
        font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .45rem .7rem .45rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } thead th { color: var(--faint); font-weight: 500; vertical-align: bottom; }
td small { display: block; color: var(--faint); }
.errors td:last-child { width: 50%; }
.numbers { min-width: 62rem; } .numbers td, .numbers thead th + th { text-align: right; }
.rates { width: auto; margin-bottom: 1rem; } .rates th, .rates td { padding-right: 1.6rem; }
.numbers thead th { max-width: 7rem; }
.numbers small { white-space: nowrap; font-size: .75rem; }
.group th { padding-top: 1rem; color: var(--faint); font-weight: 500; }
details { font-size: .85rem; margin: .5rem 0; color: var(--faint); } details table { color: var(--ink); }
summary { cursor: pointer; } summary:hover { color: var(--ink); }
pre { overflow-x: auto; font-size: .82rem; line-height: 1.5; color: var(--ink); border: 1px solid var(--line);
      border-radius: .4rem; padding: .6rem .8rem; }
code { font-size: .82rem; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; font-size: .9rem; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem 2rem; }
.columns .legend { margin: 0 0 .3rem; } .columns .bar { width: 6rem; }
@media (max-width: 40rem) { body { padding: 1rem; } }
@media print { button, nav { display: none; } }
"""
