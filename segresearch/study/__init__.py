"""Settings of guidance measured on the same pictures: shards of a run, judges of pictures, tables and pages.

evaluate   the run: make what is missing, verify, reduce
workers    which part of the work is this process's (torchrun, Slurm)
shards     folders of arrays that are there whole or not at all
judges     what is measured of each picture, and by which networks
making     sampling of the ranges that are missing
reference  features of real pictures
reduce     from shards to one row of numbers a setting
paper      the figures of arXiv 2408.00760
table      rows as markdown, csv, LaTeX and metrics.jsonl
figure, page   what is drawn; the page that holds it
"""
