"""The videos that are wanted, the names of their files, and the way back from a file to its prompt."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from codmd.files import is_text, read_json

SETTINGS = "sampling.json"
KINDS = ("videos", "latents")
UNSAFE = re.compile(r'[/\\:*?"<>|\x00-\x1f\x7f]+')
LONGEST = 120
LONGEST_FILE = 255
VBENCH_SEEDS = 5
VBENCH_FLICKERING_SEEDS = 25
FLICKERING = "temporal_flickering"


@dataclass(frozen=True)
class PromptJob:
    """The videos of one prompt.

    Attributes:
        prompt: what the model is given.
        name: start of the file names, `{name}-{seed}`.
        seeds: one video each.
        image: that the videos start from, a path, or as `codmd encode` has noted it; empty without one.
    """

    prompt: str
    name: str
    seeds: range
    image: str = ""


def jobs_of(prompts: Sequence[str], seeds: range, images: Sequence[str] = ()) -> list[PromptJob]:
    """One job per different prompt, or prompt and image, in the order of their first appearance.

    Raises:
        ValueError: a prompt has two images of one name, so that two files would be called alike.
    """
    pairs = list(dict.fromkeys(zip(prompts, images or [""] * len(prompts), strict=True)))
    times = Counter(prompt for prompt, _ in pairs)
    named = [f"{prompt} {Path(image).name}" if times[prompt] > 1 else prompt for prompt, image in pairs]
    for name, count in Counter(named).items():
        if count > 1:
            raise ValueError(f"two images of one prompt are called alike, {name!r}; rename one of them")
    return [
        PromptJob(prompt, file_name(name), seeds, image) for name, (prompt, image) in zip(named, pairs, strict=True)
    ]


def file_name(prompt: str) -> str:
    """The prompt itself where a file can be called that; else shortened, with a digest that keeps it unique."""
    name = UNSAFE.sub("_", prompt).strip(" .")
    while len(name.encode()) > LONGEST:
        name = name[:-1]
    if name == prompt:
        return name
    return f"{name} {hashlib.sha256(prompt.encode()).hexdigest()[:8]}"


def recorded_prompts(folder: Path) -> dict[str, str]:
    """Prompt by name of the files that `codmd sample` made, which are called `{name}-{seed}`.

    Args:
        folder: one that `codmd sample` wrote, or its "videos" or "latents".

    Returns:
        "prompts" of its sampling.json; nothing for another folder, or one of a version that did not keep them.

    Raises:
        OSError, ValueError: sampling.json cannot be read, or holds something else; names the file.
    """
    folder = folder.absolute()
    path = (folder.parent if folder.name in KINDS else folder) / SETTINGS
    if not path.is_file():
        return {}
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: holds a {type(settings).__name__}; expected the settings of codmd sample")
    prompts = settings.get("prompts", {})
    if not isinstance(prompts, dict) or not all(map(is_text, prompts.values())):
        raise ValueError(f"{path}: prompts: expected {{name: prompt}}, prompts without NUL or lone surrogates")
    return prompts


def without_seed(name: str) -> str:
    """`{name}` of a file called `{name}-{seed}`; a name without a number as it is."""
    return re.sub(r"-\d+$", "", name)


def vbench_jobs(path: Path, augmented: Sequence[str] | None = None) -> list[PromptJob]:
    """VBench's prompts, named `{prompt_en}-{i}` with i = 0 to 4 (0 to 24 for temporal flickering).

    Args:
        path: VBench's `VBench_full_info.json`.
        augmented: what to give the model instead, one for every different prompt, in the file's order; the videos
            keep the names of the original prompts.

    Raises:
        ValueError: the file is not what VBench ships, a prompt cannot be a file name, or the numbers differ.
    """
    counts: dict[str, int] = {}
    try:
        for entry in read_json(path):
            seeds = VBENCH_FLICKERING_SEEDS if FLICKERING in entry["dimension"] else VBENCH_SEEDS
            counts[entry["prompt_en"]] = max(seeds, counts.get(entry["prompt_en"], 0))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--vbench {path}: not VBench's list of prompts: {error!r}") from error
    if not counts:
        raise ValueError(f"--vbench {path}: has no prompts")
    for prompt in counts:
        if not is_text(prompt) or UNSAFE.search(prompt) or len(f"{prompt}-00.mp4".encode()) > LONGEST_FILE:
            raise ValueError(f"--vbench {path}: VBench names files by the prompt, which no file can be: {prompt!r}")
    if augmented is not None and len(augmented) != len(counts):
        raise ValueError(
            f"--prompts: {len(augmented)} prompts for {len(counts)} different ones of --vbench; expected one for each"
        )
    given = augmented if augmented is not None else list(counts)
    return [PromptJob(g, name, range(n)) for g, (name, n) in zip(given, counts.items(), strict=True)]
