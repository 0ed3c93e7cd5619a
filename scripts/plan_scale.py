"""What a library of some size takes, reckoned from what was measured: the tables of docs/scale.md.

    scripts/plan_scale.py [--images 10e6 100e6 5e9] [--gpu-images-per-second 1500] [--price-core-hour 0.045] ...

Rates and sizes are those that bench_ingest.py, bench_decode.py and bench_scale.py printed on two cores of an AMD
EPYC; the rate of a GPU is one that was published for another program, and prices are assumptions. All can be given.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields

SECONDS_AN_HOUR = 3600
LISTED_PER_REQUEST = 1000  # S3's ListObjectsV2


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one thing does in a second, takes in bytes, or costs in dollars."""

    small_per_core_s: float = 26.5  # CLIP ViT-B/32 in int8, photos of 500 x 375, all stages: 53.1 on two cores
    large_per_core_s: float = 13.2  # the same at 12 megapixels: 26.4
    small_decoded_per_core_s: float = 310.0
    large_decoded_per_core_s: float = 27.2
    gpu_images_per_second: float = 1500.0  # published by clip-retrieval for an RTX 3080
    vector_bytes: float = 2056.0  # float32 x 512, and its id
    row_bytes: float = 232.0
    code_bytes: float = 147.0
    price_core_hour: float = 0.045
    price_gpu_hour: float = 1.0
    price_gb_month: float = 0.08
    price_thousand_gets: float = 0.0004
    price_thousand_lists: float = 0.005
    gets_per_second: float = 5500.0  # that S3 promises for one partitioned prefix

    def rows(self, images: float) -> list[tuple[str, str]]:
        """What is said of a library of so many photos: name and value."""
        small, large = (images / rate / SECONDS_AN_HOUR for rate in (self.small_per_core_s, self.large_per_core_s))
        gpu_hours = images / self.gpu_images_per_second / SECONDS_AN_HOUR
        cores = self.gpu_images_per_second / self.small_decoded_per_core_s
        large_cores = self.gpu_images_per_second / self.large_decoded_per_core_s
        disk = images * (self.vector_bytes + self.row_bytes + self.code_bytes)
        gets = images / 1000 * self.price_thousand_gets
        lists = images / LISTED_PER_REQUEST / 1000 * self.price_thousand_lists
        on_gpus = gpu_hours * (self.price_gpu_hour + cores * self.price_core_hour)
        return [
            (
                "embedding on CPUs, small photos",
                f"{_number(small)} core hours, ${_number(small * self.price_core_hour)}",
            ),
            (
                "embedding on CPUs, 12 megapixels",
                f"{_number(large)} core hours, ${_number(large * self.price_core_hour)}",
            ),
            ("embedding on GPUs, small photos", f"{_number(gpu_hours)} GPU hours, ${_number(on_gpus)}"),
            ("cores that feed one GPU", f"{cores:.0f} (small), {large_cores:.0f} (12 megapixels)"),
            ("vectors on disk", _size(images * self.vector_bytes)),
            ("tables on disk", _size(images * self.row_bytes)),
            ("codes, held in memory", _size(images * self.code_bytes)),
            ("disk, a month", f"${_number(disk / 1e9 * self.price_gb_month)}"),
            ("reading from S3", f"${_number(gets + lists)}, {_duration(images / self.gets_per_second)} at one prefix"),
        ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=float, nargs="+", default=[10e6, 100e6, 5e9])
    names = [field.name for field in fields(Rates)]
    for field in fields(Rates):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=float, default=field.default)
    options = vars(parser.parse_args(arguments))
    print("\n".join(table(options["images"], Rates(**{name: options[name] for name in names}))))


def table(sizes: Sequence[float], rates: Rates) -> list[str]:
    """In Markdown, a column a size."""
    columns = [dict(rates.rows(size)) for size in sizes]
    head = ["", *(_images(size) for size in sizes)]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _images(number: float) -> str:
    return f"{number / 1e9:g} B" if number >= 1e9 else f"{number / 1e6:g} M"


def _number(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _size(number: float) -> str:
    return f"{number / 1e12:.1f} TB" if number >= 1e12 else f"{number / 1e9:.1f} GB"


def _duration(seconds: float) -> str:
    hours = seconds / SECONDS_AN_HOUR
    return f"{hours / 24:.0f} days" if hours >= 72 else f"{hours:.1f} hours"


if __name__ == "__main__":
    main()
