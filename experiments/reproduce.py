"""A PNG of ours made again from the record in it, and the largest difference of a pixel.

    python experiments/reproduce.py runs/demo/0123456789ab/images/vanilla/seed0.png
    python experiments/reproduce.py picture.png --model /path/to/sdxl --save again.png

Images, grids, control images and figures carry such a record; so do the images inside an evaluation's page, saved
from it. Exit codes, as of all scripts (docs/tracking.md): 0 made, whatever the difference; 2 no record in it that
can be followed; 3 weights that are missing.
"""

from segresearch.commands import reproduce as main

if __name__ == "__main__":
    main()
