"""Configurations of a tiny Wan of any depth, for plans and footprints."""

from __future__ import annotations

import json

from codmd.distill.config.recipe import DistillConfig
from codmd.distill.config.run_config import RunConfig
from codmd.distill.config.sections import ModelSettings
from codmd.models import options_class
from codmd.models.wan.config import read_config as wan_config

SIZE = {"frames": 5, "height": 8, "width": 8}


def wan(tmp_path, layers, **options):
    path = tmp_path / f"{layers}.json"
    path.write_text(json.dumps({"_class_name": "WanTransformer3DModel", **wan_config("tiny"), "num_layers": layers}))
    return ModelSettings("wan", options_class("wan")(weights="random", config=str(path), **SIZE, **options))


def run_config(model, **changes):
    recipe = DistillConfig(batch_size=32, micro_batch=1, guidance=3.5, ema_decay=0.99)
    return RunConfig(out="unused", model=model, distill=recipe, **changes)
