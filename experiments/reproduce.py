"""A PNG of ours made again from the record in it, and the largest difference of a pixel.

    python experiments/reproduce.py runs/demo/0123456789ab/images/vanilla/seed0.png
    python experiments/reproduce.py picture.png --model /path/to/sdxl --save again.png

Images, grids, control images and figures carry such a record; so do the images inside an evaluation's page, saved
from it. Exit codes, as of all scripts (docs/tracking.md): 0 made, whatever the difference; 2 no record in it that
can be followed; 3 weights that are missing.
"""

import argparse
from pathlib import Path

from segresearch.cli import one_line_errors


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes a PNG again from the record in it, and compares the two.")
    parser.add_argument("image", type=Path)
    parser.add_argument("--model", help="the model, where it is not in the recorded place")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--save", type=Path, metavar="PNG", help="write the new image to this file")
    parser.add_argument("--out", type=Path, help="where runs lie: a figure is taken from its run, if that is there")
    parser.add_argument(
        "--trust", action="store_true", help="open the files and call the functions that the record names"
    )
    args = parser.parse_args()

    from segresearch.reproduce import recorded, reproduce

    with one_line_errors():
        record = recorded(args.image)  # a slip shows before anything heavy is imported
        reproduction = reproduce(args.image, args.model, args.device, args.out, args.trust)
        if args.save is not None:
            from segresearch.records import save_png

            save_png(reproduction.image, args.save, record)
    print(reproduction)


if __name__ == "__main__":
    main()
