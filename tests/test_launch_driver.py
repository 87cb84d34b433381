"""What reaches the CUDA driver: Triton's own launcher and a driver that does nothing, in a process of their own."""

import json
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="an idle driver would hide this machine's GPU")

SCRIPT = """
import json
from benchmarks.idle_cuda import IdleCuda
idle = IdleCuda()
import torch
import triton
from codmd import ops
from codmd.kernels.launch import Launcher

calls = {}
launch = Launcher.__call__

def recorded(self, stream, *arguments):
    calls.setdefault(id(self), (self, arguments))
    launch(self, stream, *arguments)

Launcher.__call__ = recorded
student = torch.randn(2, 3, 4, 8, 8, dtype=torch.bfloat16, requires_grad=True)
fake, real, uncond = torch.randn(3, 2, 3, 4, 8, 8, dtype=torch.bfloat16)
mask = torch.ones(2, 3, dtype=torch.bool)
ops.codmd_loss(student, real=real, fake=fake, real_uncond=uncond, frame_mask=mask, backend="triton").backward()
ops.relation_loss(student, real, fake, backend="triton").backward()
ops.relation_loss(student, real, fake, pool=None, backend="triton").backward()
Launcher.__call__ = launch

found = []
for launcher, arguments in calls.values():
    idle.expect(launcher._compiled)
    before, _ = idle.latest()
    launcher._compiled[launcher.grid](*arguments, *launcher._last, stream=0)
    middle, tritons = idle.latest()
    launcher(0, *arguments)
    after, ours = idle.latest()
    entered = []
    hooks = triton.knobs.runtime
    hook = lambda metadata: entered.append(metadata.get()["name"])
    chain = hooks.launch_enter_hook
    if chain is None:
        hooks.launch_enter_hook = hook
    else:
        chain.add(hook)
    launcher(0, *arguments)
    observed, hooked = idle.latest()
    if chain is None:
        hooks.launch_enter_hook = None
    else:
        chain.remove(hook)
    launcher(0, *arguments)
    found.append({
        "name": launcher.kernel.fn.__name__,
        "launches": [middle - before, after - middle, observed - after],
        "same": tritons == ours == hooked,
        "shape": ours.shape,
        "grid": launcher.grid,
        "warps": launcher.warps,
        "pointers": [f"{t.data_ptr():x}" for t in arguments if isinstance(t, torch.Tensor)],
        "passed": [f"{value:x}" for value in ours.parameters],
        "entered": entered,
    })
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def launches():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_bound_launch_passes_the_driver_what_tritons_own_does(launches):
    pooled = ["moments_kernel", "gradient_kernel", "pool_kernel", "gradient_kernel"]
    assert [seen["name"] for seen in launches[:4]] == pooled
    assert len(launches) > len(pooled)
    for seen in launches:
        assert seen["launches"] == [1, 1, 1], seen["name"]
        assert seen["same"], seen["name"]
        assert seen["shape"] == [*seen["grid"], 32 * seen["warps"], seen["shape"][4]], seen["name"]
        assert seen["passed"][: len(seen["pointers"])] == seen["pointers"], seen["name"]


def test_a_profilers_hook_sees_each_bound_launch(launches):
    assert all(seen["entered"] == [seen["name"]] for seen in launches)
