"""Credits for the photos of a search result: search ... --json | credits.py CAPTIONS.json PICTURE.

CAPTIONS.json names the licences; PICTURE shows the photos.
"""

import json
import os
import sys
from pathlib import Path


def main() -> None:
    entries = {entry["file_name"]: entry for entry in json.loads(Path(sys.argv[1]).read_text("utf-8"))}
    print(f"\nThe photos in `{sys.argv[2]}`, by rank. All are from Flickr, by way of COCO, and were made smaller.\n")
    print("| rank | photo | licence |\n| --- | --- | --- |")
    for line in sys.stdin:
        hit = json.loads(line)
        entry = entries[os.path.basename(hit["path"])]
        print(f"| {hit['rank']} | <{entry['flickr_url']}> | [{entry['license']}]({entry['license_url']}) |")


if __name__ == "__main__":
    main()
