"""Copy the photographs that scikit-image and scikit-learn ship into a folder: sample_photos.py FOLDER."""

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

# The rest of what they ship are textures, diagrams and microscope pictures.
PHOTOGRAPHS = {
    "skimage": (
        "astronaut.png camera.png chelsea.png clock_motion.png coffee.png coins.png grass.png gravel.png brick.png "
        "hubble_deep_field.jpg moon.png motorcycle_left.png motorcycle_right.png page.png retina.jpg rocket.jpg"
    ).split(),
    "sklearn": ["china.jpg", "flower.jpg"],
}
FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}


def copy_photographs(destination: Path) -> None:
    """Into a folder that appears only when it is complete."""
    partial = destination.with_name(destination.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    for package, names in PHOTOGRAPHS.items():
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            sys.exit(f"the package {package} is not installed; run: pip install scikit-image scikit-learn")
        for name in names:
            shutil.copyfile(Path(spec.submodule_search_locations[0], FOLDERS[package], name), partial / name)
    partial.rename(destination)


if __name__ == "__main__":
    copy_photographs(Path(sys.argv[1]))
