"""How fast and how exact CLIP is here, beside transformers, ONNX Runtime and OpenVINO with the same weights.

    scripts/bench_encode.py [FOLDER_OF_PHOTOS] [--weights model.safetensors] [--openvino] [--rounds 7] [--json FILE]

Without --weights the network is ViT-B/32 with random weights, judged twice: plain, and with outliers, a few channels
scaled up 10 to 20 times as in trained CLIPs, the hard case for int8. Embeddings of random weights have much in common,
so cosines are taken after subtracting the mean embedding of transformers' fp32 from both sides.

All take turns in every round, on texts that none has seen before; ratios are taken within a round, then medians. Peers
get their input ready made (normalised floats, padded tokens); ours starts from crops and strings. The fraction of the
GEMM limit counts the operations of the whole network, done or saved. Needs the extra `bench`.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import cpu_name
from torch import nn
from transformers import CLIPConfig, CLIPModel

from searchengine.decode import decode_file
from searchengine.formats import EXTENSIONS
from searchengine.models.clip.encoder import ClipEncoder
from searchengine.models.clip.tokenizer import ClipTokenizer

ROOT = Path(__file__).parent.parent
REFERENCE = "transformers fp32"
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NOUNS = (
    "dog cat horse bird fish tree car boat train plane house chair table lamp clock cup spoon knife apple pear".split()
)
JUDGED, CAPTIONS = 100, 128  # photos that embeddings are compared on, and as many others to calibrate with; texts
GEMM_SIZES = ((400, 768, 3072), (2048, 2048, 2048))  # m, k, n
REST_S = 0.03  # for the threads of the one before, which wait for work in a loop, to fall asleep

# By the name of the contender, which ends with the precision, then by "images" and "texts".
Contenders = dict[str, dict[str, Callable[[Any], np.ndarray]]]


@dataclass
class Job:
    """`flops` is of one of its `items`; seconds and limits (operations a second, by precision) are of each round."""

    title: str
    items: int
    flops: float
    seconds: dict[str, list[float]] = field(default_factory=dict)
    limits: dict[str, list[float]] = field(default_factory=dict)

    def speedup(self, name: str, other: str) -> float:
        return statistics.median(b / a for a, b in zip(self.seconds[name], self.seconds[other], strict=True))

    def of_limit(self, name: str) -> float:
        work = self.items * self.flops
        limits = self.limits[name.split()[-1]]
        return statistics.median(work / s / limit for s, limit in zip(self.seconds[name], limits, strict=True))

    def fastest_peer(self, precision: str) -> str:
        peers = [name for name in self.seconds if name.endswith(precision) and not name.startswith("ours")]
        return min(peers, key=lambda name: statistics.median(self.seconds[name]))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    photos = ROOT.parent / "shared/data/flickr8k_dev/images"
    arguments.add_argument("folder", type=Path, nargs="?", default=photos, help="200 photos or more")
    arguments.add_argument("--weights", type=Path, help="a model.safetensors of transformers, config.json beside it")
    arguments.add_argument("--rounds", type=int, default=7, choices=range(1, len(NOUNS)), metavar="1..19")
    arguments.add_argument("--precisions", nargs="+", default=["fp32", "int8"], help="of ours")
    arguments.add_argument("--openvino", action="store_true", help="fp32 and int8 (nncf, SmoothQuant, calibrated)")
    arguments.add_argument("--quick", action="store_true", help="a test of this script: few rounds, batch 8 alone")
    arguments.add_argument("--json", type=Path, help="write the figures there")
    options = arguments.parse_args()
    packages = ["torch", "transformers", "onnxruntime", *(["openvino", "nncf"] if options.openvino else [])]
    hardware = f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
    hardware += ", ".join(f"{name} {version(name)}" for name in packages)
    print(hardware)
    files = sorted(f for f in options.folder.iterdir() if f.suffix.lower() in EXTENSIONS)[: 2 * JUDGED]
    crops = np.stack([decode_file(file, image_size=224) for file in files])
    rounds, batches = (2, [8]) if options.quick else (options.rounds, [1, 8, 32])
    cosines, jobs = {}, []
    for case in ["given"] if options.weights else ["plain", "outliers"]:
        print(f"{case} weights")
        with tempfile.TemporaryDirectory() as folder:
            model = CLIPModel.from_pretrained(options.weights.parent) if options.weights else random_clip(case)
            model.eval().save_pretrained(folder)
            contenders = peers(model, Path(folder), crops, openvino=options.openvino)
            contenders |= ours(Path(folder, "model.safetensors"), options.precisions)
            cosines[case] = compare(contenders, crops[:JUDGED])
            if not jobs:  # the values of the weights make no difference to speed
                jobs = [interleave(contenders, *task, rounds) for task in tasks(model, crops, batches)]
        del contenders
        gc.collect()
    print("goals")
    met = [{"goal": goal, "found": found, "met": enough} for goal, found, enough in goals(jobs, cosines)]
    for goal in met:
        print(f"  {'met' if goal['met'] else 'NOT MET':8s} {goal['found']:<10.4g} {goal['goal']}")
    if options.json:
        results = {"hardware": hardware, "cosines": cosines, "jobs": [asdict(job) for job in jobs], "goals": met}
        options.json.write_text(json.dumps(results, indent=1))


def random_clip(case: str) -> CLIPModel:
    """ViT-B/32 of transformers' initialisation with sharper attention, else all tokens would be mixed evenly."""
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig())
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.data *= 5
        elif name.endswith(".bias"):
            parameter.data = 0.02 * torch.randn(parameter.shape)
    if case == "outliers":
        for name, norm in model.named_modules():
            # The first norm of the image tower makes channels that stay large to its end; the others, of each block's.
            if isinstance(norm, nn.LayerNorm) and not name.endswith(("post_layernorm", "final_layer_norm")):
                norm.weight.data[torch.randperm(len(norm.weight))[:4]] *= 10 + 10 * torch.rand(4)
    return model


