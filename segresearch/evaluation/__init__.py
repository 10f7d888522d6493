"""An evaluation: methods of guidance on the same noise and prompts, measured, as tables, plots and a page.

`evaluate` runs it: `spec` expands the config, `sample_shards` writes `shards` of images and of their `image_metrics`,
`aggregate` makes them a `frame` of numbers, `outputs` writes it beside the `paper_numbers`, with `plots` and a page.
`compare_runs` puts finished runs in one table.
"""
