"""An evaluation: methods of guidance on the same noise and prompts, measured, as tables, plots and a page.

evaluate         the run: sample what is missing, verify, aggregate
spec             a config expanded into methods, prompts and ranges of images; the files of their shards
shards           files of arrays that are there whole or not at all
sample_shards    sampling and measuring of the shards that are missing, by one worker or many
image_metrics    what is measured of each image, and by which networks
reference        features of real images
aggregate        from shards to the frame
frame            the numbers: one tidy frame of (method, metric, value, error); what each metric is
table            frames as a table
paper_numbers    the numbers of arXiv 2408.00760
plots, page      what is drawn; the page that holds it, and images with their records
compare_runs     runs of an experiment in one table
"""
