"""generate.py on the device, in processes of its own: the demo, and pictures under a ControlNet beside the CPU's."""

import numpy as np
from gpu_models import DEVICE, apart, few, gpu, note, run_of, script
from PIL import Image

pytestmark = gpu


def test_the_demo(tmp_path):
    said = script("generate", tmp_path, "experiment=demo", f"device={DEVICE}", *few("steps=1"))
    folder = run_of(tmp_path, "demo")
    made = sorted((folder / "images").rglob("*.png"))
    assert len(made) == 80 and f"{len(made)} images sampled" in said
    assert (folder / "grid.png").is_file() and all(np.asarray(Image.open(p)).std() > 1 for p in made)
    again = script("generate", tmp_path, "experiment=demo", f"device={DEVICE}", *few("steps=1"))
    assert f"all {len(made)} images exist already" in again


def test_under_a_controlnet_the_device_gives_the_pictures_of_the_cpu(tmp_path):
    given = ("controlnet=canny", "guidance=seg_cfg", "prompts=[a red ring]", "seeds=0-1", "steps=4")
    pictures = {}
    for place, device in (("here", "cpu"), ("there", DEVICE)):
        script("generate", tmp_path, *given, f"device={device}", f"out={tmp_path / place}", "compute.precision=exact")
        paths = sorted((tmp_path / place / "generate").rglob("seed*.png"))
        pictures[place] = np.stack([np.asarray(Image.open(p).convert("RGB")) for p in paths])
    assert len(pictures["here"]) == 4  # two pictures, two control images
    largest = apart(pictures["here"], pictures["there"])
    note("CPU against device, of 255: generate.py controlnet=canny", largest)
    assert largest <= 1