def ours(file: Path, precisions: list[str]) -> Contenders:
    encoders = {p: ClipEncoder(name="random", weights_file=file, device="cpu", precision=p) for p in precisions}
    return {f"ours {p}": {"images": e.encode_pixels, "texts": e.encode_texts} for p, e in encoders.items()}


class Side(nn.Module):
    """One tower of transformers' with its projection, as a network that can be exported."""

    def __init__(self, model: CLIPModel, side: str) -> None:
        super().__init__()
        self.model, self.side = model, side

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        encode = self.model.get_image_features if self.side == "images" else self.model.get_text_features
        return encode(x).pooler_output


def peers(model: CLIPModel, folder: Path, crops: np.ndarray, *, openvino: bool) -> Contenders:
    import onnx
    from onnxruntime import InferenceSession
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    contenders: Contenders = {REFERENCE: {}, "transformers, padding=longest, fp32": {}}
    for side, example in (("images", normalised(crops[:2])), ("texts", tokenised(NOUNS[:2]))):
        tower = Side(model, side)
        run = torch.inference_mode()(tower.forward)
        contenders[REFERENCE][side] = lambda x, run=run: run(x).numpy()
        path, options = str(folder / f"{side} fp32.onnx"), {"external_data": False, "verbose": False}
        torch.onnx.export(tower, (example,), path, dynamo=True, dynamic_shapes=({0: "n"},), **options)
        quant_pre_process(path, path + " prepared", skip_symbolic_shape=True)
        graph = onnx.load(path + " prepared")
        del graph.graph.value_info[:]  # the optimiser leaves shapes of weights that it has transposed
        quantize_dynamic(graph, folder / f"{side} int8.onnx", per_channel=True, op_types_to_quantize=["MatMul", "Gemm"])
        for precision in ("fp32", "int8"):
            session = InferenceSession(str(folder / f"{side} {precision}.onnx"), providers=["CPUExecutionProvider"])
            encode = lambda x, session=session: session.run(None, {"x": x.numpy()})[0]  # noqa: E731
            contenders.setdefault(f"onnxruntime {precision}", {})[side] = encode
    # The loop has ended with texts. Attention is causal, so the result is exact without the rest of the padding.
    contenders["transformers, padding=longest, fp32"]["texts"] = lambda x: run(x[:, : x.argmax(1).max() + 1]).numpy()
    if openvino:
        import nncf
        import openvino as ov

        network = ov.convert_model(folder / "images fp32.onnx")
        photos = nncf.Dataset([x[None].numpy() for x in normalised(crops[JUDGED:])])
        quantised = nncf.quantize(network, photos, model_type=nncf.ModelType.TRANSFORMER, subset_size=JUDGED)
        for precision, graph in (("fp32", network), ("int8", quantised)):
            hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
            compiled = ov.Core().compile_model(graph, "CPU", hints)
            contenders[f"openvino {precision}"] = {"images": lambda x, run=compiled: run(x.numpy())[0].copy()}
    return contenders


