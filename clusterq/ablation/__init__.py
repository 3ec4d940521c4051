"""Tables of settings, run with seeds: what `clusterq ablate` does.

`table` reads and checks the file, `cells` makes one number, `pool` shares the work among processes, `results` gathers
and draws, `page` writes Markdown from gathered results.
"""
