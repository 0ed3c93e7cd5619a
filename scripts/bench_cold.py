"""How long a text query takes from the command line, process start to exit.

    scripts/bench_cold.py FOLDER_OF_PHOTOS [--rounds 7] [--photos 40] [--peer PYTHON]

Against the usual script with transformers (CLIPModel, CLIPProcessor, a product in numpy), run by the interpreter
--peer, and against the bare imports that a search cannot do without. All take turns, so the ratios hold on a noisy
machine; all files are in the system's cache. CLIP ViT-B/32 has random weights in the form of OpenAI's archive, half
precision but for the table of tokens; the peer's are random too, in float32, as they are published for transformers.
Prints the hardware and medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from hardware import cpu_name

from searchengine.formats import EXTENSIONS
from searchengine.models.clip.architecture import VIT_B_32, Shape
from searchengine.models.clip.names import OPENAI
from searchengine.models.clip.tokenizer import EOT, SOT, ClipTokenizer
from searchengine.models.hashes import SETTLED_NS

QUERY = "a man riding a wave"
BARE = "import numpy, faiss, sqlalchemy, click"
MAKE_PEER = """
import sys
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast
folder = sys.argv[1]
config = CLIPConfig()  # ViT-B/32
config.text_config.eos_token_id = 49407
CLIPModel(config).save_pretrained(folder)
tokenizer = CLIPTokenizerFast(f"{folder}/vocab.json", f"{folder}/merges.txt")
CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(folder)
"""
ASK_PEER = """
import sys
import numpy as np
import torch
from transformers import CLIPModel, CLIPProcessor
folder, query = sys.argv[1:]
model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
with torch.no_grad():
    features = model.get_text_features(**processor(text=[query], return_tensors="pt", padding=True))
features = getattr(features, "pooler_output", features)  # transformers 5 returns an object
text = (features / features.norm(dim=-1, keepdim=True)).numpy()[0]
scores = np.load(f"{folder}/vectors.npy") @ text
for row in np.argsort(-scores)[:10]:
    print(row, scores[row])
"""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--photos", type=int, default=40)
    arguments.add_argument("--peer", help="A Python that has torch and transformers.")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = os.environ | {
            "SEARCHENGINE_MODELS": str(folder / "models"),
            "SEARCHENGINE_WARM": "off",
            "HF_HUB_OFFLINE": "1",
        }
        commands = {"bare imports": [sys.executable, "-c", BARE], **ours(folder, options, environment)}
        if options.peer is None:
            print("no --peer was given: nothing is said about transformers")
        else:
            commands["transformers"] = peer(options.peer, folder / "peer", environment, count=options.photos)
        time.sleep(SETTLED_NS / 1e9)  # younger weights are hashed anew each time
        seconds = measure(commands, environment, rounds=options.rounds)
    print(f"{cpu_name()}, {os.cpu_count()} cores; {options.photos} photos, {options.rounds} rounds")
    for command, times in seconds.items():
        print(f"{command:12s} {statistics.median(times):6.2f} s   ({min(times):.2f} to {max(times):.2f})")
    for command in ("mini", "CLIP"):
        print(f"{command}: {ratio(seconds[command], seconds['bare imports']):.2f} x the bare imports")
        if "transformers" in seconds:
            print(f"{command}: {ratio(seconds['transformers'], seconds[command]):.1f} x faster than transformers")


def ours(folder: Path, options: argparse.Namespace, environment: dict[str, str]) -> dict[str, list[str]]:
    """An index by each encoder, and the command that searches it."""
    photos = folder / "photos"
    photos.mkdir()
    for file in sorted(f for f in options.folder.iterdir() if f.suffix.lower() in EXTENSIONS)[: options.photos]:
        (photos / file.name).write_bytes(file.read_bytes())
    archive = folder / "ViT-B-32.pt"
    write_archive(archive)
    commands = {}
    for name, model in (("mini", "mini"), ("CLIP", str(archive))):
        index, command = str(folder / f"{name}.index"), [sys.executable, "-m", "searchengine"]
        run([*command, "index", str(photos), "--index", index, "--model", model], environment)
        commands[name] = [*command, "search", QUERY, "--index", index]
    return commands


class QuickGELU(torch.nn.Module):
    """What tells OpenAI's activation in the code of an archive."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


def write_archive(path: Path) -> None:
    """CLIP ViT-B/32 as OpenAI publishes it: a TorchScript archive of 354 MB, but for the values."""
    network = torch.nn.Module()
    for name, shape in openai_shapes().items():
        *folders, last = name.split(".")
        module = network
        for part in folders:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        halved = len(shape) > 1 and last != "positional_embedding" and "token_embedding" not in name
        tensor = torch.randn(shape) / (shape[-1] ** 0.5 if len(shape) > 1 else 10)
        module.register_parameter(last, torch.nn.Parameter(tensor.half() if halved else tensor, requires_grad=False))
    network.add_module("activation", QuickGELU())
    torch.jit.script(network.eval()).save(str(path))


def openai_shapes() -> dict[str, Shape]:
    """Shapes by OpenAI's names."""
    found: dict[str, Shape] = {"logit_scale": ()}
    for names, blocks, shapes in (
        (OPENAI.image, OPENAI.image_blocks, VIT_B_32.image_shapes()),
        (OPENAI.text, OPENAI.text_blocks, VIT_B_32.text_shapes()),
    ):
        for name, shape in shapes.items():
            if name == "patches.weight":
                shape = (shape[0], 3, VIT_B_32.patch_size, VIT_B_32.patch_size)
            if name == "projection.weight":
                shape = shape[::-1]
            if name in names:
                found[names[name]] = shape
            else:
                _, number, part = name.split(".", 2)
                found[f"{blocks}{number}.{OPENAI.block[part][0]}"] = shape
    return found


def peer(python: str, folder: Path, environment: dict[str, str], *, count: int) -> list[str]:
    """A folder as transformers wants it, with vectors beside it, and the command that asks it."""
    folder.mkdir()
    tokenizer = ClipTokenizer.load()
    symbols = [tokenizer._symbol(token) for token in range(SOT)]
    vocabulary = {symbol: token for token, symbol in enumerate(symbols)}
    vocabulary |= {"<|startoftext|>": SOT, "<|endoftext|>": EOT}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(tokenizer._merges) + "\n", "utf-8")
    np.save(folder / "vectors.npy", np.random.default_rng(0).standard_normal((count, VIT_B_32.dim), np.float32))
    run([python, "-c", MAKE_PEER, str(folder)], environment)
    return [python, "-c", ASK_PEER, str(folder), QUERY]


def measure(commands: dict[str, list[str]], environment: dict[str, str], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each command in each round, after one that warms the system's cache."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for round_ in range(rounds + 1):
        for name, command in commands.items():
            started = time.perf_counter()
            run(command, environment)
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[:4]} failed:\n{done.stderr[-2000:]}")


def ratio(over: list[float], under: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


if __name__ == "__main__":
    main()
