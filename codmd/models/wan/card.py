"""The model card of a student's pipeline: how to sample it, its recipe, versions and measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from codmd import hub
from codmd.models.provenance import Provenance

from .pipeline import FROM_IMAGE, FROM_TEXT

CARD = """---
library_name: diffusers
pipeline_tag: {task}
{base_model}tags: [codmd, dmd, distillation]
---

# A {steps}-step student of {teacher}

Distilled by `codmd` (arXiv 2606.21982), relation weight {relation:g}, in {updates} updates of {batch} samples. It takes
no guidance: without `guidance_scale=1.0` a pipeline evaluates the network twice a step, for worse videos.

## Sampling

```python
import codmd, torch
from diffusers import {pipeline}
from diffusers.utils import export_to_video{load}

folder, prompt = "...", "a red fox runs over snow"
pipe = {pipeline}.from_pretrained(folder, torch_dtype=torch.bfloat16)
pipe.scheduler = codmd.scheduler.FewStepScheduler.from_pretrained(folder, subfolder="few_step_scheduler")
start = pipe.scheduler.begin(prompt, seed=0, shape={latent_shape})
video = pipe(
    {image}prompt=prompt, latents=start, guidance_scale=1.0, num_inference_steps={steps},
    num_frames={frames}, height={height}, width={width},
).frames[0]
export_to_video(video, "video.mp4", fps={fps})
```

`begin` gives the noise that `codmd sample` has for that prompt and seed. Without codmd, leave out
`pipe.scheduler = ...`, `start = ...` and `latents=start`: the folder's own scheduler is the stock one that comes
nearest to the step list. Its levels are off by up to {stock_error:.1e} (of 1), and its noise is PyTorch's.

## Recipe

{recipe}

## Versions

{versions}
"""


def card(
    provenance: Provenance,
    latent_shape: Sequence[int],
    pixels: Sequence[int],
    fps: int,
    stock_error: float,
    from_image: bool = False,
) -> str:
    """README.md of a student's pipeline.

    Args:
        latent_shape: (F, C, H, W).
        pixels: frames, height and width of a video.
        fps: its frames a second.
        stock_error: the largest error in sigma of the stock scheduler.
        from_image: whether a video starts from one.
    """
    recipe, teacher = provenance.recipe, provenance.teacher
    text = CARD.format(
        base_model=f"base_model: {teacher.partition('@')[0]}\n" if hub.is_repository(teacher) else "",
        steps=len(recipe["sigmas"]),
        teacher=teacher,
        relation=recipe["relation_weight"],
        updates=provenance.updates,
        batch=recipe["batch_size"],
        latent_shape=tuple(latent_shape),
        frames=pixels[0],
        height=pixels[1],
        width=pixels[2],
        fps=fps,
        stock_error=stock_error,
        task="image-to-video" if from_image else "text-to-video",
        pipeline=FROM_IMAGE if from_image else FROM_TEXT,
        load=", load_image" if from_image else "",
        image='image=load_image("first.png"), ' if from_image else "",
        recipe=_table([(key, _text(value)) for key, value in recipe.items()]),
        versions=_table(sorted(provenance.versions.items())),
    )
    if last := [(key, _text(value)) for key, value in provenance.last.items() if not isinstance(value, str)]:
        text += f"\n## Measured in the last logged update\n\n{_table(last)}\n"
    if provenance.measures:
        text += f"\n## Measured by `codmd inspect` and `codmd vbench`\n\n{_table(provenance.measures)}\n"
    return text


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