def normalised(crops: np.ndarray) -> torch.Tensor:
    """uint8 (n, 224, 224, 3) -> float32 (n, 3, 224, 224)"""
    x = (torch.from_numpy(crops).float() / 255 - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    return x.permute(0, 3, 1, 2).contiguous()


def tokenised(texts: list[str]) -> torch.Tensor:
    """int64 (n, 77), zeros after EOT"""
    tokenizer = ClipTokenizer.load()
    rows = [torch.tensor(tokenizer.encode(text)) for text in texts]
    return torch.stack([nn.functional.pad(row, (0, 77 - len(row))) for row in rows])


def prepared(name: str, side: str, inputs: Any) -> Any:
    """Raw for ours, made ready for peers."""
    if name.startswith("ours"):
        return inputs
    return normalised(inputs) if side == "images" else tokenised(inputs)


def compare(contenders: Contenders, crops: np.ndarray) -> dict[str, dict[str, list[float]]]:
    """By side and contender: cosine to the reference, centred, mean and least, and the largest difference."""
    found: dict[str, dict[str, list[float]]] = {}
    for side, inputs in (("images", crops), ("texts", captions(0)[:JUDGED])):
        rows = {name: sides[side](prepared(name, side, inputs)) for name, sides in contenders.items() if side in sides}
        rows = {name: x / np.linalg.norm(x, axis=1, keepdims=True) for name, x in rows.items()}
        mean = rows[REFERENCE].mean(0)
        print(
            f"  {side}, n = {len(inputs)}: centred cosine to {REFERENCE}, mean, least; difference of unit rows, largest"
        )
        found[side] = {}
        for name, got in rows.items():
            a, b = rows[REFERENCE] - mean, got - mean
            cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
            found[side][name] = [float(x) for x in (cosines.mean(), cosines.min(), np.abs(a - b).max())]
            print("    {:36s} {:.5f} {:.5f} {:.1e}".format(name, *found[side][name]))
    return found


def tasks(model: CLIPModel, crops: np.ndarray, batches: list[int]) -> Iterator[tuple[Job, str, Callable[[int], Any]]]:
    """Jobs, whether of images or of texts, and their inputs in a round."""
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    ends = 2 * vision.hidden_size * (3 * vision.patch_size**2 * patches + model.config.projection_dim)
    for n in batches:
        job = Job(f"images, batch {n}", n, transformer_flops(vision, patches + 1) + ends)
        yield job, "images", lambda round_, n=n: crops[round_ : round_ + n]
    flops = transformer_flops(model.config.text_config, 77)
    templates = (ROOT / "config/templates/imagenet.txt").read_text().splitlines()
    yield Job("one short prompt", 1, flops), "texts", lambda round_: [f"a photo of a {NOUNS[round_]}"]
    ensemble = Job(f"{len(templates)} prompts of a class", len(templates), flops)
    yield ensemble, "texts", lambda round_: [template.format(NOUNS[round_]) for template in templates]
    yield Job(f"{CAPTIONS} captions", CAPTIONS, flops), "texts", lambda round_: captions(1 + round_)


def transformer_flops(config: Any, tokens: int) -> float:
    width = config.hidden_size
    return 4.0 * config.num_hidden_layers * tokens * width * (2 * width + config.intermediate_size + tokens)


def captions(seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["a " + " and a ".join(rng.choice(NOUNS, rng.integers(3, 9))) + f" near {i}" for i in range(CAPTIONS)]


def interleave(contenders: Contenders, job: Job, side: str, inputs: Callable[[int], Any], rounds: int) -> Job:
    """All contenders in turn, then the GEMM limits; the first round does not count."""
    for round_ in range(rounds + 1):
        seconds = {
            name: timed(partial(sides[side], prepared(name, side, inputs(round_))))
            for name, sides in contenders.items() if side in sides
        }  # fmt: skip
        limits: dict[str, float] = {}
        for precision, flops, run in gemms():
            limits[precision] = max(limits.get(precision, 0), *(flops / timed(run) for _ in range(3)))
        for kept, values in ((job.seconds, seconds), (job.limits, limits)) if round_ else ():
            for name, value in values.items():
                kept.setdefault(name, []).append(value)
    found = {precision: statistics.median(limits) for precision, limits in job.limits.items()}
    limits_said = (f"{name} {limit / 1e9:.0f} GFLOPS = {limit / job.flops:.1f}/s" for name, limit in found.items())
    print(f"  {job.title}; rounds {rounds}; GEMM limit {', '.join(limits_said)}")
    for name, of_rounds in job.seconds.items():
        median = statistics.median(of_rounds)
        print(f"    {name:36s} {1000 * median:8.1f} ms {job.items / median:8.1f}/s   "
              f"x {job.speedup(name, REFERENCE):5.2f}   {job.of_limit(name):.2f} of the limit")  # fmt: skip
    return job


def gemms() -> Iterator[tuple[str, float, Callable[[], object]]]:
    """Precision, operations, and what does them: the ways that are known of multiplying two matrices."""
    ops, plain = torch.ops, ("none", [], "")
    for m, k, n in GEMM_SIZES:
        a, b, flops = torch.randn(m, k), torch.randn(n, k), 2.0 * m * k * n
        packed = ops.mkldnn._reorder_linear_weight(b, None)
        yield "fp32", flops, lambda a=a, b=b: a @ b.T
        yield "fp32", flops, lambda a=a.numpy(), b=b.numpy(): a @ b.T
        yield "fp32", flops, lambda a=a, b=packed: ops.mkldnn._linear_pointwise(a, b, None, *plain)
        packed = ops.mkldnn._reorder_linear_weight(b.bfloat16(), None)
        yield "bf16", flops, lambda a=a.bfloat16(), b=packed: ops.mkldnn._linear_pointwise(a, b, None, *plain)
        a8, b8 = torch.randint(0, 127, (m, k), dtype=torch.uint8), torch.randint(-127, 127, (n, k), dtype=torch.int8)
        yield "int8", flops, lambda a=a8.to(torch.int8), b=b8: torch._int_mm(a, b.T)
        right = ops.onednn.qlinear_prepack(b8, None), torch.ones(n), torch.zeros(n, dtype=torch.int32), None
        as_float = 1.0, 0, torch.float32
        yield "int8", flops, lambda a=a8, b=right, o=as_float: ops.onednn.qlinear_pointwise(a, 1.0, 0, *b, *o, *plain)


def timed(run: Callable[[], object]) -> float:
    time.sleep(REST_S)
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def goals(jobs: list[Job], cosines: dict[str, Any]) -> Iterator[tuple[str, float, bool]]:
    """What is wanted, what was found, whether that is enough."""
    photos, prompt, ensemble = (next(j for j in jobs if t in j.title) for t in ("batch 8", "one short", "prompts of"))

    def at_least(wanted: float, found: float, what: str) -> tuple[str, float, bool]:
        return f"at least {wanted}: {what}", found, found >= wanted

    for name in sorted({"ours fp32", "ours int8"} & photos.seconds.keys()):
        exact, peer = name == "ours fp32", photos.fastest_peer(name.split()[-1])
        yield at_least(1, photos.speedup(name, peer), f"{name}, photos, times as fast as {peer}")
        yield at_least(
            2.5 if exact else 5, prompt.speedup(name, REFERENCE), f"{name}, prompt, times as fast as 77 tokens"
        )
        if exact:
            yield at_least(0.8, photos.of_limit(name), f"{name}, photos, of the GEMM limit")
            yield at_least(8, ensemble.speedup(name, REFERENCE), f"{name}, 80 prompts, times as fast as 77 tokens")
        else:
            yield at_least(2.8, photos.speedup(name, REFERENCE), f"{name}, photos, times as fast as {REFERENCE}")
        for weights, sides in cosines.items():
            for side, found in sides.items():
                mean, _, difference = found[name]
                if exact:
                    yield f"at most 1e-5: {name}, {side}, {weights} weights, difference", difference, difference <= 1e-5
                else:
                    yield at_least(0.998, mean, f"{name}, {side}, {weights} weights, centred cosine")


if __name__ == "__main__":
    main()
