"""An evaluation: methods of guidance on the same noise and prompts, measured, as tables, plots and a page.

evaluate         the run: make what is missing, verify, reduce
spec             a config to methods, prompts and ranges of images; where shards of them lie
workers          which part of the work is this process's (torchrun, Slurm)
shards           folders of arrays that are there whole or not at all
sample_shards    sampling of the ranges that are missing
image_metrics    what is measured of each image, and by which networks
reference        features of real images
aggregate        from shards to one row of numbers a method
table            rows as markdown, CSV, LaTeX and metrics.jsonl
paper_numbers    the numbers of arXiv 2408.00760
plots, page      what is drawn; the page that holds it
provenance       the record that an image carries
compare_runs     runs of an experiment in one table
wandb_log        an evaluation in Weights & Biases
"""
