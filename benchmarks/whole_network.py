"""Common parts of the measurements of whole networks: random Wan networks, synchronised times, the files of a run."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.accuracy import processor
from codmd import models
from codmd.distill.config.run_config import RunConfig, read_config
from codmd.distill.config.sections import ModelSettings
from codmd.distill.config.typed import ConfigError
from codmd.models.base import VideoDenoiser

RESULTS = Path("benchmarks/results")
PACKAGES = ("codmd", "torch", "triton", "diffusers")
TINY = {"config": "tiny", "frames": 3, "height": 4, "width": 6}
TOKENS, TINY_TOKENS = 512, 8
"""Text tokens of a prompt: Wan pads every prompt to 512."""


def pick_device(tiny: bool) -> torch.device:
    """The GPU; the CPU for `tiny`, and a way out for whoever has no GPU.

    Raises:
        SystemExit: there is no GPU, and the real size was asked for.
    """
    if tiny:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device is visible to torch; --tiny runs every line of it in a tiny size on the CPU")
    return torch.device("cuda", torch.cuda.current_device())


def wan_recipe(source: str, overrides: Sequence[str], tiny: bool, folder: Path) -> RunConfig:
    """A configuration of `codmd train` for a Wan, with random weights and random text in the place of files.

    Args:
        source, overrides: as `codmd train` takes them.
        tiny: the tiny network and latents, whatever the configuration says.
        folder: where the embedding of the empty prompt is written.

    Raises:
        SystemExit: naming what is wrong with the configuration.
    """
    try:
        config = read_config(source, overrides, complete=False)
        if config.model.name != "wan":
            raise ConfigError(f"{source}: configures a {config.model.name!r} model; expected a wan")
        model = config.model.changed({"weights": "random", **(TINY if tiny else {})}, "model")
        null = folder / "null.safetensors"
        save_file({"embedding": random_text(model, tiny)}, null)
        return dataclasses.replace(config, model=model.changed({"null_embedding": str(null)}, "model"))
    except (ConfigError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


def random_text(model: ModelSettings, tiny: bool) -> Tensor:
    """A prompt's embedding [1, tokens, text_dim], float32, on the CPU."""
    size = (1, TINY_TOKENS if tiny else TOKENS, model.options.network()["text_dim"])
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def build(model: ModelSettings, device: torch.device, **changes: Any) -> VideoDenoiser:
    """A network with random weights, made on its device; alike at every call."""
    torch.manual_seed(0)
    settings = model.changed(changes, "model")
    with device:
        return models.build(settings.name, **dataclasses.asdict(settings.options))


def forward_flops(model: ModelSettings, text: Tensor) -> int:
    """Floating-point operations of one forward pass of one sample, counted on fake tensors."""
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    with FakeTensorMode(), FlopCounterMode(display=False, custom_mapping=attention) as counter, torch.no_grad():
        network = build(model, torch.device("cpu"), attention="native", compile=False)
        network(torch.empty(1, *network.latent_shape), torch.empty(1), torch.empty(text.shape))
    return counter.get_total_flops()


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Of the two matrix products, from the shapes [B, heads, tokens, head_dim]."""
    batch, heads, tokens, dim = query
    return 2 * batch * heads * tokens * key[2] * (dim + value[3])


def synchronise(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Gives back the memory of what is no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def seconds(call: Callable[[], object], device: torch.device, repeats: int, warm_up: int = 1) -> list[float]:
    """Host seconds of each of `repeats` calls, between synchronisations, after `warm_up` uncounted ones."""
    found = []
    for number in range(warm_up + repeats):
        synchronise(device)
        start = time.perf_counter()
        call()
        synchronise(device)
        if number >= warm_up:
            found.append(time.perf_counter() - start)
    return found


def reason_of(error: Exception) -> str:
    """An exception in one line of a table."""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())}".replace("|", "/")[:220]


def verdict(met: bool, tiny: bool) -> str:
    """What became of a goal; a tiny size cannot tell."""
    return "not judged at this size" if tiny else "met" if met else "missed"


def environment(device: torch.device, module: str, arguments: Sequence[str] | None) -> dict[str, Any]:
    """Device, driver, versions and the command of this run; None takes the process's own arguments."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "driver": _driver() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "torch": str(torch.__version__),
        "command": shlex.join(["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)]),
    }


def results_folder(out: Path | None, found: dict[str, Any], tiny: bool) -> Path:
    """`out`, or results/<gpu>-<date>; a tiny run, which shows nothing, goes to the ignored folder runs."""
    if out is not None:
        return out
    if tiny:
        return Path("runs/tiny")
    slug = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
    return RESULTS / f"{slug}-{found['date']}"


def heading(title: str, found: dict[str, Any], tiny: bool) -> list[str]:
    """The first lines of a Markdown file: title, versions, command."""
    versions = ", ".join(f"{name} {found[name]}" for name in ("driver", "cuda", "python", *PACKAGES) if found[name])
    warning = ["A tiny size on a CPU: a check that everything runs. Its numbers mean nothing.", ""] if tiny else []
    return [f"# {title}", "", *warning, f"{found['device']}, {found['date']}: {versions}.", "", f"`{found['command']}`"]


def write(out: Path, name: str, results: dict[str, Any], text: str, draw: Callable[[Any], Any]) -> None:
    """`name`.json, `name`.md and `name`.png in `out`; `draw` takes matplotlib's pyplot and returns the figure."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n")
    (out / f"{name}.md").write_text(text)
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is missing", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = draw(pyplot)
        figure.savefig(out / f"{name}.png", dpi=150)
        pyplot.close(figure)
    print(f"wrote {out / name}.json, .md, .png")


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def arguments(description: str | None, example: str) -> argparse.ArgumentParser:
    """The options that every measurement of a whole network takes; `example` is of an override."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="wan_1.3b", help="of codmd train: a packaged name or a YAML file, of a Wan")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=f"changes to it, such as {example}")
    parser.add_argument("--out", type=Path, help="folder of the results (benchmarks/results/<gpu>-<date>)")
    parser.add_argument("--tiny", action="store_true", help="a tiny network on the CPU, to check that everything runs")
    return parser


def report(
    name: str,
    options: argparse.Namespace,
    argv: Sequence[str] | None,
    measure: Callable[[argparse.Namespace, torch.device, Path], dict[str, Any]],
    markdown: Callable[[dict[str, Any]], str],
    draw: Callable[[dict[str, Any]], Callable[[Any], Any]],
) -> int:
    """Measures, prints the page, and writes record, page and picture; the exit status."""
    device = pick_device(options.tiny)
    with tempfile.TemporaryDirectory() as folder:
        found = environment(device, f"benchmarks.{name}", argv) | measure(options, device, Path(folder))
    text = markdown(found)
    print(text)
    write(results_folder(options.out, found, options.tiny), name, found, text, draw(found))
    return 0
